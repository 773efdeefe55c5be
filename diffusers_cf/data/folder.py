"""Source `folder`: images of any kind, any number of channels and classes.

    FOLDER/CLASS/NAME.png or .npy        one sub-folder per class
    FOLDER/NAME.png or .npy              with a labels file

The patient is NAME up to its last `_`, the slice what follows if it is a number: `p07_012.png` is slice 12 of patient
p07. A NAME without `_` is a patient of its own, slice 0. One patient may have images in several classes.

PNG values are divided by what their type can hold (255 or 65535); .npy files are (H, W) or (C, H, W), floats taken as
they are, unless another intensity scale is asked for: pictures carry their own. All images must have the same number of channels; one that isn't square is padded with 0 to a square, and
all are resampled to the size asked for. There are no masks: such a data set trains, but can't be evaluated by pixels.
"""

from pathlib import Path

import numpy as np

from diffusers_cf.data.geometry import FIELD_MM, check_geometry, resample_slices
from diffusers_cf.data.intensity import unit_intensity
from diffusers_cf.data.labels import CLASS_NAMES, apply_labels, read_labels
from diffusers_cf.data.scans import check_patient_id
from diffusers_cf.data.slices import PatientSlices
from diffusers_cf.errors import InputError


SUFFIXES = (".png", ".npy")


class FolderSource:
    """Images in class folders.

    Args:
        path: The folder.
        size: Pixels along each side.
        class_names: The classes in order, the first is what counterfactuals aim at by default. Without it the names
            of the sub-folders, sorted, `healthy` first; with a labels file healthy and unhealthy.
        modalities: Names of the channels; channel0, channel1, .. by default.
        labels: CSV file of labels (`diffusers_cf.data.labels`), for images without class folders.
        field_mm: Side of the field in mm, only noted.
        normalize: Intensity scale (`diffusers_cf.data.intensity`), by the foreground of all images of a patient.

    Raises:
        InputError: The folder or the labels file can't be used.
    """

    name = "folder"
    has_masks = False

    def __init__(
        self,
        path: str | Path,
        size: int = 128,
        class_names=None,
        modalities=None,
        labels: str | Path | None = None,
        field_mm: float = FIELD_MM,
        normalize: str = "none",
    ):
        check_geometry(size, field_mm, normalize)
        self.path, self.size, self.field_mm, self.normalize = Path(path), size, field_mm, normalize
        if not self.path.is_dir():
            raise InputError(f"{path}: no such folder")
        if labels is None:
            self.labels, self.class_names = None, self._class_folders(class_names)
        else:
            self.class_names = tuple(class_names or CLASS_NAMES)
            self.labels = read_labels(labels, self.class_names)
        self.files = self._list_files()
        first = next(iter(self.files.values()))[0][0]
        channels = len(read_image(first))
        self.modalities = tuple(modalities or (f"channel{i}" for i in range(channels)))
        if len(self.modalities) != channels:
            raise InputError(f"{first}: {channels} channels, but modalities names {len(self.modalities)}")

    def patients(self) -> list[str]:
        """Sorted ids."""
        return [check_patient_id(name) for name in sorted(self.files)]

    def fixed_splits(self) -> None:
        """There are none: patients are split by a seed or a file."""
        return None

    def facts(self) -> dict:
        """What the source adds to preprocessing.json."""
        digest = None if self.labels is None else self.labels.digest
        return {"orientation": "as in the files", "labels_sha256": digest}

    def problems(self, patient: str) -> list[str]:
        """Every problem of a patient in words; empty if it is good."""
        found = []
        for path, _, _ in self.files[patient]:
            try:
                self._read_checked(path)
            except InputError as error:
                found.append(str(error))
        indices = np.array([index for _, index, _ in self.files[patient]])
        if len(np.unique(indices)) < len(indices):
            found.append(f"{self.path}: {patient}: a slice occurs twice")
        if self.labels is not None and self.labels.lookup(patient, indices).max() < 0:
            found.append(f"{self.labels.path}: no label for any image of {patient}")
        return found

    def read(self, patient: str) -> PatientSlices:
        """Reads the images of a patient.

        Raises:
            InputError: The patient has a problem; the message names the file.
        """
        problems = self.problems(patient)
        if problems:
            raise InputError(problems[0])
        files = sorted(self.files[patient], key=lambda file: file[1])
        images = np.stack([to_square(self._read_checked(path), self.size) for path, _, _ in files])
        for channel in images.swapaxes(0, 1) if self.normalize != "none" else ():
            if (channel > 0).any():  # a picture may have nothing in one of its colours
                channel /= unit_intensity(channel, self.normalize)
        indices, labels = (np.array([file[i] for file in files], dtype=np.int64) for i in (1, 2))
        slices = PatientSlices(patient, images, labels, indices)
        return slices if self.labels is None else apply_labels(slices, self.labels)

    def _read_checked(self, path: Path) -> np.ndarray:
        image = read_image(path)
        if len(image) != len(self.modalities):
            raise InputError(f"{path}: {len(image)} channels, but other images have {len(self.modalities)}")
        return image

    def _class_folders(self, class_names) -> tuple[str, ...]:
        folders = sorted(f.name for f in self.path.iterdir() if f.is_dir() and not f.name.startswith("."))
        if class_names is None:
            folders.sort(key=lambda name: name != CLASS_NAMES[0])
        elif set(class_names) != set(folders):
            raise InputError(f"{self.path}: the sub-folders are {', '.join(folders)}, not {', '.join(class_names)}")
        names = tuple(class_names or folders)
        if len(names) < 2:
            raise InputError(f"{self.path}: at least two sub-folders are needed, one per class (or --labels)")
        return names

    def _list_files(self) -> dict[str, list[tuple[Path, int, int]]]:
        """(file, slice, class index) of every image, by patient."""
        found = {}
        folders = [self.path] if self.labels is not None else [self.path / name for name in self.class_names]
        for label, folder in enumerate(folders):
            images = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.name[0] != ".")
            if not images:
                raise InputError(f"{folder}: no {' or '.join(SUFFIXES)} file in it")
            for path in images:
                patient, _, index = path.stem.rpartition("_")
                files = found.setdefault(patient or path.stem, [])
                if not patient:
                    index = "0"
                files.append((path, int(index) if index.isdecimal() else len(files), label))
        return found


def read_image(path: Path) -> np.ndarray:
    """Reads a PNG or .npy file as float32 (C, H, W).

    Raises:
        InputError: The file is damaged, has another number of dimensions, or holds NaN.
    """
    try:
        values = np.load(path, allow_pickle=False) if path.suffix.lower() == ".npy" else _read_png(path)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise InputError(f"{path}: can't be read ({(str(error).splitlines() or ['damaged'])[0]})") from None
    if values.dtype.kind not in "uif" or values.ndim not in (2, 3) or not values.size:
        raise InputError(f"{path}: (H, W) or (C, H, W) numbers expected, found {values.dtype} {values.shape}")
    image = values.astype(np.float32)
    if values.dtype in (np.uint8, np.uint16):
        image /= np.iinfo(values.dtype).max
    if not np.isfinite(image).all():
        raise InputError(f"{path}: {int((~np.isfinite(image)).sum())} values are NaN or infinite")
    return image if image.ndim == 3 else image[None]


def _read_png(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path, formats=["PNG"]) as file:
        # Some versions of Pillow open 16-bit files as 32-bit integers.
        if file.mode.startswith("I"):
            return np.asarray(file, dtype=np.uint16)
        palette = {"1": "L", "P": "RGB", "PA": "RGBA"}
        values = np.asarray(file.convert(palette.get(file.mode, file.mode)))
    return values if values.ndim == 2 else np.moveaxis(values, -1, 0)


def to_square(image: np.ndarray, size: int) -> np.ndarray:
    """Pads (C, H, W) with 0 to a square, centred, and resamples it to (C, size, size)."""
    return resample_slices(image, (1.0, 1.0), size, float(max(image.shape[-2:])))
