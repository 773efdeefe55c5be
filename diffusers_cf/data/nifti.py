"""Read NIfTI files and check them: a damaged file is an error, never wrong voxels."""

import gzip
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel
import numpy as np
from nibabel.arrayproxy import ArrayProxy

from diffusers_cf.data.geometry import to_ras
from diffusers_cf.errors import InputError, reading


MAX_BYTES = 2 << 30
METRE, MILLIMETRE, MICRON = 1, 2, 3  # the lower three bits of xyzt_units; 0 is unknown and taken as mm
MODALITIES = ("flair", "t1", "t1ce", "t2")
ALIASES = {"flair": ("flair", "t2f"), "t1": ("t1", "t1n", "t1w"), "t1ce": ("t1ce", "t1gd", "t1c"), "t2": ("t2", "t2w")}


@dataclass
class Scan:
    """One NIfTI file.

    Attributes:
        data (`np.ndarray`): `(X, Y, Z)` or `(X, Y, Z, T)`, all finite, after the header's slope and intercept. Unscaled
            integers of one or two bytes keep their type; everything else is float32.
        affine (`np.ndarray`): float64 `(4, 4)`, from voxel index to RAS millimetres.
        header: the file's nibabel header without extensions, with lengths in mm.
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
    path: str | Path, dimensions: int = 3, max_bytes: int = MAX_BYTES, max_voxels: int | None = None,
    stored: bool = False,
) -> Scan:  # fmt: skip
    """Read a single-file NIfTI-1 or NIfTI-2 image, gzipped or plain (its first bytes decide, not its name).

    Args:
        path (`str` or `Path`): the file.
        dimensions (`int`): 3 or 4; trailing axes of length 1 are dropped or added to fit.
        max_bytes (`int`): limit for the decompressed size.
        max_voxels (`int`, *optional*): limit for the number of voxels.
        stored (`bool`): return the voxels as they are stored, without the header's slope and intercept.

    Raises:
        InputError: the file is missing, damaged, too large, or not a real-valued NIfTI image of these dimensions; its
            affine is unusable; or voxels are NaN or infinite.
    """
    path = Path(path)
    with reading(path, "NIfTI file"), open(path, "rb") as file:
        stream = gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == b"\x1f\x8b" else file
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
            dtype = dtype.newbyteorder("=") if keeps_type else np.float32
            proxy = ArrayProxy(stream, header, mmap=False)
            data = proxy.get_unscaled() if stored else np.asarray(proxy, dtype)
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
    """Read a header with nibabel, check what nibabel does not check, and convert its lengths to mm."""
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
    unit_of_time, unit = divmod(int(header["xyzt_units"]), 8)
    factor = {METRE: 1e3, MICRON: 1e-3}.get(unit, 1)
    header["pixdim"][1:4] *= factor
    for axis in "xyz":
        header[f"qoffset_{axis}"] *= factor
        header[f"srow_{axis}"] *= factor
    header["xyzt_units"] = 8 * unit_of_time + MILLIMETRE
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


def find_modality_file(folder: Path, modality: str) -> Path | None:
    """Return a patient's file of a modality, or `seg`, by the end of its name (aliases, any case); None if absent.

    Raises:
        InputError: the folder can't be read, or several files fit.
    """
    name = canonical_modality(modality)
    with reading(folder, "folder"):
        fitting = [file for file in sorted(folder.iterdir()) if canonical_modality(nifti_suffix(file.name)) == name]
    if len(fitting) > 1:
        raise InputError(f"{folder}: several files are {modality}: {', '.join(file.name for file in fitting)}")
    return fitting[0] if fitting else None


def check_same_grid(scans: list[Scan]) -> None:
    """Check that RAS-canonical scans lie on one grid.

    Shapes must be equal, spacing and origin within 1e-3 mm, directions within 1e-4.

    Raises:
        InputError: they do not; the message lists each file.
    """
    grids = [
        np.concatenate([scan.spacing_mm, scan.affine[:3, 3], (scan.affine[:3, :3] / scan.spacing_mm).ravel()])
        for scan in scans
    ]
    tolerance = np.repeat([1e-3, 1e-3, 1e-4], [3, 3, 9])
    if len({scan.data.shape[:3] for scan in scans}) <= 1 and all(
        (abs(g - grids[0]) <= tolerance).all() for g in grids
    ):
        return
    lines = []
    for scan, grid in zip(scans, grids, strict=True):
        shape, parts = "x".join(str(n) for n in scan.data.shape), np.split(grid.round(6) + 0.0, [3, 6])
        spacing, origin, directions = (", ".join(f"{value:.6g}" for value in part) for part in parts)
        lines.append(
            f"{scan.path.name} is {shape}, spacing ({spacing}) mm, origin ({origin}) mm, directions ({directions})"
        )
    raise InputError(f"{scans[0].path.parent}: shape or geometry differ: {'; '.join(lines)}")
