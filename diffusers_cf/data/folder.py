"""Source `folder`: images of any kind, any number of channels and classes.

    FOLDER/CLASS/NAME.png or .npy        one sub-folder per class
    FOLDER/NAME.png or .npy              with a labels file

The patient is NAME up to its last `_`. What follows is the slice if it is a number: `p07_012.png` is slice 12 of patient
p07. A NAME without `_` is slice 0 of a patient of that name. A patient may have images in several classes.

PNG values are divided by the largest value of their type (255 or 65535). Files in .npy are (H, W) or (C, H, W). Floats
are kept unless another intensity scale is chosen. All images must have the same number of channels. Images are padded
with 0 to a square and resampled to the chosen size. There are no masks: such a data set can train a model, but can't
evaluate one by pixels.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from diffusers_cf.data.geometry import FIELD_MM, resample_slices
from diffusers_cf.data.intensity import unit_intensity
from diffusers_cf.data.labels import CLASS_NAMES
from diffusers_cf.data.slices import PatientSlices
from diffusers_cf.data.source import Source, noting_errors
from diffusers_cf.errors import InputError, reading


SUFFIXES = (".png", ".npy")


class FolderSource(Source):
    """Images in class folders, or in one folder with a labels file.

    Args:
        path (`str` or `Path`): the folder.
        size (`int`): pixels along each side.
        class_names (`Sequence[str]`, *optional*): the classes in order; the first is the default target of
            counterfactuals. By default the sorted names of the sub-folders, `healthy` first; with a labels file
            healthy and unhealthy.
        modalities (`Iterable[str]`, *optional*): names of the channels; channel0, channel1, .. by default.
        labels (`str` or `Path`, *optional*): CSV file of labels (`labels.py`), for images without class folders.
        field_mm (`float`): side of the field in mm; only recorded.
        normalize (`str`): intensity scale (`intensity.py`), by the foreground of all images of a patient.

    Raises:
        InputError: the folder or the labels file can't be used.
    """

    name = "folder"
    has_masks = False

    def __init__(
        self, path: str | Path, size: int = 128, class_names: Sequence[str] | None = None,
        modalities: Iterable[str] | None = None, labels: str | Path | None = None, field_mm: float = FIELD_MM,
        normalize: str = "none",
    ):  # fmt: skip
        path = Path(path)
        if labels is None:
            with reading(path, "folder"):
                folders = sorted(file.name for file in path.iterdir() if file.is_dir() and file.name[0] != ".")
            if class_names is not None and set(class_names) != set(folders):
                raise InputError(f"{path}: the sub-folders are {', '.join(folders)}, not {', '.join(class_names)}")
            if len(folders) < 2:
                raise InputError(f"{path}: at least two sub-folders are required, one per class (or --labels)")
            self.class_names = tuple(class_names or sorted(folders, key=lambda name: name != CLASS_NAMES[0]))
        else:
            self.class_names = tuple(class_names or CLASS_NAMES)
        super().__init__(path, size, field_mm, normalize, labels)
        self.files = self._list_files()
        first = next(iter(self.files.values()))[0][0]
        channels = len(read_image(first))
        self.modalities = tuple(modalities or (f"channel{i}" for i in range(channels)))
        if len(self.modalities) != channels:
            raise InputError(f"{first}: {channels} channels, but modalities names {len(self.modalities)}")

    def patients(self) -> list[str]:
        return sorted(self.files)

    def facts(self) -> dict:
        return {"orientation": "as in the files"} | super().facts()

    def load(self, patient: str, problems: list[str]) -> PatientSlices | None:
        paths, indices, labels = zip(*sorted(self.files[patient], key=lambda file: file[1]), strict=True)
        if len(set(indices)) < len(indices):
            problems.append(f"{self.path}: {patient}: a slice occurs twice")
        images = []
        for path in paths:
            with noting_errors(problems):
                image = read_image(path)
                if len(image) != len(self.modalities):
                    found, usual = len(image), len(self.modalities)
                    raise InputError(f"{path}: {found} channels, but other images have {usual}")
                # The field is the square around the image, centred, in pixels.
                images.append(resample_slices(image, (1.0, 1.0), self.size, max(image.shape[1:])))
        if problems:
            return None
        images = np.stack(images)
        for channel in images.swapaxes(0, 1) if self.normalize != "none" else ():
            if (channel > 0).any():  # a colour of a picture may be empty
                channel /= unit_intensity(channel, self.normalize)
        return PatientSlices(patient, images, np.array(labels, np.int64), np.array(indices, np.int64))

    def _list_files(self) -> dict[str, list[tuple[Path, int, int]]]:
        """Return (file, slice, class index) of every image, by patient."""
        found = {}
        folders = [self.path] if self.labels is not None else [self.path / name for name in self.class_names]
        for label, folder in enumerate(folders):
            with reading(folder, "folder"):
                images = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.name[0] != ".")
            if not images:
                raise InputError(f"{folder}: no {' or '.join(SUFFIXES)} file in it")
            for path in images:
                patient, _, index = path.stem.rpartition("_")
                if not patient:
                    patient, index = path.stem, "0"
                files = found.setdefault(patient, [])
                files.append((path, int(index) if index.isdecimal() else len(files), label))
        return found


def read_image(path: Path) -> np.ndarray:
    """Read a PNG or .npy file as float32 `(C, H, W)`.

    Raises:
        InputError: the file is damaged, has another number of dimensions, or holds NaN.
    """
    from PIL import Image

    with reading(path, "image"):
        if path.suffix.lower() == ".npy":
            values = np.load(path, allow_pickle=False)
        else:
            with Image.open(path, formats=["PNG"]) as file:
                if file.mode.startswith("I"):  # some versions of Pillow open 16-bit files as 32-bit integers
                    values = np.asarray(file, dtype=np.uint16)
                else:
                    palette = {"1": "L", "P": "RGB", "PA": "RGBA"}
                    values = np.asarray(file.convert(palette.get(file.mode, file.mode)))
            values = values if values.ndim == 2 else np.moveaxis(values, -1, 0)
    if values.dtype.kind not in "uif" or values.ndim not in (2, 3) or not values.size:
        raise InputError(f"{path}: (H, W) or (C, H, W) numbers expected, found {values.dtype} {values.shape}")
    image = values.astype(np.float32)
    if values.dtype in (np.uint8, np.uint16):
        image /= np.iinfo(values.dtype).max
    if bad := int((~np.isfinite(image)).sum()):
        raise InputError(f"{path}: {bad} values are NaN or infinite")
    return image if image.ndim == 3 else image[None]
