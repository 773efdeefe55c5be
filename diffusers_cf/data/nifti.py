"""Read NIfTI files and check them: a damaged file is an error, never wrong voxels."""

import gzip
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel
import numpy as np
from nibabel.arrayproxy import ArrayProxy

from diffusers_cf.data.geometry import to_ras
from diffusers_cf.errors import InputError, reading


MAX_BYTES = 2 << 30
MODALITIES = ("flair", "t1", "t1ce", "t2")
ALIASES = {"flair": ("flair", "t2f"), "t1": ("t1", "t1n", "t1w"), "t1ce": ("t1ce", "t1gd", "t1c"), "t2": ("t2", "t2w")}


@dataclass
class Scan:
    """One NIfTI file.

    Attributes:
        data (`np.ndarray`): `(X, Y, Z)` or `(X, Y, Z, T)`, all finite, after the header's slope and intercept. Unscaled
            integers of one or two bytes keep their type; everything else is float32.
        affine (`np.ndarray`): float64 `(4, 4)`, from voxel index to RAS millimetres.
        header: the file's nibabel header, without extensions.
        path (`Path`): the file.
    """

    data: np.ndarray
    affine: np.ndarray
    header: object
    path: Path

    @property
    def spacing_mm(self) -> np.ndarray:
        """Voxel size `(3,)` in mm along the axes of the data."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def read_nifti(
    path: str | Path, dimensions: int = 3, max_bytes: int = MAX_BYTES, max_voxels: int | None = None
) -> Scan:
    """Read a single-file NIfTI-1 or NIfTI-2 image, gzipped or plain (its first bytes decide, not its name).

    Args:
        path (`str` or `Path`): the file.
        dimensions (`int`): 3 or 4; trailing axes of length 1 are dropped or added to fit.
        max_bytes (`int`): limit for the decompressed size.
        max_voxels (`int`, *optional*): limit for the number of voxels.

    Raises:
        InputError: the file is missing, damaged, too large, or not a real-valued NIfTI image of these dimensions; its
            affine is unusable; or voxels are NaN or infinite.
    """
    path = Path(path)
    with reading(path, "NIfTI file"), open(path, "rb") as file:
        is_gzipped = file.peek(2)[:2] == b"\x1f\x8b"
        stream = gzip.GzipFile(fileobj=file) if is_gzipped else file
        try:
            header = _read_header(path, stream)
            # Check the size that the header claims before allocating anything.
            shape, dtype = header.get_data_shape(), header.get_data_dtype()
            voxels = math.prod(shape)
            needed = header.get_data_offset() + voxels * dtype.itemsize
            if needed > max_bytes:
                raise InputError(
                    f"{path}: its header asks for {needed} bytes (shape {shape}), the limit is {max_bytes}"
                )
            if max_voxels is not None and voxels > max_voxels:
                raise InputError(f"{path}: {voxels} voxels (shape {shape}), the limit is {max_voxels}")
            is_scaled = header.get_slope_inter() not in ((None, None), (1, 0))
            keeps_type = dtype.kind in "ui" and dtype.itemsize <= 2 and not is_scaled
            data = np.asarray(
                ArrayProxy(stream, header, mmap=False), dtype.newbyteorder("=") if keeps_type else np.float32
            )
            while stream.read(1 << 20):  # the checksum at the end of a gzip stream covers all of it
                if stream.tell() > max_bytes:
                    raise InputError(f"{path}: more than {max_bytes} bytes after decompression, the limit")
        except EOFError:
            raise InputError(f"{path}: truncated: the gzip stream ends too early") from None
        while data.ndim > dimensions and data.shape[-1] == 1:
            data = data[..., 0]
        if not 2 <= data.ndim <= dimensions:
            raise InputError(f"{path}: {dimensions}-D image expected, but its shape is {shape}")
        data = data.reshape(data.shape + (1,) * (dimensions - data.ndim))
        affine = _read_affine(path, header)
    check_finite(path, data)
    return Scan(data, affine, header, path)


def _read_header(path: Path, stream):
    """Read a header with nibabel, and check what nibabel does not check."""
    start = stream.read(540)
    if start[344:348] == b"n+1\0":
        header = nibabel.Nifti1Header(start[:348])
    elif start[4:8] == b"n+2\0":
        header = nibabel.Nifti2Header(start)
    else:
        raise InputError(f"{path}: not a single-file NIfTI image ({len(start)} bytes without its magic bytes)")
    count = int(header["dim"][0])
    if not 1 <= count <= 7 or min(header.get_data_shape()) < 1:
        shape = tuple(header["dim"][1 : 1 + max(count, 0)].tolist())
        raise InputError(f"{path}: damaged NIfTI header ({count} dimensions, shape {shape})")
    if header.get_data_dtype().kind not in "uif":
        raise InputError(f"{path}: complex or colour values; a grey-scale magnitude image is required")
    return header


def _read_affine(path: Path, header) -> np.ndarray:
    """Return the float64 affine `(4, 4)` of a header, in mm."""
    if int(header["sform_code"]) <= 0 and int(header["qform_code"]) <= 0:
        raise InputError(f"{path}: no usable geometry: neither sform nor qform is set")
    affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    if not np.isfinite(affine).all():
        raise InputError(f"{path}: no usable geometry: the affine holds NaN or infinity")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if spacing.min() < 1e-6 or abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
        raise InputError(f"{path}: no usable geometry: the affine is singular")
    return affine


def check_finite(path: Path, data: np.ndarray) -> None:
    """Raise `InputError`, naming the file, if a voxel is NaN or infinite."""
    bad = 0 if data.dtype.kind in "ui" else data.size - int(np.isfinite(data).sum())
    if bad:
        raise InputError(f"{path}: {bad} of {data.size} voxels are NaN or infinite")


def to_canonical(scan: Scan) -> Scan:
    """Flip and permute the data and the affine of a scan to RAS; keep the header of the file."""
    orientation = nibabel.io_orientation(scan.affine)
    affine = scan.affine @ nibabel.orientations.inv_ornt_aff(orientation, scan.data.shape[:3])
    return replace(scan, data=np.ascontiguousarray(to_ras(scan.data, scan.affine)), affine=affine)


def canonical_modality(name: str) -> str:
    """Return flair, t1, t1ce or t2 for `t1gd`, `T1c`, `t2w`, `T2F` and so on; any other name in lower case."""
    name = name.lower()
    return next((modality for modality, aliases in ALIASES.items() if name in aliases), name)


def nifti_suffix(name: str) -> str:
    """Return the last part of a file's name: `P_001-T1n.nii.gz` gives `t1n`; "" if it is no NIfTI file.

    BIDS names T1 with a contrast agent `sub-01_ce-NAME_T1w.nii.gz`, which gives `t1ce`.
    """
    match = re.fullmatch(r"(?:(.*)[_.-])?([^_.-]+)\.nii(?:\.gz)?", name, flags=re.IGNORECASE)
    if not match or name.startswith("."):
        return ""
    entities, suffix = (match.group(1) or "").lower(), match.group(2).lower()
    return "t1ce" if suffix == "t1w" and re.search(r"(^|_)ce-", entities) else suffix


def find_modality_files(folder: str | Path, modalities: Iterable[str], required: bool = True) -> dict[str, Path]:
    """Find a patient's files, one for each modality (or `seg`), by the end of their names (aliases, any case).

    Args:
        folder (`str` or `Path`): the patient's folder.
        modalities (`Iterable[str]`): what to find; the result has the same spelling and order.
        required (`bool`): whether a missing file is an error; otherwise it is left out of the result.

    Raises:
        InputError: the folder can't be read, a file is missing, or several files fit.
    """
    folder, found = Path(folder), {}
    with reading(folder, "folder"):
        files = sorted(folder.iterdir())
    for modality in modalities:
        name = canonical_modality(modality)
        fitting = [file for file in files if canonical_modality(nifti_suffix(file.name)) == name]
        if len(fitting) > 1:
            raise InputError(f"{folder}: several files are {modality}: {', '.join(file.name for file in fitting)}")
        if fitting:
            found[modality] = fitting[0]
        elif required:
            names = ", ".join(ALIASES.get(name, (name,)))
            raise InputError(f"{folder}: modality missing: {modality} (names end in {names})")
    return found


def check_same_grid(scans: list[Scan]) -> None:
    """Check that RAS-canonical scans lie on one grid.

    Shapes must be equal, spacing and origin within 1e-3 mm, directions within 1e-4.

    Raises:
        InputError: they do not; the message lists each file.
    """

    def grid(scan: Scan) -> np.ndarray:
        spacing, directions = scan.spacing_mm, scan.affine[:3, :3] / scan.spacing_mm
        return np.concatenate([spacing, scan.affine[:3, 3], 10 * directions.ravel()])  # one tolerance for all

    if all(
        scan.data.shape[:3] == scans[0].data.shape[:3] and np.allclose(grid(scan), grid(scans[0]), rtol=0, atol=1e-3)
        for scan in scans
    ):
        return
    grids = []
    for scan in scans:
        shape = "x".join(str(n) for n in scan.data.shape)
        rows = (scan.spacing_mm, scan.affine[:3, 3], (scan.affine[:3, :3] / scan.spacing_mm).ravel())
        spacing, origin, directions = (", ".join(f"{value:.6g}" for value in row.round(6) + 0.0) for row in rows)
        grids.append(
            f"{scan.path.name} is {shape}, spacing ({spacing}) mm, origin ({origin}) mm, directions ({directions})"
        )
    raise InputError(f"{scans[0].path.parent}: shape or geometry differ: {'; '.join(grids)}")
