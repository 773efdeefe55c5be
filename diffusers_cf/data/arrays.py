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
intensity scale of the data set by all its slices; with `none` the intensities stay as they are, and uint8 is stored
unchanged unless the slices are resized. Channels are put in the order flair, t1, t1ce, t2. Patients that lack one of the
modalities asked for are left out.
"""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from diffusers_cf.data.geometry import FIELD_MM, check_geometry, resample_slices
from diffusers_cf.data.intensity import DEFAULT_NORMALIZE, unit_intensity
from diffusers_cf.data.labels import CLASS_NAMES, apply_labels, read_labels
from diffusers_cf.data.nifti import MODALITIES, canonical_modality
from diffusers_cf.data.scans import check_patient_id
from diffusers_cf.data.slices import PatientSlices
from diffusers_cf.errors import InputError


class ArraysSource:
    """Slices of an .npz file.

    Args:
        path: The file.
        size: Pixels along each side of a slice; that of the file if None.
        field_mm: Side of the square field the slices show, in mm; only noted.
        modalities: Which of the file's modalities become the channels, in this order; all by default.
        labels: CSV file of labels (`diffusers_cf.data.labels`).
        normalize: Intensity scale (`diffusers_cf.data.intensity`).

    Attributes:
        left_out: By patient that can't be used, why.

    Raises:
        InputError: The file can't be used.
    """

    name = "arrays"
    class_names = CLASS_NAMES

    def __init__(
        self,
        path: str | Path,
        size: int | None = None,
        field_mm: float = FIELD_MM,
        modalities=None,
        labels: str | Path | None = None,
        normalize: str = DEFAULT_NORMALIZE,
    ):
        self.path, self.field_mm, self.normalize = Path(path), field_mm, normalize
        self.arrays = _load(self.path)
        images = self.arrays["images"]
        _check_shapes(self.path, self.arrays)
        self.labels = None if labels is None else read_labels(labels, self.class_names)
        self.has_masks = "masks" in self.arrays
        self.channels = [canonical_modality(str(name)) for name in self.arrays["modalities"]]
        self.modalities = self._choose(modalities)
        self.size = images.shape[-1] if size is None else size
        check_geometry(self.size, field_mm, normalize)
        self.left_out = self._patients_without_a_modality()
        self.scale = float(self.arrays.get("scale", 1))
        self.as_stored = images.dtype == np.uint8 and self.size == images.shape[-1] and normalize == "none"

    def patients(self) -> list[str]:
        """Sorted ids of the file."""
        names = set(self.arrays["patient"].tolist()) - set(self.left_out)
        return [check_patient_id(name) for name in sorted(names)]

    def fixed_splits(self) -> None:
        """There are none: patients are split by a seed or a file."""
        return None

    def facts(self) -> dict:
        """What the source adds to preprocessing.json."""
        stored = {"dtype": "uint8", "scale": self.scale} if self.as_stored else {"dtype": "float16", "scale": 1}
        if "note" in self.arrays:
            stored["note"] = str(self.arrays["note"])
        return stored | {"labels_sha256": None if self.labels is None else self.labels.digest}

    def problems(self, patient: str) -> list[str]:
        """Every problem of a patient in words; empty if it is good."""
        images, index = self._select(patient)
        found = []
        if not np.isfinite(images).all():
            found.append(f"{self.path}: {patient}: {int((~np.isfinite(images)).sum())} values are NaN or infinite")
        found += [
            f"{self.path}: {patient}: {modality} is empty: no value above 0"
            for modality, channel in zip(self.modalities, np.moveaxis(images, 1, 0), strict=True)
            if not (channel > 0).any()
        ]
        if len(np.unique(index)) < len(index):
            found.append(f"{self.path}: {patient}: a slice index occurs twice")
        labelled = self.labels is not None and self.labels.lookup(patient, index).max() >= 0
        if not (self.has_masks or "label" in self.arrays or labelled):
            found.append(f"{self.path}: {patient}: neither masks nor labels (--labels)")
        return found

    def read(self, patient: str) -> PatientSlices:
        """Returns the slices of a patient, sorted by index.

        Raises:
            InputError: The patient has a problem.
        """
        problems = self.problems(patient)
        if problems:
            raise InputError(problems[0])
        images, index = self._select(patient)
        rows = np.flatnonzero(self.arrays["patient"] == patient)[np.argsort(index, kind="stable")]
        images = images[np.argsort(index, kind="stable")]
        masks = (self.arrays["masks"][rows] > 0).astype(np.uint8) if self.has_masks else None
        labels = self._own_labels(rows, masks)
        images /= np.array([unit_intensity(channel, self.normalize) for channel in images.swapaxes(0, 1)])[
            None, :, None, None
        ]
        if images.shape[-1] != self.size:
            # The field stays; only the pixels change: spacing in pixels, not in millimetres.
            spacing, field = (1.0, 1.0), float(images.shape[-1])
            images = resample_slices(images, spacing, self.size, field)
            masks = None if masks is None else (resample_slices(masks, spacing, self.size, field) >= 0.5 - 1e-5)
        masks = None if masks is None else masks.astype(np.uint8)
        slices = PatientSlices(patient, images, labels, np.sort(index), masks)
        return slices if self.labels is None else apply_labels(slices, self.labels)

    def _own_labels(self, rows: np.ndarray, masks: np.ndarray | None) -> np.ndarray:
        """Class indices by the file's `label`, else by its masks; 0 where a labels file has to say."""
        if "label" in self.arrays:
            return np.array([self.class_names.index(str(name)) for name in self.arrays["label"][rows]], dtype=np.int64)
        if masks is not None:
            return masks.any(axis=(1, 2)).astype(np.int64)
        return np.zeros(len(rows), dtype=np.int64)

    def _select(self, patient: str) -> tuple[np.ndarray, np.ndarray]:
        """float32 images (S, C, H, W) and slice index (S,) of a patient, in the file's order."""
        rows = np.flatnonzero(self.arrays["patient"] == patient)
        channels = [self.channels.index(modality) for modality in self.modalities]
        images = self.arrays["images"][rows][:, channels].astype(np.float32) / np.float32(self.scale)
        if "slice" in self.arrays:
            return images, self.arrays["slice"][rows].astype(np.int64)
        return images, np.arange(len(rows), dtype=np.int64)

    def _patients_without_a_modality(self) -> dict[str, str]:
        lacking = {}
        for modality in self.modalities:
            has = self.arrays.get(f"has_{self.arrays['modalities'][self.channels.index(modality)]}")
            if has is not None:
                lacking |= dict.fromkeys(self.arrays["patient"][~has].tolist(), f"no {modality}")
        if len(lacking) == len(set(self.arrays["patient"].tolist())):
            raise InputError(f"{self.path}: no patient has all of {', '.join(self.modalities)}")
        return lacking

    def _choose(self, modalities) -> tuple[str, ...]:
        if modalities is None:
            canonical = [modality for modality in MODALITIES if modality in self.channels]
            return tuple(canonical + [name for name in self.channels if name not in canonical])
        wanted = [canonical_modality(name) for name in modalities]
        absent = [modality for modality in wanted if modality not in self.channels]
        if absent:
            raise InputError(f"{self.path}: no modality {', '.join(absent)} (there are {', '.join(self.channels)})")
        return tuple(wanted)


def _load(path: Path) -> dict[str, np.ndarray]:
    if path.is_file() and not zipfile.is_zipfile(path):
        raise InputError(f"{path}: not an .npz file, or truncated")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name not in ("labels", "gt")}
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror or error})") from None
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: not a sound .npz file ({error})") from None
    absent = [name for name in ("images", "patient", "modalities") if name not in arrays]
    if absent:
        raise InputError(f"{path}: array missing: {', '.join(absent)}")
    return arrays


def _check_shapes(path: Path, arrays: dict[str, np.ndarray]) -> None:
    shape = arrays["images"].shape
    if len(shape) != 4 or shape[2] != shape[3] or not min(shape):
        raise InputError(f"{path}: images must be (N, C, H, W) with H = W, not {shape}")
    n, channels, size = shape[:3]
    wanted = {"patient": (n,), "slice": (n,), "label": (n,), "modalities": (channels,), "masks": (n, size, size)}
    wanted |= {f"has_{name}": (n,) for name in arrays["modalities"].tolist()}
    for name, expected in wanted.items():
        if name in arrays and arrays[name].shape != expected:
            raise InputError(f"{path}: {name} must have the shape {expected}, not {arrays[name].shape}")
    for name in wanted:
        if name.startswith("has_") and name in arrays and arrays[name].dtype != bool:
            raise InputError(f"{path}: {name} must be true or false, not {arrays[name].dtype}")
    if arrays["images"].dtype.kind not in "uif":
        raise InputError(f"{path}: images must be numbers, not {arrays['images'].dtype}")
    if not float(arrays.get("scale", 1)) > 0:
        raise InputError(f"{path}: scale must be above 0")
    unknown = sorted(set(arrays.get("label", np.array([], dtype=str)).tolist()) - set(CLASS_NAMES))
    if unknown:
        raise InputError(f"{path}: unknown label {unknown[0]!r} (one of {', '.join(CLASS_NAMES)})")
