"""From a scan's voxels to network slices and back: orientation, intensity, in-plane resampling.

Volumes here are RAS-canonical: x to the patient's right, y to anterior, z to superior. A slice is shown with anterior
up and the patient's left at the image's left: `volume[:, ::-1, z].T`. The in-plane field is a square of `field_mm`,
centred on the centre of the scan's frame.
"""

from collections.abc import Sequence

import nibabel
import numpy as np

from diffusers_cf.data.intensity import DEFAULT_NORMALIZE, check_normalize, unit_intensity
from diffusers_cf.data.slices import PatientSlices
from diffusers_cf.errors import InputError


FIELD_MM = 240.0


def check_geometry(size: int, field_mm: float, normalize: str = DEFAULT_NORMALIZE) -> None:
    """Raise `InputError` for an impossible size, field (mm) or intensity scale."""
    if size < 1:
        raise InputError(f"size must be at least 1, not {size}")
    if not 0 < field_mm < float("inf"):
        raise InputError(f"field_mm must be above 0, not {field_mm}")
    check_normalize(normalize)


def area_weights(n_in: int, spacing_mm: float, size: int, field_mm: float) -> np.ndarray:
    """Return the weights `(size, n_in)` that resample one axis of a scan to `size` pixels over the field.

    Shrinking averages over each pixel's area, growing interpolates linearly. The scan is 0 outside its frame. The field
    need not be a whole number of voxels.
    """
    pixel_mm = field_mm / size
    voxels = (np.arange(n_in) - (n_in - 1) / 2) * spacing_mm
    pixels = (np.arange(size) - (size - 1) / 2) * pixel_mm
    distance = np.abs(pixels[:, None] - voxels[None, :])
    if pixel_mm < spacing_mm:
        return np.clip(1 - distance / spacing_mm, 0, None).astype(np.float32)
    overlap = np.clip((pixel_mm + spacing_mm) / 2 - distance, 0, spacing_mm)
    # The background must stay exactly 0: rounding errors are no overlap.
    overlap[overlap < 1e-6 * spacing_mm] = 0
    return (overlap / pixel_mm).astype(np.float32)


def linear_weights(n_out: int, spacing_mm: float, size: int, field_mm: float) -> np.ndarray:
    """Return the weights `(n_out, size)` that interpolate one axis of a map at the scan's voxels; 0 outside the field."""
    pixel_mm = field_mm / size
    voxels = (np.arange(n_out) - (n_out - 1) / 2) * spacing_mm
    position = voxels / pixel_mm + (size - 1) / 2
    nearest = np.clip(position, 0, size - 1)
    weights = np.clip(1 - np.abs(nearest[:, None] - np.arange(size)[None, :]), 0, None)
    inside = np.abs(voxels) < field_mm / 2 + 1e-6
    return (weights * inside[:, None]).astype(np.float32)


def outside_field(foreground: np.ndarray, spacing_mm: Sequence[float], field_mm: float) -> float:
    """Return the share of a RAS foreground `(X, Y, Z)` whose voxels are centred outside the in-plane field."""
    inside = [
        np.abs(np.arange(length) - (length - 1) / 2) * float(mm) <= field_mm / 2
        for length, mm in zip(foreground.shape[:2], spacing_mm[:2], strict=True)
    ]
    lost = foreground & ~(inside[0][:, None, None] & inside[1][None, :, None])
    return float(lost.sum() / max(1, foreground.sum()))


def display(volume: np.ndarray) -> np.ndarray:
    """Turn RAS `(..., X, Y, Z)` into slices `(Z, ..., Y, X)`: row 0 anterior, column 0 the patient's left."""
    return np.moveaxis(np.swapaxes(volume[..., ::-1, :], -3, -2), -1, 0)


def undisplay(slices: np.ndarray) -> np.ndarray:
    """Invert `display`: slices `(Z, ..., Y, X)` to RAS `(..., X, Y, Z)`."""
    return np.swapaxes(np.moveaxis(slices, 0, -1), -3, -2)[..., ::-1, :]


def resample_slices(
    slices: np.ndarray, spacing_mm: Sequence[float], size: int, field_mm: float = FIELD_MM
) -> np.ndarray:
    """Resample slices `(..., Y, X)` in display orientation to float32 `(..., size, size)` over the field.

    The slices are 0 outside their frame. `spacing_mm` is the voxel size along x, y, ..
    """
    rows = area_weights(slices.shape[-2], float(spacing_mm[1]), size, field_mm)
    columns = area_weights(slices.shape[-1], float(spacing_mm[0]), size, field_mm)
    return rows @ np.asarray(slices, dtype=np.float32) @ columns.T


def resample_mask(masks: np.ndarray, spacing_mm: Sequence[float], size: int, field_mm: float) -> np.ndarray:
    """Resample masks `(..., Y, X)`, above 0 = lesion, to uint8 `(..., size, size)`: 1 if lesion fills half a pixel."""
    share = resample_slices(masks > 0, spacing_mm, size, field_mm)
    return (share >= 0.5 - 1e-5).astype(np.uint8)  # the margin absorbs float32 rounding


def slices_from_volume(
    patient: str, volume: np.ndarray, mask: np.ndarray | None, spacing_mm: Sequence[float], size: int,
    field_mm: float = FIELD_MM, normalize: str = DEFAULT_NORMALIZE,
) -> PatientSlices:  # fmt: skip
    """Cut a patient's scans into axial slices on the intensity scale (with p99 the protocol of Sec. 4 of the paper).

    Each channel is divided by the intensity that becomes 1 (`unit_intensity`). Voxels below 0 become background. The
    slices go from the first to the last one with content. A slice is unhealthy (1) if its mask has any voxel at the
    scan's own resolution, even if the lesion is too small to remain after resampling.

    Args:
        patient (`str`): id of the patient.
        volume (`np.ndarray`): `(C, X, Y, Z)`, RAS-canonical, scanner units, no NaN.
        mask (`np.ndarray`, *optional*): `(X, Y, Z)`, above 0 = lesion; without it every label is 0.
        spacing_mm (`Sequence[float]`): voxel size along x, y, z in mm.
        size (`int`): pixels along each side of a slice.
        field_mm (`float`): side of the square in-plane field in mm, centred on the frame.
        normalize (`str`): the intensity scale (`intensity.py`).

    Raises:
        InputError: a channel has no voxel above 0, or a voxel is infinite on the scale.
    """
    filled = np.flatnonzero((volume > 0).any(axis=(0, 1, 2)))
    first, last = int(filled[0]), int(filled[-1]) + 1
    images = np.empty((last - first, len(volume), size, size), dtype=np.float32)
    for index, channel in enumerate(volume):
        with np.errstate(over="ignore", invalid="ignore"):  # checked below
            scaled = np.clip(display(channel[..., first:last]), 0, None) / np.float32(
                unit_intensity(channel, normalize)
            )
            images[:, index] = resample_slices(scaled, spacing_mm, size, field_mm)
    if not np.isfinite(images).all():  # a scale near 0 turns the brightest voxels infinite
        raise InputError(
            f"{patient}: the range of intensities is too large: some are infinite on the scale {normalize}"
        )
    labels, masks = np.zeros(last - first, dtype=np.int64), None
    if mask is not None:
        lesion = display(mask[..., first:last] > 0)
        labels = lesion.any(axis=(1, 2)).astype(np.int64)
        masks = resample_mask(lesion, spacing_mm, size, field_mm)
    ranges = [(float(channel.min()), float(channel.max())) for channel in volume]
    return PatientSlices(
        patient, images, labels, np.arange(first, last, dtype=np.int64), masks, ranges, volume.shape[-1]
    )


def volume_from_slices(
    maps: np.ndarray, slices: np.ndarray, shape: tuple[int, int, int], spacing_mm: Sequence[float],
    field_mm: float = FIELD_MM,
) -> np.ndarray:  # fmt: skip
    """Put maps back into the grid of the scan: the inverse of the resampling in `slices_from_volume`.

    Args:
        maps (`np.ndarray`): square `(S, H, W)`, in display orientation over the field.
        slices (`np.ndarray`): `(S,)` axial index of each map, as in `PatientSlices.slices`.
        shape (`tuple[int, int, int]`): `(X, Y, Z)` of the RAS-canonical scan.
        spacing_mm (`Sequence[float]`): voxel size along x, y, z in mm.
        field_mm (`float`): side of the field of the maps, in mm.

    Returns:
        `np.ndarray`: float32 `(X, Y, Z)`, bilinear in-plane; 0 outside the field and in slices without a map.
    """
    x, y, z = shape
    rows = linear_weights(y, float(spacing_mm[1]), maps.shape[-2], field_mm)
    columns = linear_weights(x, float(spacing_mm[0]), maps.shape[-1], field_mm)
    stack = np.zeros((z, y, x), dtype=np.float32)
    # as two large products, many times faster than two small ones a slice
    stack[np.asarray(slices)] = np.einsum("yh,shw,xw->syx", rows, np.float32(maps), columns, optimize=True)
    return np.ascontiguousarray(undisplay(stack))


def to_ras(volume: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Flip and permute `(X, Y, Z[, T])` from the scan's own axes to RAS, without interpolation."""
    return nibabel.apply_orientation(volume, nibabel.io_orientation(affine))


def from_ras(volume: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Invert `to_ras`: RAS `(X, Y, Z[, T])` to the axes of the scan with this affine."""
    ras = np.array([[0, 1], [1, 1], [2, 1]], dtype=float)
    return nibabel.apply_orientation(volume, nibabel.orientations.ornt_transform(ras, nibabel.io_orientation(affine)))
