"""Strict NIfTI reading: a damaged or unusable file gives one clear error, never wrong voxels.

The whole gzip stream is decompressed under a byte limit, which checks its CRC (nibabel alone does not), and the size
that the header claims is compared with the bytes present before anything is allocated.
"""

import gzip
import logging
import re
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from diffusers_cf.data.geometry import to_ras
from diffusers_cf.errors import InputError


logger = logging.getLogger(__name__)

MAX_BYTES = 2 << 30
MODALITIES = ("flair", "t1", "t1ce", "t2")
ALIASES = {
    "flair": ("flair", "t2f"),
    "t1": ("t1", "t1n", "t1w"),
    "t1ce": ("t1ce", "t1gd", "t1c"),
    "t2": ("t2", "t2w"),
}
SPACING_TOLERANCE_MM = 1e-3
DIRECTION_TOLERANCE = 1e-4

_MAGIC = {b"n+1\0": 348, b"n+2\0": 540}
_REAL_TYPES = {2, 4, 8, 16, 64, 256, 512, 768, 1024, 1280}
_COMPLEX_TYPES = {32, 1792, 2048}
_COLOUR_TYPES = {128, 2304}
_CHUNK = 1 << 20


@dataclass
class Scan:
    """One NIfTI file.

    Attributes:
        data: float32 (X, Y, Z) or (X, Y, Z, T), scaled by the header's slope and intercept, all finite.
        affine: float64 (4, 4), voxel index to RAS millimetres.
        header: The file's nibabel header.
        path: Where it was read.
    """

    data: np.ndarray
    affine: np.ndarray
    header: object
    path: Path

    @property
    def spacing_mm(self) -> np.ndarray:
        """Voxel size (3,) in mm along the data's axes."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def read_nifti(
    path: str | Path, dimensions: int = 3, max_bytes: int = MAX_BYTES, max_voxels: int | None = None
) -> Scan:
    """Reads a single-file NIfTI-1 or NIfTI-2 image, gzipped or plain (decided by its first bytes, not by its name).

    Args:
        path: The file.
        dimensions: 3 or 4; trailing axes of length 1 are dropped or added to fit.
        max_bytes: Limit for the decompressed size.
        max_voxels: Limit for their number, each of which becomes 4 bytes whatever it is in the file.

    Raises:
        InputError: The file is missing, truncated, damaged, no real-valued NIfTI image, has other dimensions, no
            usable geometry, voxels that are NaN or infinite, or more of them than fit into memory.
    """
    import nibabel

    path = Path(path)
    try:
        header, content = _read_checked(path, max_bytes, max_voxels)
        image_class = nibabel.Nifti1Image if header["sizeof_hdr"] == 348 else nibabel.Nifti2Image
        image = image_class.from_bytes(content)
        data = _fit_dimensions(path, image.get_fdata(dtype=np.float32, caching="unchanged"), dimensions)
    except InputError:
        raise
    except (nibabel.spatialimages.HeaderDataError, nibabel.filebasedimages.ImageFileError, ValueError) as error:
        raise InputError(f"{path}: not a usable NIfTI file ({_first_line(error)})") from None
    except MemoryError:
        raise InputError(f"{path}: too large for this machine's memory") from None
    affine = _checked_affine(path, image.header)
    check_finite(path, data)
    return Scan(data, affine, image.header, path)


def check_finite(path: Path, data: np.ndarray) -> None:
    """Raises InputError, naming the file, if a voxel is NaN or infinite."""
    bad = data.size - int(np.isfinite(data).sum())
    if bad:
        raise InputError(f"{path}: {bad} of {data.size} voxels are NaN or infinite")


def to_canonical(scan: Scan) -> Scan:
    """Flips and permutes a scan to RAS, its affine with it; the header stays that of the file."""
    import nibabel

    orientation = nibabel.io_orientation(scan.affine)
    affine = scan.affine @ nibabel.orientations.inv_ornt_aff(orientation, scan.data.shape[:3])
    return replace(scan, data=np.ascontiguousarray(to_ras(scan.data, scan.affine)), affine=affine)


def canonical_modality(name: str) -> str:
    """`t1gd`, `T1c`, `t2w`, `T2F`, ... to flair, t1, t1ce or t2; any other name in lower case."""
    name = name.lower()
    for modality, aliases in ALIASES.items():
        if name in aliases:
            return modality
    return name


def nifti_suffix(name: str) -> str:
    """What a file is by the last part of its name: `P_001-T1n.nii.gz` gives `t1n`; '' if it is no NIfTI file.

    BIDS calls T1 with a contrast agent `sub-01_ce-NAME_T1w.nii.gz`: `t1ce`.
    """
    match = re.fullmatch(r"(?:(.*)[_.-])?([^_.-]+)\.nii(?:\.gz)?", name, flags=re.IGNORECASE)
    if not match or name.startswith("."):
        return ""
    entities, suffix = (match.group(1) or "").lower(), match.group(2).lower()
    return "t1ce" if suffix == "t1w" and re.search(r"(^|_)ce-", entities) else suffix


def find_file(folder: str | Path, name: str) -> Path | None:
    """Finds the one NIfTI file of a patient's folder that is this modality (or `seg`); None if there is none.

    Raises:
        InputError: The folder is missing, or several files fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: can't be read ({error.strerror or error})") from None
    found = [f for f in files if canonical_modality(nifti_suffix(f.name)) == canonical_modality(name)]
    if len(found) > 1:
        raise InputError(f"{folder}: several files are {name}: {', '.join(f.name for f in found)}")
    return found[0] if found else None


def find_modality_files(folder: str | Path, modalities) -> dict[str, Path]:
    """Finds a patient's files, one per modality, by the end of their names (aliases, any case).

    Returns:
        Modality, as it was asked, to path, in the order asked.

    Raises:
        InputError: A modality is missing (the message names it) or several files fit.
    """
    files = {modality: find_file(folder, modality) for modality in modalities}
    missing = [modality for modality, path in files.items() if path is None]
    if missing:
        accepted = "; ".join(f"{m}: {', '.join(ALIASES.get(canonical_modality(m), (m,)))}" for m in missing)
        raise InputError(f"{folder}: modality missing: {', '.join(missing)} (names end in {accepted})")
    return files


def check_same_grid(scans: list[Scan]) -> None:
    """Checks that RAS-canonical scans lie on one grid: same shape, spacing, direction and origin.

    Tolerances: 1e-3 mm for spacing and origin, 1e-4 for directions.

    Raises:
        InputError: They do not; the message lists each file.
    """
    if not scans or all(_same_grid(scans[0], scan) for scan in scans[1:]):
        return
    listed = "; ".join(_describe_grid(scan) for scan in scans)
    raise InputError(f"{scans[0].path.parent}: shape or geometry differ: {listed}")


def _same_grid(a: Scan, b: Scan) -> bool:
    if a.data.shape[:3] != b.data.shape[:3]:
        return False
    directions = [scan.affine[:3, :3] / scan.spacing_mm for scan in (a, b)]
    return (
        np.allclose(a.spacing_mm, b.spacing_mm, rtol=0, atol=SPACING_TOLERANCE_MM)
        and np.allclose(*directions, rtol=0, atol=DIRECTION_TOLERANCE)
        and np.allclose(a.affine[:3, 3], b.affine[:3, 3], rtol=0, atol=SPACING_TOLERANCE_MM)
    )


def _describe_grid(scan: Scan) -> str:
    shape = "x".join(str(n) for n in scan.data.shape)
    spacing = ", ".join(f"{value:.4g}" for value in scan.spacing_mm)
    origin = ", ".join(f"{value:.4g}" for value in scan.affine[:3, 3])
    return f"{scan.path.name} is {shape}, spacing ({spacing}) mm, origin ({origin}) mm"


def _read_checked(path: Path, max_bytes: int, max_voxels: int | None):
    """Reads a file's header, checks it, then its whole content; returns both."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with open(path, "rb") as raw:
            gzipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if path.name.lower().endswith(".gz") and not gzipped:
                logger.warning("%s: not compressed in spite of its name", path)
            stream = gzip.GzipFile(fileobj=raw) if gzipped else raw
            start = stream.read(540)
            header = _checked_header(path, start)
            needed = _needed_bytes(path, header, max_bytes, max_voxels)
            content = _read_to_end(path, stream, start, needed, max_bytes)
    except EOFError:
        raise InputError(f"{path}: truncated: the gzip stream ends too early") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: damaged gzip stream ({_first_line(error)})") from None
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror or _first_line(error)})") from None
    if len(content) < needed:
        raise InputError(f"{path}: truncated: the header asks for {needed} bytes, the file has {len(content)}")
    return header, content


def _read_to_end(path: Path, stream, start: bytes, needed: int, max_bytes: int) -> bytes:
    """Keeps `needed` bytes and reads the rest too: only the end of a gzip stream tells whether it is sound."""
    content, total = bytearray(start), len(start)
    while chunk := stream.read(_CHUNK):
        total += len(chunk)
        if total > max_bytes:
            raise InputError(f"{path}: more than {max_bytes} bytes after decompression, the limit")
        content += chunk[: max(0, needed - len(content))]
    return bytes(content)


def _checked_header(path: Path, start: bytes):
    import nibabel

    if len(start) < 352:
        raise InputError(f"{path}: not a NIfTI file: only {len(start)} bytes")
    size = _MAGIC.get(start[344:348]) or _MAGIC.get(start[4:8])
    if size is None:
        raise InputError(f"{path}: not a single-file NIfTI image (its magic bytes are missing)")
    header_class = nibabel.Nifti1Header if size == 348 else nibabel.Nifti2Header
    try:
        header = header_class(start[:size], check=False)
    except (nibabel.spatialimages.HeaderDataError, nibabel.wrapstruct.WrapStructError, ValueError) as error:
        raise InputError(f"{path}: damaged NIfTI header ({_first_line(error)})") from None
    if int(header["sizeof_hdr"]) != size:
        raise InputError(f"{path}: damaged NIfTI header (header size {int(header['sizeof_hdr'])})")
    code = int(header["datatype"])
    if code in _COMPLEX_TYPES:
        raise InputError(f"{path}: complex values; a magnitude image is needed")
    if code in _COLOUR_TYPES:
        raise InputError(f"{path}: colour (RGB) values; a grey-scale image is needed")
    if code not in _REAL_TYPES:
        raise InputError(f"{path}: unknown data type {code}")
    return header


def _needed_bytes(path: Path, header, max_bytes: int, max_voxels: int | None) -> int:
    """Size of header and voxels as the header claims it, in Python integers: they can't overflow."""
    count = int(header["dim"][0])
    if not 1 <= count <= 7:
        raise InputError(f"{path}: damaged NIfTI header ({count} dimensions)")
    dims = [int(n) for n in header["dim"][1 : count + 1]]
    if min(dims) <= 0:
        raise InputError(f"{path}: damaged NIfTI header (shape {tuple(dims)})")
    offset = float(header["vox_offset"])
    if not np.isfinite(offset) or offset < 0 or 0 < offset < 352:
        raise InputError(f"{path}: damaged NIfTI header (data offset {offset})")
    voxels = 1
    for n in dims:
        voxels *= n
    needed = max(int(offset), 352) + voxels * header.get_data_dtype().itemsize
    if needed > max_bytes:
        raise InputError(f"{path}: its header asks for {needed} bytes (shape {tuple(dims)}), the limit is {max_bytes}")
    if max_voxels is not None and voxels > max_voxels:
        raise InputError(f"{path}: {voxels} voxels (shape {tuple(dims)}), the limit is {max_voxels}")
    return needed


def _fit_dimensions(path: Path, data: np.ndarray, dimensions: int) -> np.ndarray:
    shape = data.shape
    while data.ndim > dimensions and data.shape[-1] == 1:
        data = data[..., 0]
    if data.ndim > dimensions or data.ndim < 2:
        raise InputError(f"{path}: {dimensions}-D image expected, but its shape is {shape}")
    return data.reshape(data.shape + (1,) * (dimensions - data.ndim))


def _checked_affine(path: Path, header) -> np.ndarray:
    import nibabel

    if int(header["sform_code"]) <= 0 and int(header["qform_code"]) <= 0:
        raise InputError(f"{path}: no usable geometry: neither sform nor qform is set")
    try:
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    except (nibabel.spatialimages.HeaderDataError, ValueError) as error:
        raise InputError(f"{path}: no usable geometry ({_first_line(error)})") from None
    if not np.isfinite(affine).all():
        raise InputError(f"{path}: no usable geometry: the affine holds NaN or infinity")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if spacing.min() < 1e-6 or abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
        raise InputError(f"{path}: no usable geometry: the affine is singular")
    directions = affine[:3, :3] / spacing
    if np.abs(directions.T @ directions - np.eye(3)).max() > 1e-2:
        logger.warning("%s: sheared axes; slices follow the voxel grid", path)
    return affine


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
