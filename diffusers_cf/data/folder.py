"""Source `folder`: images of any kind, any number of channels and classes.

    FOLDER/CLASS/NAME        one sub-folder per class
    FOLDER/NAME              with a labels file

Images are PNG, JPEG, TIFF, BMP or .npy files.

NAME ends in `_` and the number of the slice: `p07_012.png` and `p07_slice12.png` are slice 12 of patient p07. A NAME
without `_` is slice 0 of a patient of that name. A patient may have images in several classes.

Values of pictures are divided by the largest value of their type (255 or 65535), and transparent pixels are background,
0. Files in .npy are (H, W) or (C, H, W). Floats are kept unless another intensity scale is chosen. All images must have
the same number of channels. Images are padded with 0 to a square and resampled to the chosen size. There are no masks:
such a data set can train a model, but can't evaluate one by pixels.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from diffusers_cf.data.geometry import resample_slices
from diffusers_cf.data.intensity import intensity_problem, unit_intensity
from diffusers_cf.data.slices import PatientSlices
from diffusers_cf.data.source import CLASS_NAMES, Source, noting_errors
from diffusers_cf.errors import InputError, reading


FORMATS = {
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP", ".npy": "npy",
}  # fmt: skip
HEALTHY_NAMES = ("healthy", "normal", "control", "no_tumor", "no_tumour", "notumor", "negative", "no")
NUMBERED = re.compile(r"(?P<patient>.+)_(?:slice|sl|s|z)?-?(?P<slice>\d+)|(?P<single>[^_]+)")


class FolderSource(Source):
    """Images in class folders, or in one folder with a labels file.

    Args:
        path (`str` or `Path`): the folder.
        class_names (`Sequence[str]`, *optional*): the classes in order, the healthy one first. By default the
            sub-folders, if one is called healthy, normal, control or no_tumor; with labels healthy and unhealthy.
        modalities (`Iterable[str]`, *optional*): names of the channels; channel0, channel1, .. by default.
        labels (`str` or `Path`, *optional*): CSV file of labels, for images without class folders.
        normalize (`str`): intensity scale (`intensity.py`), by the foreground of all images of a patient.
        patient_pattern (`str`, *optional*): regular expression for names without suffix, with the groups `patient` and,
            if the name has one, `slice`.
        one_image_per_patient (`bool`): each file is a patient of its own, called CLASS_NAME.
        **options: as in [`Source`]; `field_mm` is only recorded.
    """

    name = "folder"
    has_masks = False

    def __init__(
        self, path: str | Path, class_names: Sequence[str] | None = None, modalities: Iterable[str] | None = None,
        labels: str | Path | None = None, normalize: str = "none", patient_pattern: str | None = None,
        one_image_per_patient: bool = False, **options,
    ):  # fmt: skip
        self.class_names = tuple(class_names or CLASS_NAMES) if labels is not None else _classes(path, class_names)
        super().__init__(path, normalize=normalize, labels=labels, **options)
        if patient_pattern is not None and one_image_per_patient:
            raise InputError("--patient_pattern and --one_image_per_patient exclude each other")
        with reading(patient_pattern, "regular expression"):
            self.pattern = re.compile(patient_pattern) if patient_pattern is not None else NUMBERED
        if patient_pattern is not None and "patient" not in self.pattern.groupindex:
            raise InputError(f"--patient_pattern {patient_pattern}: it has no group (?P<patient>..)")
        self.one_image_per_patient = one_image_per_patient
        self.files = self._list_files()
        first = next(iter(self.files.values()))[0][0]
        channels = len(read_image(first))
        self.modalities = tuple(modalities or (f"channel{i}" for i in range(channels)))
        if len(self.modalities) != channels:
            raise InputError(f"{first}: {channels} channels, but modalities names {len(self.modalities)}")

    def patients(self) -> list[str]:
        return sorted(self.files)

    def strata(self) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}  # by the classes of a patient's images, known where these lie in folders
        for patient in self.patients():
            groups.setdefault(str(sorted({label for _, _, label in self.files[patient]})), []).append(patient)
        return groups

    def facts(self) -> dict:
        rule = "file" if self.one_image_per_patient else self.pattern.pattern
        return {"orientation": "as in the files", "patients_by": rule} | super().facts()

    def load(self, patient: str, problems: list[str]) -> PatientSlices | None:
        paths, indices, labels = zip(*sorted(self.files[patient], key=lambda file: file[1]), strict=True)
        if len(set(indices)) < len(indices):
            problems.append(f"{self.path}: {patient}: a slice occurs twice")
        images = []
        for path in paths:
            with noting_errors(problems):
                image, usual = read_image(path), len(self.modalities)
                if len(image) != usual:
                    raise InputError(f"{path}: {len(image)} channels, but other images have {usual}")
                # The field is the square around the image, centred, in pixels.
                images.append(resample_slices(image, (1.0, 1.0), self.size, max(image.shape[1:])))
        if problems:
            return None
        images = np.stack(images)
        ranges = [(float(channel.min()), float(channel.max())) for channel in images.swapaxes(0, 1)]
        for name, channel in zip(self.modalities, images.swapaxes(0, 1), strict=True):
            if not channel.any():  # a colour of a picture may be empty
                continue
            if problem := intensity_problem(channel, self.normalize):
                problems.append(f"{paths[0]}: {name} of patient {patient}: {problem}")
            else:
                channel[:] = channel.clip(min=0) / unit_intensity(channel, self.normalize)
        return PatientSlices(patient, images, np.array(labels, np.int64), np.array(indices, np.int64), None, ranges)

    def _list_files(self) -> dict[str, list[tuple[Path, int, int]]]:
        """Return (file, slice, class index) of every image, by patient."""
        found, names, kinds = {}, {}, Counter()
        folders = [self.path] if self.labels is not None else [self.path / name for name in self.class_names]
        for label, folder in enumerate(folders):
            with reading(folder, "folder"):
                files = sorted((f for f in folder.iterdir() if f.name[0] != "."), key=_natural)
            images = [file for file in files if file.suffix.lower() in FORMATS and file.is_file()]
            if not images:
                raise InputError(f"{folder}: no image in it ({', '.join(FORMATS)})")
            self.unused += [str(file.relative_to(self.path)) for file in sorted(set(files) - set(images))]
            kinds.update(file.suffix.lower() for file in images)
            for path in images:
                patient, index = self._patient_of(path)
                id = re.sub(r"[^A-Za-z0-9._-]", "_", patient)
                if names.setdefault(id, patient) != patient or (self.labels is not None and id != patient):
                    raise InputError(
                        f"{path}: {patient!r} can't be a patient's id: letters, digits, '.', '_' and '-' only"
                    )
                of_patient = found.setdefault(id, [])
                of_patient.append((path, len(of_patient) if index is None else index, label))
        self.summary = [f"{sum(kinds.values())} images: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items())]
        several = sum(len(files) > 1 for files in found.values())
        self.summary.append(f"{len(found)} patients, {several} of them with several images")
        return found

    def _patient_of(self, path: Path) -> tuple[str, int | None]:
        """Return the patient of an image and the number of its slice, None if names have none."""
        if self.one_image_per_patient:
            return path.stem if self.labels is not None else f"{path.parent.name}_{path.stem}", 0
        match = self.pattern.fullmatch(path.stem)
        groups = match.groupdict() if match else {}
        patient, index = groups.get("patient"), groups.get("slice")
        if self.pattern is NUMBERED and groups.get("single"):
            patient, index = groups["single"], "0"
        if not patient:
            raise InputError(
                f"{path}: its name does not say patient and slice (PATIENT_NUMBER): give --patient_pattern, or"
                " --one_image_per_patient"
            )
        if index is None and self.labels is not None and any(number is not None for _, number in self.labels.classes):
            raise InputError(f"{self.labels.path}: labels slices, but --patient_pattern has no group (?P<slice>..)")
        if index is not None and not (index.isdecimal() and int(index) < 2**31):
            raise InputError(f"{path}: {index} is no slice number")
        return patient, None if index is None else int(index)


def _classes(path: str | Path, class_names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the sub-folders, the healthy one first."""
    with reading(path, "folder"):
        folders = sorted(file.name for file in Path(path).iterdir() if file.is_dir() and file.name[0] != ".")
    if class_names is not None and set(class_names) != set(folders):
        raise InputError(f"{path}: the sub-folders are {', '.join(folders)}, not {', '.join(class_names)}")
    if len(folders) < 2:
        raise InputError(f"{path}: at least two sub-folders are required, one per class (or --labels)")
    healthy = [name for name in folders if name.casefold().replace("-", "_").replace(" ", "_") in HEALTHY_NAMES]
    if class_names is None and len(healthy) != 1:
        raise InputError(
            f"{path}: which class is healthy? Name all, the healthy one first: --class_names {' '.join(folders)}"
        )
    return tuple(class_names or dict.fromkeys(healthy + folders))


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key that reads numbers in names: 2 comes before 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def read_image(path: Path) -> np.ndarray:
    """Read a picture or a .npy file as float32 `(C, H, W)`.

    Raises:
        InputError: the file is damaged or too large, has another number of dimensions, or holds NaN.
    """
    from PIL import Image

    kind = FORMATS[path.suffix.lower()]
    with reading(path, "image"):
        if kind == "npy":
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)  # a false header asks for no memory
            if mapped.ndim == 3 and mapped.shape[2] <= 4 < mapped.shape[0]:
                raise InputError(f"{path}: shape {mapped.shape} seems to be (H, W, C): (C, H, W) is required")
            values = np.array(mapped)
        else:
            with Image.open(path, formats=[kind]) as file:
                if file.mode[0] in "IF":  # some versions of Pillow open 16-bit files as 32-bit integers
                    values = np.asarray(file)
                    if file.mode[0] == "I" and not 0 <= values.min() <= values.max() < 2**16:
                        raise InputError(f"{path}: {values.min()} to {values.max()}: integers of 16 bits are required")
                    values = values.astype(np.float32 if file.mode == "F" else np.uint16)
                else:
                    black = Image.new("RGBA", file.size, (0, 0, 0, 255))
                    flat = Image.alpha_composite(black, file.convert("RGBA"))
                    values = np.asarray(flat.convert("L" if file.mode in ("1", "L", "LA", "La") else "RGB"))
            values = values if values.ndim == 2 else np.moveaxis(values, -1, 0)
    if values.dtype.kind not in "uif" or values.ndim not in (2, 3) or not values.size:
        raise InputError(f"{path}: (H, W) or (C, H, W) numbers expected, found {values.dtype} {values.shape}")
    image = values.astype(np.float32)
    if values.dtype in (np.uint8, np.uint16):
        image /= np.iinfo(values.dtype).max
    if bad := int((~np.isfinite(image)).sum()):
        raise InputError(f"{path}: {bad} values are NaN or infinite")
    return image if image.ndim == 3 else image[None]
