"""The interface between `prepare` and a kind of data."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from diffusers_cf.data.geometry import check_geometry
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

    def __init__(self, path: str | Path, size: int, field_mm: float, normalize: str, labels: str | Path | None = None):
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
        """Read a patient without the labels file.

        Args:
            patient (`str`): id of the patient.
            problems (`list[str]`): the method appends every problem, one line each, except an `InputError` it raises.

        Returns:
            `PatientSlices` or `None`: the slices; None if there is a problem.
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

    def problems(self, patient: str) -> list[str]:
        """Return every problem of a patient, one line each."""
        return self.examine(patient)[1]

    def read(self, patient: str) -> PatientSlices:
        """Return the slices of a patient, or raise `InputError` for its first problem."""
        slices, problems = self.examine(patient)
        if problems:
            more = f" (and {len(problems) - 1} more; --check lists all)" if len(problems) > 1 else ""
            raise InputError(problems[0] + more)
        return slices

    def strata(self) -> dict[str, list[str]]:
        """Return groups of patients that a seeded split divides one by one, so that each split has all of them."""
        return {"all": self.patients()}

    def fixed_splits(self) -> dict[str, list[str]] | None:
        """Return the patients of each split, or None if a seed or a file decides."""
        return None

    def facts(self) -> dict:
        """Return what the source adds to preprocessing.json."""
        return {"labels_sha256": None if self.labels is None else sha256_of(self.labels.path)}


@contextmanager
def noting_errors(problems: list[str]) -> Iterator[None]:
    """Append the message of an `InputError` of the block to `problems`."""
    try:
        yield
    except InputError as error:
        problems.append(str(error))
