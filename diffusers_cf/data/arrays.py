"""Source `arrays`: axial slices in one .npz file.

Arrays of the file, for N slices:
    images      (N, C, H, W), uint8 = intensity x `scale`, or float = intensity; 0 = background
    patient     (N,) str, or int, which becomes text
    slice       (N,) int from 0, axial index (by default 0, 1, .. in the file's order)
    masks       (N, H, W), above 0 = lesion; without masks, `label` or a labels file is required
    label       (N,) str, name of each slice's class, if there are no masks
    modalities  (C,) str
    scale       number, 1 by default
    has_NAME    (N,) bool, False if the patient lacks modality NAME, whose channel then does not count

Slices are brain-extracted, with anterior up and the patient's left at the image's left. Each modality of a patient is
normalised over all its slices. With `none` intensities are kept, and uint8 is stored unchanged unless the slices are
resized. Channels are ordered flair, t1, t1ce, t2. Patients that lack one of the chosen modalities are left out, or, with
`allow_missing_modalities`, get a channel of background for it.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from diffusers_cf.data.geometry import resample_mask, resample_slices
from diffusers_cf.data.intensity import intensity_problem, unit_intensity
from diffusers_cf.data.nifti import MODALITIES, canonical_modality
from diffusers_cf.data.scans import choose_modalities
from diffusers_cf.data.slices import PatientSlices
from diffusers_cf.data.source import CLASS_NAMES, Source
from diffusers_cf.errors import InputError, reading


class ArraysSource(Source):
    """Slices of an .npz file.

    Args:
        path (`str` or `Path`): the file.
        size (`int`, *optional*): pixels along each side of a slice; by default that of the file.
        modalities (`Iterable[str]`, *optional*): the modalities to use as channels, in this order; by default all.
        allow_missing_modalities (`bool`): use patients that lack some, but not all, of the modalities.
        **options: as in [`Source`]; `field_mm` is only recorded.
    """

    name = "arrays"

    def __init__(
        self, path: str | Path, size: int | None = None, modalities: Iterable[str] | None = None,
        allow_missing_modalities: bool = False, **options,
    ):  # fmt: skip
        self.arrays = load_arrays(Path(path))
        images, names = self.arrays["images"], self.arrays["modalities"].tolist()
        super().__init__(path, images.shape[-1] if size is None else size, **options)
        self.has_masks = "masks" in self.arrays
        if not self.has_masks and "label" not in self.arrays and self.labels is None:
            raise InputError(f"{self.path}: neither masks nor labels (--labels)")
        self.channels = [canonical_modality(str(name)) for name in names]
        usual_order = sorted(self.channels, key=lambda name: (*MODALITIES, name).index(name))
        self.modalities = choose_modalities(self.path, self.channels, modalities or usual_order)
        self.scale = float(self.arrays.get("scale", 1))
        self.keeps_bytes = images.dtype == np.uint8 and self.size == images.shape[-1] and self.normalize == "none"
        everywhere = np.ones(len(images), bool)
        found = [self.arrays.get(f"has_{names[self.channels.index(m)]}", everywhere) for m in self.modalities]
        self.has = np.stack(found, axis=1)  # (N, channels in use)
        self.left_out = {}
        for modality, has in zip(self.modalities, self.has.T, strict=True):
            lacking = self.arrays["patient"][~(self.has.any(axis=1) if allow_missing_modalities else has)]
            self.left_out |= dict.fromkeys(lacking.tolist(), f"no {modality}")
        if not self.patients():
            amount = "any" if allow_missing_modalities else "all"
            raise InputError(f"{self.path}: no patient has {amount} of {', '.join(self.modalities)}")

    def patients(self) -> list[str]:
        return sorted(set(self.arrays["patient"].tolist()) - set(self.left_out))

    def facts(self) -> dict:
        stored = {"dtype": "uint8", "scale": self.scale} if self.keeps_bytes else {}
        note = {"note": str(self.arrays["note"])} if "note" in self.arrays else {}
        return stored | note | super().facts()

    def load(self, patient: str, problems: list[str]) -> PatientSlices | None:
        rows = np.flatnonzero(self.arrays["patient"] == patient)
        index = self.arrays["slice"][rows] if "slice" in self.arrays else np.arange(len(rows))
        order = np.argsort(index, kind="stable")
        rows, index = rows[order], index[order].astype(np.int64)
        channels = [self.channels.index(modality) for modality in self.modalities]
        images = self.arrays["images"][rows][:, channels].astype(np.float32) / np.float32(self.scale)

        has = self.has[rows]
        images[~has] = 0
        where, ranges = f"{self.path}: {patient}", [(float(c.min()), float(c.max())) for c in images.swapaxes(0, 1)]
        for modality, channel, present in zip(self.modalities, images.swapaxes(0, 1), has.any(axis=0), strict=True):
            if present and (problem := intensity_problem(channel, self.normalize)):
                problems.append(f"{where}: {modality}: {problem}")
        if len(np.unique(index)) < len(index):
            problems.append(f"{where}: a slice index occurs twice")
        if problems:
            return None

        images = images.clip(min=0)
        for channel, present in zip(images.swapaxes(0, 1), has.any(axis=0), strict=True):
            if present:
                channel /= unit_intensity(channel, self.normalize)
        masks = (self.arrays["masks"][rows] > 0).astype(np.uint8) if self.has_masks else None
        if "label" in self.arrays:
            labels = np.array([CLASS_NAMES.index(name) for name in self.arrays["label"][rows]], dtype=np.int64)
        else:  # without masks or `label`, the labels file sets them
            labels = np.zeros(len(rows), np.int64) if masks is None else masks.any(axis=(1, 2)).astype(np.int64)
        side = images.shape[-1]
        if side != self.size:  # the field stays, and is given in pixels of the file
            images = resample_slices(images, (1.0, 1.0), self.size, float(side))
            masks = None if masks is None else resample_mask(masks, (1.0, 1.0), self.size, float(side))
        return PatientSlices(patient, images, labels, index, masks, ranges)


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz file and check their shapes and types.

    Raises:
        InputError: the file is damaged, or an array is missing or has a wrong shape or type.
    """
    with reading(path, ".npz file"), np.load(path, allow_pickle=False) as file:
        arrays = {name: np.asarray(file[name]) for name in file.files if name not in ("labels", "gt")}
    if absent := [name for name in ("images", "patient", "modalities") if name not in arrays]:
        raise InputError(f"{path}: array missing: {', '.join(absent)}")
    images = arrays["images"]
    if images.ndim != 4 or images.shape[2] != images.shape[3] or not images.size:
        raise InputError(f"{path}: images must be (N, C, H, W) with H = W, not {images.shape}")
    n, channels, size = images.shape[:3]
    wanted = {  # shape and kinds of dtype
        "images": (images.shape, "uif"), "masks": ((n, size, size), "buif"), "scale": ((), "uif"),
        "patient": ((n,), "uiUS"), "slice": ((n,), "uif"), "label": ((n,), "US"), "modalities": ((channels,), "US"),
    } | {f"has_{name}": ((n,), "b") for name in np.atleast_1d(arrays["modalities"])}  # fmt: skip
    for name in [name for name in wanted if name in arrays]:
        shape, kinds = wanted[name]
        if arrays[name].shape != shape:
            raise InputError(f"{path}: {name} must have the shape {shape}, not {arrays[name].shape}")
        if arrays[name].dtype.kind not in kinds:
            what = "text" if "U" in kinds else "true or false" if kinds == "b" else "numbers"
            raise InputError(f"{path}: {name} must be {what}, not {arrays[name].dtype}")
        if "U" in kinds:
            with reading(path, ".npz file of ASCII text"):
                arrays[name] = arrays[name].astype(str)
    slices = arrays.get("slice", np.zeros(1))
    if bad := slices[~((slices == np.rint(slices)) & (slices >= 0) & (slices < 2**31))].tolist():
        raise InputError(f"{path}: slice must be whole numbers from 0 up, found {bad[0]}")
    if not 0 < float(arrays.get("scale", 1)) < float("inf"):
        raise InputError(f"{path}: scale must be above 0")
    if len(set(arrays["modalities"].tolist())) < channels:
        raise InputError(f"{path}: modalities names one twice: {', '.join(arrays['modalities'])}")
    if unknown := sorted(set(arrays.get("label", np.array(CLASS_NAMES)).tolist()) - set(CLASS_NAMES)):
        raise InputError(f"{path}: unknown label {unknown[0]!r} (one of {', '.join(CLASS_NAMES)})")
    return arrays
