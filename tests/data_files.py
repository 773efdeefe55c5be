"""Small data for the tests of the data room: an asymmetric brain in any orientation and layout, and a made source."""

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from diffusers_cf.data.slices import PatientSlices
from diffusers_cf.data.source import Source


MODALITIES = ("flair", "t1", "t1ce", "t2")
SPACING_MM = (8.0, 6.0, 9.0)
DATA = Path(os.environ.get("DIFFUSERS_CF_DATA", Path(__file__).parents[2] / "shared" / "data"))


def needs_data(test):
    """Mark a test that reads the real scans."""
    missing = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data: {DATA} (DIFFUSERS_CF_DATA) is missing")
    return pytest.mark.real_data(missing(test))


def brain(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Volumes (4, 26, 32, 12) in whole scanner units and a mask, RAS; nothing in it is symmetric."""
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (26, 32, 12)), indexing="ij")
    inside = (x / 0.7) ** 2 + ((y - 0.1) / 0.8) ** 2 + ((z + 0.1) / 0.7) ** 2 < 1
    volume = np.rint(400 + 150 * x + 100 * y + 50 * z + rng.normal(0, 20, (4, 26, 32, 12)))
    mask = (x - 0.3) ** 2 + (y - 0.3) ** 2 + z**2 < 0.08
    volume[0, mask] += 500
    return (volume * inside).astype(np.float32), (mask & inside).astype(np.uint8)


def ras_affine() -> np.ndarray:
    """An affine with the voxel sizes of `brain` and its origin away from 0."""
    affine = np.diag([*SPACING_MM, 1.0])
    affine[:3, 3] = [-90.0, -126.0, -40.0]
    return affine


def save(path: Path, data: np.ndarray, axes: str = "RAS", affine: np.ndarray | None = None) -> Path:
    """Write RAS data in any axis order and direction, with the affine that says so."""
    image = nib.Nifti1Image(data, ras_affine() if affine is None else affine)
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes))
    nib.save(image.as_reoriented(turn), path)
    return path


def write_brats(folder: Path, patient: str = "P_01", axes: str = "RAS", seed: int = 0, names=None) -> Path:
    """Write one patient in BraTS layout and return its folder; `names` maps modality or seg to a file's name."""
    volume, mask = brain(seed)
    (folder / patient).mkdir(parents=True)
    files = dict(zip((*MODALITIES, "seg"), (*volume.astype(np.int16), mask), strict=True))
    for name, data in files.items():
        save(folder / patient / (f"{patient}_{name}.nii.gz" if names is None else names[name]), data, axes)
    return folder / patient


class MadeSource(Source):
    """Slices without files: `patients` of them, 3 slices of 2 channels each; `bad` ones have two problems."""

    name = "made"
    modalities = ("flair", "t1")

    def __init__(self, patients: int, bad: tuple[str, ...] = (), size: int = 8):
        super().__init__("", size, 240.0, "median")
        self.ids, self.bad = [f"p{i:02d}" for i in range(patients)], bad
        self.was_read = []

    def patients(self) -> list[str]:
        return list(self.ids)

    def load(self, patient: str, problems: list[str]) -> PatientSlices | None:
        self.was_read.append(patient)
        if patient in self.bad:
            problems += [f"{patient}.nii.gz: broken", f"{patient}: twice"]
            return None
        rng = np.random.default_rng(int(patient[1:]))
        masks = rng.integers(0, 2, (3, self.size, self.size)).astype(np.uint8)
        masks[0] = 0
        images = rng.random((3, 2, self.size, self.size)).astype(np.float32)
        return PatientSlices(patient, images, np.array([0, 1, 1]), np.array([4, 5, 6]), masks)
