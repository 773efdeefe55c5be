"""The phantom: real anatomy with simulated disease, so that everything runs without a download.

`phantom_anatomy` makes the healthy brain. This module adds confounders (bright spots and caps, choroid plexus, vessels,
meninges) to every patient, a tumour to most of them, and scanner effects. Each step has its own random stream, so that
leaving out the tumour changes nothing else about a patient.

The patients of seed 0 are a frozen test set: PHANTOM_VERSION, FROZEN_SEED and FROZEN_SPLITS must not change. A change of
`make_patient` may only make the task harder, must raise the version, and is recorded in the change log.
"""

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from diffusers_cf.data.geometry import slices_from_volume
from diffusers_cf.data.nifti import MODALITIES
from diffusers_cf.data.phantom_anatomy import SHAPE, SPACING_MM, Head, sample
from diffusers_cf.data.slices import PatientSlices
from diffusers_cf.data.source import Source
from diffusers_cf.errors import InputError


PHANTOM_VERSION = 1
FROZEN_SEED = 0
FROZEN_SPLITS = {"train": 300, "validation": 16, "test": 24}
NECROSIS, OEDEMA, ENHANCING = 1, 2, 4

# Signal of fluid, grey and white matter, relative to the scanner's gain; modalities in canonical order.
TISSUE_SIGNAL = np.array([[0.20, 0.62, 0.52], [0.24, 0.58, 0.80], [0.25, 0.60, 0.81], [1.10, 0.62, 0.48]])


@dataclass(frozen=True)
class PhantomPatient:
    """One phantom patient.

    Attributes:
        patient (`str`): id such as `phantom-s0-0012`: seed, then index.
        volumes (`np.ndarray`): float32 `(4, X, Y, Z)` in the order flair, t1, t1ce, t2, in whole scanner units, exactly
            0 outside the brain.
        labels (`np.ndarray`): uint8 `(X, Y, Z)`, BraTS values: 1 necrosis or solid core, 2 oedema, 4 enhancing, 0
            elsewhere.
        affine (`np.ndarray`): `(4, 4)`, from voxel index to RAS millimetres.
    """

    patient: str
    volumes: np.ndarray
    labels: np.ndarray
    affine: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """The whole lesion, uint8 `(X, Y, Z)`."""
        return (self.labels > 0).astype(np.uint8)


def make_patient(seed: int, index: int, tumour: bool = True) -> PhantomPatient:
    """Make a patient in about 1 s; the same arguments give the same patient.

    `seed` chooses the cohort and `index` the patient, both 0 or more. 85 % of patients have a tumour; without `tumour`
    none has one.
    """
    root = np.random.default_rng([PHANTOM_VERSION, seed, index])
    anatomy_rng, tumour_rng, confounder_rng, scanner_rng = root.spawn(4)
    head = Head(anatomy_rng)
    lesion = _Tumour(head, tumour_rng) if tumour_rng.random() < 0.85 and tumour else None
    mni = lesion.mni if lesion else head.mni
    tissue = head.tissue(mni)
    signal = _tissue_signal(head, scanner_rng, tissue)
    _add_confounders(head, confounder_rng, signal, mni, tissue)
    labels = np.zeros(len(head.voxels), np.uint8)
    if lesion:
        labels = lesion.add(signal, tissue)
    scans = _scan(head, scanner_rng, signal)
    affine = nib.affines.from_matvec(np.diag(SPACING_MM), -(np.array(SHAPE) - 1) / 2 * SPACING_MM)
    return PhantomPatient(
        patient=f"phantom-s{seed}-{index:04d}",
        volumes=np.stack([head.volume(scan, np.float32) for scan in scans]),
        labels=head.volume(labels, np.uint8),
        affine=affine,
    )


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -40, 40)))


def _tissue_signal(head: Head, rng: np.random.Generator, tissue: tuple) -> np.ndarray:
    """Return the healthy signal (4, N): tissue fractions times the patient's tissue intensities, with texture."""
    intensities = TISSUE_SIGNAL * np.exp(rng.normal(0, 0.05, size=(4, 3)))
    signal = intensities @ np.stack(tissue)
    shared = head.noise(rng, 9.0)
    for row in signal:
        row *= np.exp(0.035 * shared + 0.045 * head.noise(rng, 6.0) + 0.025 * head.noise(rng, 28.0))
    return signal


def _scan(head: Head, rng: np.random.Generator, signal: np.ndarray) -> np.ndarray:
    """Apply bias field, Rician noise and gain to `signal` (4, N); round to whole numbers, at least 1."""
    scans = np.empty_like(signal)
    for row, scan in zip(signal, scans, strict=True):
        bias = np.exp(rng.uniform(0.03, 0.10) * head.noise(rng, 90.0))
        gain = np.exp(rng.uniform(np.log(300.0), np.log(3000.0)))
        real, imaginary = rng.uniform(0.012, 0.03) * rng.standard_normal((2, row.size))
        scan[:] = np.maximum(np.round(gain * np.sqrt((row * bias + real) ** 2 + imaginary**2)), 1)
    return scans


def _blend(signal: np.ndarray, weight: np.ndarray, target: np.ndarray | list) -> None:
    """Move each modality of `signal` (4, N) towards its `target` by `weight` (N,), in place."""
    for row, value in zip(signal, target, strict=True):
        row += weight * (value - row)


def _add_confounders(head: Head, rng: np.random.Generator, signal: np.ndarray, mni: np.ndarray, tissue: tuple) -> None:
    """Add bright structures that are not lesions, in place; they do not depend on the tumour.

    Age-related white-matter disease has the signal of oedema, but lies around both ventricles or in small spots. Choroid
    plexus, vessels and meninges enhance like a tumour.
    """
    _, _, white = tissue
    ventricle = sample("ventricle", mni)
    noise = head.noise(rng, 12.0)
    # Thick at the horns, thin along the body; the same grade on both sides.
    horns = 0.45 + 0.75 * _sigmoid((mni[1] - 14) / 4) + 0.75 * _sigmoid((-mni[1] - 36) / 4)
    thickness = rng.gamma(2.0, 2.4)
    caps = _sigmoid((thickness * horns * np.exp(0.35 * noise) - ventricle) / 1.0)
    caps *= white * (mni[2] > -12)
    spots = _spots(head, rng, mni, 0.5 * noise) * white
    strength = rng.uniform(0.3, 1.0)
    _blend_oedema(signal, caps, strength)
    _blend_oedema(signal, spots, np.clip(strength + rng.uniform(-0.2, 0.3), 0.3, 1.1))

    choroid_noise = head.noise(rng, 5.0)
    glomus = np.array([22.0, -38.0, 8.0])[:, None]
    distance = np.sqrt(((np.stack([np.abs(mni[0]), mni[1], mni[2]]) - glomus) ** 2 * [[1.0], [0.5], [0.6]]).sum(0))
    choroid = _sigmoid((rng.uniform(4.0, 9.0) + 2 * choroid_noise - distance) / 0.8) * (ventricle < 2.5)
    _blend(signal, choroid * rng.uniform(0.5, 0.95), [0.7, 0.5, 1.3, 0.95])

    # Lines where two noise fields are both near zero look like vessels.
    vessels = np.exp(-(head.noise(rng, 22.0) ** 2 + head.noise(rng, 22.0) ** 2) / 0.012) * (1 - white)
    rim = _sigmoid((rng.uniform(1.0, 3.5) - head.depth) / 0.5) * _sigmoid(4 * (head.noise(rng, 30.0) - 0.3))
    signal[2] += (1.35 - signal[2]) * np.maximum(vessels * rng.uniform(0.5, 1), rim * rng.uniform(0, 0.7))


def _blend_oedema(signal: np.ndarray, weight: np.ndarray, strength: float) -> None:
    """Give tissue the signal of oedema; `strength` 1 is fluid-laden, 0.3 faint."""
    faint, change = np.array([0.56, 0.76, 0.77, 0.52]), np.array([0.44, -0.26, -0.25, 0.44])
    _blend(signal, weight, faint + change * strength)


def _spots(head: Head, rng: np.random.Generator, mni: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Return the weights (N,) of white-matter spots of 2 to 7 mm, from none to dozens."""
    white = sample("white", head.mni)
    near = np.exp(-sample("ventricle", head.mni) / 14)
    chance = np.cumsum((white > 0.6) * (head.mni[2] > -8) * (head.depth > 9) * (0.15 + near))
    weight = np.zeros(mni.shape[1])
    for _ in range(rng.poisson(rng.gamma(1.6, 14.0))):
        centre = head.mni[:, np.searchsorted(chance, rng.random() * chance[-1])]
        radius = 1.8 + min(rng.gamma(2.0, 0.9), 5.2)
        stretch = np.exp(rng.normal(0, 0.25, size=3))
        close = np.flatnonzero((np.abs(mni - centre[:, None]) < 4 * radius).all(axis=0))
        distance = np.sqrt((((mni[:, close] - centre[:, None]) / stretch[:, None]) ** 2).sum(axis=0))
        weight[close] = np.maximum(weight[close], _sigmoid((radius + 2 * noise[close] - distance) / 0.7))
    return weight


class _Tumour:
    """One glioma: its place, the template positions after its mass effect (`mni`), and its signal (`add`)."""

    def __init__(self, head: Head, rng: np.random.Generator):
        allowed = np.flatnonzero((head.depth > 9) & (head.mni[2] > -28) & (head.tissue(head.mni)[0] < 0.3))
        self.head, self.rng = head, rng
        self.centre = head.frame[:, allowed[rng.integers(len(allowed))]]
        self.radius = rng.uniform(12.0, 32.0)
        self.core = self.radius * rng.uniform(0.45, 0.75)
        self.enhances = rng.random() < 2 / 3
        self.strength = rng.uniform(0.37, 0.95)
        self.mni = head.pushed(self.centre, amount=rng.uniform(0.15, 0.5), reach=2.2 * self.radius)

    def add(self, signal: np.ndarray, tissue: tuple) -> np.ndarray:
        """Write the tumour into `signal` (4, N) in place; return the BraTS labels (N,)."""
        head, rng = self.head, self.rng
        fluid, _, white = tissue
        lumps = np.clip(0.18 * head.noise(rng, 22.0) + 0.07 * head.noise(rng, 8.0), -0.35, 0.35)
        radius = np.sqrt(((head.frame - self.centre[:, None]) ** 2).sum(axis=0))
        core_depth = self.core * np.exp(lumps) - radius
        # Oedema follows white matter and spares the fluid spaces.
        reach = (self.radius - self.core) * 2.4 * (0.25 + 0.75 * white) * np.exp(0.25 * head.noise(rng, 16.0))
        core = _sigmoid(core_depth / 0.8)
        oedema = _sigmoid((core_depth + reach) / 1.2) * np.clip(1.4 - 1.6 * fluid, 0, 1)
        texture = np.exp(0.10 * head.noise(rng, 6.0))
        _blend_oedema(signal, oedema, self.strength)
        grain = head.noise(rng, 9.0)
        solid = np.clip(self.strength * rng.uniform(0.65, 1.1), 0.3, 1.0)
        for row, value in zip(signal, [0.58 + 0.36 * solid, 0.55, 0.56, 0.60 + 0.36 * solid], strict=True):
            row += core * (value * texture * (1 + 0.06 * grain) - row)
        labels = np.where(oedema >= 0.5, OEDEMA, 0)
        labels = np.where(core >= 0.5, NECROSIS, labels)
        if self.enhances:
            rim = rng.uniform(3.0, 8.0) * np.exp(0.35 * grain)
            necrosis = _sigmoid((core_depth - rim) / 0.8)
            _blend(signal, necrosis, [0.42, 0.32, 0.33, 1.05])
            shell = core * (1 - necrosis)
            signal[2] += shell * (rng.uniform(0.95, 1.4) * texture - signal[2])
            labels = np.where((core >= 0.5) & (necrosis < 0.5), ENHANCING, labels)
        return labels.astype(np.uint8)


def write_patient(patient: PhantomPatient, folder: str | Path) -> Path:
    """Write a patient in BraTS layout, `folder/ID/ID_{flair,t1,t1ce,t2,seg}.nii.gz`; return its folder.

    Images are int16 (the volumes hold whole numbers, so nothing is lost), the segmentation is uint8.
    """
    target = Path(folder) / patient.patient
    target.mkdir(parents=True, exist_ok=True)
    arrays = {name: volume.astype(np.int16) for name, volume in zip(MODALITIES, patient.volumes, strict=True)}
    for name, array in {**arrays, "seg": patient.labels}.items():
        image = nib.Nifti1Image(array, patient.affine)
        image.header.set_xyzt_units("mm")
        nib.save(image, target / f"{patient.patient}_{name}.nii.gz")
    return target


class PhantomSource(Source):
    """The phantom as a source of slices.

    Args:
        seed (`int`): the cohort, 0 or more; 0 is the frozen test set.
        patients (`int`): number of patients, at least 3 (one for each split).
        normalize (`str`): intensity scale (`intensity.py`); the frozen test set has that of the paper.
        **options: as in [`Source`].
    """

    name = "phantom"
    modalities = MODALITIES

    def __init__(self, seed: int = FROZEN_SEED, patients: int = 340, normalize: str = "p99", **options):
        super().__init__("", normalize=normalize, **options)
        if patients < 3:
            raise InputError(f"the phantom needs at least 3 patients, one for each split, not {patients}")
        self.seed, self.ids = seed, [f"phantom-s{seed}-{index:04d}" for index in range(patients)]

    def patients(self) -> list[str]:
        return sorted(self.ids)

    def load(self, patient: str, problems: list[str]) -> PatientSlices:
        made = make_patient(self.seed, self.ids.index(patient))
        return slices_from_volume(
            patient, made.volumes, made.mask, SPACING_MM, self.size, self.field_mm, self.normalize
        )

    def fixed_splits(self) -> dict[str, list[str]]:
        """Return the patients of each split, by index, in the proportions of the 340 frozen ones, at least one each."""
        ids, total = self.ids, sum(FROZEN_SPLITS.values())
        validation, test = (max(1, round(len(ids) * FROZEN_SPLITS[name] / total)) for name in ("validation", "test"))
        train = len(ids) - validation - test
        return {"train": ids[:train], "validation": ids[train : train + validation], "test": ids[train + validation :]}
