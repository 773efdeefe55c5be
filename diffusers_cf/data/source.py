"""The interface between `prepare` and a kind of data."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from diffusers_cf.data.geometry import FIELD_MM, check_geometry
from diffusers_cf.data.intensity import DEFAULT_NORMALIZE
from diffusers_cf.data.labels import CLASS_NAMES, LabelTable, apply_labels, read_labels
from diffusers_cf.data.slices import PatientSlices
from diffusers_cf.errors import InputError
from diffusers_cf.loading import sha256_of


class Source:
    """A kind of data. A subclass implements `patients` and `load`.

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
        left_out (`dict[str, str]`): patients that the source can't use, with the reason.
        unused (`list[str]`): files and rows of the labels file that it does not use.
        summary (`list[str]`): lines that say what it found.

    Raises:
        InputError: the geometry or the labels file can't be used.
    """

    name = ""
    modalities: tuple[str, ...] = ()
    class_names: tuple[str, ...] = CLASS_NAMES
    has_masks = True
    left_out: dict[str, str] = {}

    def __init__(
        self, path: str | Path, size: int = 128, field_mm: float = FIELD_MM, normalize: str = DEFAULT_NORMALIZE,
        labels: str | Path | None = None,
    ):  # fmt: skip
        check_geometry(size, field_mm, normalize)
        self.unused, self.summary = [], []
        self.path, self.size, self.field_mm, self.normalize = Path(path), size, field_mm, normalize
        self.labels: LabelTable | None = None if labels is None else read_labels(labels, self.class_names)

    def check_labels(self) -> None:
        """Note the rows of the labels file whose patient there is not; raise `InputError` if that is every row."""
        if self.labels is None:
            return
        known, named = {*self.patients(), *self.left_out}, {patient for patient, _ in self.labels.classes}
        if not named & known:
            examples = f"{min(named, default='no row')}, and the patients are {', '.join(sorted(known)[:3])}, .."
            raise InputError(f"{self.labels.path}: no row is about a patient of {self.path}: it names {examples}")
        self.unused += [f"{self.labels.path.name}: rows of {patient}" for patient in sorted(named - known)]

    def patients(self) -> list[str]:
        """Return the sorted ids of all patients."""
        raise NotImplementedError

    def load(self, patient: str, problems: list[str]) -> PatientSlices | None:
        """Read a patient without the labels file; return None if there is a problem.

        Every problem is appended to `problems`, one line each, except an `InputError` that the method raises.
        """
        raise NotImplementedError

    def examine(self, patient: str) -> tuple[PatientSlices | None, list[str]]:
        """Return the slices of a patient and its problems; the slices are usable only if there is no problem."""
        slices, problems = None, []
        with noting_errors(problems):
            slices = self.load(patient, problems)
            if slices is not None and self.labels is not None:
                slices = apply_labels(slices, self.labels)
            if slices is not None and not self.has_masks:
                slices = replace(slices, masks=None)
        return slices, problems

    def read(self, patient: str) -> PatientSlices:
        """Return the slices of a patient, or raise `InputError` for its first problem."""
        slices, problems = self.examine(patient)
        if problems:
            raise InputError(in_brief(problems))
        return slices

    def fixed_splits(self) -> dict[str, list[str]] | None:
        """Return the patients of each split, or None if a seed or a file decides."""
        return None

    def facts(self) -> dict:
        """Return what the source adds to preprocessing.json."""
        return {"labels_sha256": None if self.labels is None else sha256_of(self.labels.path)}


def in_brief(problems: list[str]) -> str:
    """Return the first problem of a patient, and how many more there are."""
    return problems[0] + (f" (and {len(problems) - 1} more; --check lists all)" if problems[1:] else "")


@contextmanager
def noting_errors(problems: list[str]) -> Iterator[None]:
    """Append the message of an `InputError` of the block to `problems`."""
    try:
        yield
    except InputError as error:
        problems.append(str(error))
