"""Anatomy of the phantom: the ICBM 2009a tissue maps, deformed into one patient's brain.

Everything is computed in float64 by plain arithmetic on one grid, so that two machines agree after rounding to scanner
units. Positions are in mm along RAS axes: "frame" positions are the patient's, "MNI" positions the template's.
"""

import functools

import numpy as np
from scipy import ndimage

from diffusers_cf.errors import InputError


SHAPE = (128, 128, 48)
SPACING_MM = np.array([1.875, 1.875, 3.0])
# The template's brain is centred here; the frame's centre is put on it.
BRAIN_CENTRE_MNI = np.array([0.0, -20.0, 5.0])


@functools.cache
def template() -> tuple[np.ndarray, dict[str, tuple[np.ndarray, float]]]:
    """Read the ICBM 2009a maps, which the nilearn wheel contains (no download), in about 2 s.

    Returns:
        `tuple`: the MNI position `(3,)` of voxel (0, 0, 0), and by name each map `(X, Y, Z)` with its voxel size in mm:
            `grey` and `white`, probabilities; `brain`, a smoothed mask with the surface at 0.5; `depth`, mm below the
            surface; `ventricle`, mm from the lateral ventricles.

    Raises:
        InputError: nilearn is not installed.
    """
    try:
        from nilearn import datasets
    except ImportError as error:
        raise InputError("the phantom needs nilearn: pip install nilearn") from error

    image = datasets.load_mni152_gm_template(resolution=1)
    grey = np.asarray(image.dataobj, dtype=np.float32)
    white = np.asarray(datasets.load_mni152_wm_template(resolution=1).dataobj, dtype=np.float32)
    mask = np.asarray(datasets.load_mni152_brain_mask(resolution=1).dataobj) > 0
    brain = ndimage.gaussian_filter(mask.astype(np.float32), 1.0)
    origin = image.affine[:3, 3]
    coarse = mask[::2, ::2, ::2]
    depth = ndimage.distance_transform_edt(coarse, sampling=2.0)
    grid = np.ogrid[tuple(map(slice, coarse.shape))]
    x, y, z = (axis * 2.0 + start for axis, start in zip(grid, origin, strict=True))
    # A box around the lateral ventricles; the cisterns behind the midbrain are fluid too, but have no caps.
    box = (np.abs(x) <= 36) & (y >= -58) & (y <= 34) & (z >= -4) & (z <= 30) & ~((np.abs(x) < 14) & (y < -28))
    fluid = coarse & (grey[::2, ::2, ::2] + white[::2, ::2, ::2] < 0.5)
    ventricle = ndimage.distance_transform_edt(~(fluid & box & (depth > 16)), sampling=2.0)
    maps = {"grey": (grey, 1.0), "white": (white, 1.0), "brain": (brain, 1.0)}
    return origin, maps | {"depth": (depth.astype(np.float32), 2.0), "ventricle": (ventricle.astype(np.float32), 2.0)}


def sample(name: str, mni: np.ndarray) -> np.ndarray:
    """Return the map `name` at MNI positions (3, N), by linear interpolation, 0 outside the template."""
    origin, maps = template()
    values, step = maps[name]
    return ndimage.map_coordinates(values, (mni - origin[:, None]) / step, output=np.float64, order=1)


def _spline_weights(length: int, step: float) -> np.ndarray:
    """Return cubic B-spline weights (length, knots) for knots `step` voxels apart, each row of unit energy."""
    position = np.arange(length) / step
    knots = np.arange(int(np.floor(position[-1])) + 4) - 1
    t = np.abs(position[:, None] - knots[None, :])
    near, far = 2 / 3 - t**2 + t**3 / 2, np.clip(2 - t, 0, None) ** 3 / 6
    weights = np.where(t < 1, near, far)
    return weights / np.sqrt((weights**2).sum(axis=1, keepdims=True))


def smooth_noise(rng: np.random.Generator, scale_mm: float) -> np.ndarray:
    """Return Gaussian noise (X, Y, Z) of mean 0 and variance 1 on the frame, smooth over about `scale_mm`."""
    steps = np.maximum(scale_mm / SPACING_MM, 1.0)
    wx, wy, wz = (_spline_weights(n, step) for n, step in zip(SHAPE, steps, strict=True))
    knots = rng.standard_normal((wx.shape[1], wy.shape[1], wz.shape[1]))
    return np.tensordot(np.tensordot(wx, np.tensordot(knots, wz, (2, 1)), (1, 0)), wy, (1, 1)).transpose(0, 2, 1)


class Head:
    """One patient's brain: the voxels of the frame that it fills, and the template position of each.

    `rng` draws a rotation of a few degrees, a scale within 8 %, a shift, a smooth warp and atrophy.
    """

    def __init__(self, rng: np.random.Generator):
        angles = np.radians(rng.normal(0, [3.0, 3.0, 4.0]))
        scale = rng.uniform(0.92, 1.08) * rng.uniform(0.97, 1.03, size=3)
        self.shift = rng.normal(0, [3.0, 3.0, 2.5])
        self.fluid_gain = np.exp(rng.normal(0.5, 0.35))
        self.rotation = _rotation(angles) / np.clip(scale, 0.92, 1.08)[:, None]
        warp = np.stack([3.0 * smooth_noise(rng, 45.0) + 0.9 * smooth_noise(rng, 18.0) for _ in range(3)])
        axes = [(np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(SHAPE, SPACING_MM, strict=True)]
        frame = np.stack(np.meshgrid(*axes, indexing="ij")).reshape(3, -1)
        inside = sample("brain", self._to_mni(frame, warp.reshape(3, -1))) > 0.5
        self.voxels = np.flatnonzero(inside)  # (N,) flat index of each brain voxel
        self.frame = frame[:, self.voxels]  # (3, N) frame positions, mm
        self.warp = warp.reshape(3, -1)[:, self.voxels]
        self.mni = self._to_mni(self.frame, self.warp)  # (3, N) template positions, mm
        self.depth = sample("depth", self.mni)

    def _to_mni(self, frame: np.ndarray, warp: np.ndarray) -> np.ndarray:
        return self.rotation @ (frame - self.shift[:, None]) + warp + BRAIN_CENTRE_MNI[:, None]

    def pushed(self, centre: np.ndarray, amount: float, reach: float) -> np.ndarray:
        """Return template positions (3, N) of the brain voxels after a tumour has pushed the tissue aside.

        Tissue at radius r mm from the `centre` (3,), a frame position, came from r (1 - amount (1 - r / reach)^2).
        `amount` is 0 to 0.5; beyond the radius `reach` nothing moves.
        """
        offset = self.frame - centre[:, None]
        radius = np.sqrt((offset**2).sum(axis=0))
        source = self.frame - offset * (amount * np.clip(1 - radius / reach, 0, None) ** 2)
        return self._to_mni(source, self.warp)

    def noise(self, rng: np.random.Generator, scale_mm: float) -> np.ndarray:
        """Return `smooth_noise` at the brain voxels, (N,)."""
        return smooth_noise(rng, scale_mm).reshape(-1)[self.voxels]

    def tissue(self, mni: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the fractions of fluid, grey and white matter, each (N,), at template positions (3, N); their sum is 1."""
        grey, white = sample("grey", mni), sample("white", mni)
        fluid = np.clip(1 - grey - white, 0, 1) * self.fluid_gain
        # The maps are averages over people; squaring gives back the sharp borders of a single brain.
        fluid, grey, white = fluid**2, grey**2, white**2
        total = fluid + grey + white + 1e-6
        return (fluid + 1e-6) / total, grey / total, white / total

    def volume(self, values: np.ndarray, dtype: type) -> np.ndarray:
        """Put brain voxels (N,) back into a volume (X, Y, Z), 0 outside the brain."""
        full = np.zeros(int(np.prod(SHAPE)), dtype)
        full[self.voxels] = values
        return full.reshape(SHAPE)


def _rotation(angles: np.ndarray) -> np.ndarray:
    """Return the rotation matrix (3, 3) about x, then y, then z by `angles` in radians."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x
