"""What `prepare` needs of a source of images."""

from pathlib import Path

from diffusers_cf.data.geometry import check_geometry
from diffusers_cf.data.labels import CLASS_NAMES, LabelTable, read_labels
from diffusers_cf.data.slices import PatientSlices


class Source:
    """A source of images; a subclass says which patients there are and reads one.

    Args:
        path (`str` or `Path`): the input.
        size (`int`): pixels along each side of a slice.
        field_mm (`float`): side of the square field that a slice shows, in mm.
        normalize (`str`): intensity scale (`intensity.py`).
        labels (`str` or `Path`, *optional*): CSV file of labels (`labels.py`).

    Attributes:
        name (`str`): value of `--source`.
        modalities (`tuple[str, ...]`): names of the channels.
        class_names (`tuple[str, ...]`): names of the classes, in the order of the labels.
        has_masks (`bool`): whether every patient has lesion masks.
        left_out (`dict[str, str]`): by patient that the source can't use, the reason.

    Raises:
        InputError: the geometry or the labels file can't be used.
    """

    name = ""
    modalities: tuple[str, ...] = ()
    class_names: tuple[str, ...] = CLASS_NAMES
    has_masks = True
    left_out: dict[str, str] = {}

    def __init__(self, path: str | Path, size: int, field_mm: float, normalize: str, labels: str | Path | None = None):
        check_geometry(size, field_mm, normalize)
        self.path, self.size, self.field_mm, self.normalize = Path(path), size, field_mm, normalize
        self.labels: LabelTable | None = None if labels is None else read_labels(labels, self.class_names)

    def patients(self) -> list[str]:
        """Return the sorted ids of all patients."""
        raise NotImplementedError

    def problems(self, patient: str) -> list[str]:
        """Return every problem of a patient, one line each; empty if there is none."""
        raise NotImplementedError

    def read(self, patient: str) -> PatientSlices:
        """Return the slices of a patient, or raise `InputError` for its first problem."""
        raise NotImplementedError

    def fixed_splits(self) -> dict[str, list[str]] | None:
        """Return the patients of each split, or None if a seed or a file is to choose."""
        return None

    def facts(self) -> dict:
        """Return what the source adds to preprocessing.json."""
        return {"labels_sha256": None if self.labels is None else self.labels.digest}
