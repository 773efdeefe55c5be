"""Source `arrays`: axial slices in one .npz file.

Arrays of the file, N slices:
    images      (N, C, H, W), uint8 = intensity x `scale`, or float = intensity; 0 = background
    patient     (N,) str
    slice       (N,) int, axial index (0, 1, .. in the file's order if absent)
    masks       (N, H, W), above 0 = lesion; without it `label` or a labels file is needed
    label       (N,) str, name of each slice's class, where there are no masks
    modalities  (C,) str
    scale       number, 1 if absent
    has_NAME    (N,) bool, False where the patient lacks modality NAME and its channel holds something else

Slices are brain-extracted, anterior up, patient's left at the image's left. Each modality of a patient is brought to the
intensity scale of the data set by all its slices. With `none` the intensities stay as they are, and uint8 is stored
unchanged unless the slices are resized. Channels are put in the order flair, t1, t1ce, t2. Patients that lack one of the
chosen modalities are left out.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from diffusers_cf.data.geometry import FIELD_MM, resample_mask, resample_slices
from diffusers_cf.data.intensity import DEFAULT_NORMALIZE, unit_intensity
from diffusers_cf.data.labels import CLASS_NAMES, apply_labels
from diffusers_cf.data.nifti import MODALITIES, canonical_modality
from diffusers_cf.data.scans import choose_modalities
from diffusers_cf.data.slices import PatientSlices
from diffusers_cf.data.source import Source
from diffusers_cf.errors import InputError, reading


class ArraysSource(Source):
    """Slices of an .npz file.

    Args:
        path (`str` or `Path`): the file.
        size (`int`, *optional*): pixels along each side of a slice; by default that of the file.
        field_mm (`float`): side of the square field the slices show, in mm; only recorded.
        modalities (`Iterable[str]`, *optional*): which of the file's modalities become the channels, in this order; all
            by default.
        labels, normalize: as in [`Source`].

    Raises:
        InputError: the file can't be used.
    """

    name = "arrays"

    def __init__(
        self, path: str | Path, size: int | None = None, field_mm: float = FIELD_MM,
        modalities: Iterable[str] | None = None, labels: str | Path | None = None, normalize: str = DEFAULT_NORMALIZE,
    ):  # fmt: skip
        self.arrays = load_arrays(Path(path))
        images, names = self.arrays["images"], self.arrays["modalities"].tolist()
        super().__init__(path, images.shape[-1] if size is None else size, field_mm, normalize, labels)
        self.has_masks = "masks" in self.arrays
        self.channels = [canonical_modality(str(name)) for name in names]
        usual_first = sorted(self.channels, key=lambda name: (*MODALITIES, name).index(name))
        self.modalities = choose_modalities(self.path, self.channels, modalities or usual_first)
        self.scale = float(self.arrays.get("scale", 1))
        self.keeps_bytes = images.dtype == np.uint8 and self.size == images.shape[-1] and normalize == "none"
        self.left_out = {}
        for modality in self.modalities:
            has = self.arrays.get(f"has_{names[self.channels.index(modality)]}")
            if has is not None:
                self.left_out |= dict.fromkeys(self.arrays["patient"][~has].tolist(), f"no {modality}")
        if not self.patients():
            raise InputError(f"{self.path}: no patient has all of {', '.join(self.modalities)}")

    def patients(self) -> list[str]:
        return sorted(set(self.arrays["patient"].tolist()) - set(self.left_out))

    def facts(self) -> dict:
        stored = {"dtype": "uint8", "scale": self.scale} if self.keeps_bytes else {"dtype": "float16", "scale": 1}
        if "note" in self.arrays:
            stored["note"] = str(self.arrays["note"])
        return stored | super().facts()

    def problems(self, patient: str) -> list[str]:
        _, index, images = self._select(patient)
        found, where = [], f"{self.path}: {patient}"
        bad = int((~np.isfinite(images)).sum())
        if bad:
            found.append(f"{where}: {bad} values are NaN or infinite")
        for modality, channel in zip(self.modalities, images.swapaxes(0, 1), strict=True):
            if not (channel > 0).any():
                found.append(f"{where}: {modality} is empty: no value above 0")
        if len(np.unique(index)) < len(index):
            found.append(f"{where}: a slice index occurs twice")
        has_label = self.labels is not None and self.labels.lookup(patient, index).max() >= 0
        if not (self.has_masks or "label" in self.arrays or has_label):
            found.append(f"{where}: neither masks nor labels (--labels)")
        return found

    def read(self, patient: str) -> PatientSlices:
        problems = self.problems(patient)
        if problems:
            raise InputError(problems[0])
        rows, index, images = self._select(patient)
        masks = (self.arrays["masks"][rows] > 0).astype(np.uint8) if self.has_masks else None
        labels = np.zeros(len(rows), dtype=np.int64)  # replaced below by those of the labels file
        if "label" in self.arrays:
            labels = np.array([CLASS_NAMES.index(name) for name in self.arrays["label"][rows]], dtype=np.int64)
        elif masks is not None:
            labels = masks.any(axis=(1, 2)).astype(np.int64)
        units = [unit_intensity(channel, self.normalize) for channel in images.swapaxes(0, 1)]
        images /= np.array(units)[:, None, None]
        side = images.shape[-1]
        if side != self.size:
            # The field stays; only the pixels change, so the spacing is given in pixels.
            images = resample_slices(images, (1.0, 1.0), self.size, float(side))
            masks = None if masks is None else resample_mask(masks, (1.0, 1.0), self.size, float(side))
        slices = PatientSlices(patient, images, labels, index, masks)
        return slices if self.labels is None else apply_labels(slices, self.labels)

    def _select(self, patient: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return rows `(S,)`, slice index `(S,)` and float32 images `(S, C, H, W)` of a patient, sorted by index."""
        rows = np.flatnonzero(self.arrays["patient"] == patient)
        index = self.arrays["slice"][rows] if "slice" in self.arrays else np.arange(len(rows))
        order = np.argsort(index, kind="stable")
        channels = [self.channels.index(modality) for modality in self.modalities]
        images = self.arrays["images"][rows[order]][:, channels].astype(np.float32) / np.float32(self.scale)
        return rows[order], index[order].astype(np.int64), images


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz file and check their shapes and types.

    Raises:
        InputError: the file is damaged, or an array is missing or has another shape or type than it must have.
    """
    with reading(path, ".npz file"), np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files if name not in ("labels", "gt")}
    absent = [name for name in ("images", "patient", "modalities") if name not in arrays]
    if absent:
        raise InputError(f"{path}: array missing: {', '.join(absent)}")
    images, has = arrays["images"], [f"has_{name}" for name in np.atleast_1d(arrays["modalities"])]
    if images.ndim != 4 or images.shape[2] != images.shape[3] or not images.size:
        raise InputError(f"{path}: images must be (N, C, H, W) with H = W, not {images.shape}")
    if images.dtype.kind not in "uif":
        raise InputError(f"{path}: images must be numbers, not {images.dtype}")
    n, channels, size = images.shape[:3]
    shapes = {"patient": (n,), "slice": (n,), "label": (n,), "modalities": (channels,), "masks": (n, size, size)}
    for name, shape in (shapes | dict.fromkeys(has, (n,))).items():
        if name in arrays and arrays[name].shape != shape:
            raise InputError(f"{path}: {name} must have the shape {shape}, not {arrays[name].shape}")
        if name in has and name in arrays and arrays[name].dtype != bool:
            raise InputError(f"{path}: {name} must be true or false, not {arrays[name].dtype}")
    if not float(arrays.get("scale", 1)) > 0:
        raise InputError(f"{path}: scale must be above 0")
    unknown = sorted(set(arrays["label"].tolist()) - set(CLASS_NAMES)) if "label" in arrays else []
    if unknown:
        raise InputError(f"{path}: unknown label {unknown[0]!r} (one of {', '.join(CLASS_NAMES)})")
    return arrays
