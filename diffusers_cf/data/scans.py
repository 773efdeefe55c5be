"""What the sources of NIfTI scans share: the checks of one patient and the way to slices."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from diffusers_cf.data.geometry import FIELD_MM, check_geometry, slices_from_volume
from diffusers_cf.data.intensity import DEFAULT_NORMALIZE
from diffusers_cf.data.labels import CLASS_NAMES, apply_labels, read_labels
from diffusers_cf.data.nifti import Scan, check_same_grid
from diffusers_cf.data.slices import PatientSlices
from diffusers_cf.errors import InputError


# A brain fills about half of its bounding box, and hardly any of the faces of one.
MAX_FOREGROUND = 0.6
MAX_FACE = 0.2
# Resampling with splines rings a little below 0; z-scored scans are negative in about half of their voxels.
MAX_NEGATIVE = 0.2


@dataclass
class PatientScans:
    """The scans of one patient, as read and checked.

    Attributes:
        scans: RAS-canonical scans, by modality.
        seg: RAS-canonical segmentation, or None.
        seg_path: Its file, also where it could not be read; None if there is none.
        errors: What makes the patient unusable, in words.
        warnings: What makes it doubtful: not skull-stripped, unknown label ids.
    """

    scans: dict[str, Scan] = field(default_factory=dict)
    seg: Scan | None = None
    seg_path: Path | None = None
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check_patient_id(name: str) -> str:
    """Returns the id if it is safe as a file name, else raises InputError."""
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or name.startswith("."):
        raise InputError(f"{name!r} can't be a patient's id: letters, digits, '.', '_' and '-' only")
    return name


def scan_errors(modality: str, scan: Scan) -> list[str]:
    """What makes a modality unusable: empty, or not raw intensities."""
    positive, negative = int((scan.data > 0).sum()), int((scan.data < 0).sum())
    if not positive:
        return [f"{scan.path}: {modality} is empty: no voxel above 0"]
    if negative > MAX_NEGATIVE * (positive + negative):
        share = round(100 * negative / (positive + negative))
        return [f"{scan.path}: {share} % of the voxels of {modality} are negative: intensities from 0 up are needed"]
    return []


def skull_warnings(modality: str, scan: Scan) -> list[str]:
    """Says if a scan (RAS) seems not to be skull-stripped: the frame is full, or tissue or noise fills its sides.

    Only the left, right, anterior and posterior sides count: a slab of a brain fills the other two.
    """
    foreground = scan.data > 0
    share = foreground.mean()
    face = np.mean([foreground[0].mean(), foreground[-1].mean(), foreground[:, 0].mean(), foreground[:, -1].mean()])
    if share <= MAX_FOREGROUND and face <= MAX_FACE:
        return []
    return [
        f"{scan.path}: {modality} seems not to be skull-stripped, or its background is not 0 "
        f"({round(100 * share)} % of all voxels and {round(100 * face)} % of those at the frame's sides are above 0)"
    ]


def seg_problems(seg: Scan, known_ids: frozenset[int]) -> tuple[list[str], list[str]]:
    """Errors and warnings of a segmentation: fractions are an error, ids nobody declared a warning."""
    ids = np.unique(seg.data)
    if (ids != np.rint(ids)).any() or ids[0] < 0:
        worst = ids[(ids != np.rint(ids)) | (ids < 0)][0]
        return [f"{seg.path}: labels must be whole numbers from 0 up, found {worst:g}"], []
    unknown = [int(i) for i in ids if int(i) not in known_ids]
    if unknown:
        known = ", ".join(str(i) for i in sorted(known_ids))
        return [], [f"{seg.path}: unknown label ids {', '.join(map(str, unknown[:5]))} (known: {known})"]
    return [], []


class VolumeSource:
    """Base of the NIfTI sources; a subclass says which patients there are and loads their scans.

    Args:
        path: The folder with the data.
        size: Pixels along each side of a slice.
        field_mm: Side of the square in-plane field in mm, centred on the scan's frame.
        normalize: Intensity scale (`diffusers_cf.data.intensity`).
        labels: CSV file of labels (`diffusers_cf.data.labels`); needed where there are no masks.
        lenient: Accept patients that are only doubtful: not skull-stripped, unknown label ids.

    Raises:
        InputError: The folder or the labels file can't be used.
    """

    name = ""
    modalities: tuple[str, ...] = ()
    class_names = CLASS_NAMES
    known_ids = frozenset(range(5))

    def __init__(
        self,
        path: str | Path,
        size: int = 128,
        field_mm: float = FIELD_MM,
        normalize: str = DEFAULT_NORMALIZE,
        labels: str | Path | None = None,
        lenient: bool = False,
    ):
        check_geometry(size, field_mm, normalize)
        self.path = Path(path)
        if not self.path.is_dir():
            raise InputError(f"{path}: no such folder")
        self.size, self.field_mm, self.normalize, self.lenient = size, field_mm, normalize, lenient
        self.labels = None if labels is None else read_labels(labels, self.class_names)
        self.has_masks = True

    def patients(self) -> list[str]:
        """Sorted ids of all patients."""
        raise NotImplementedError

    def load(self, patient: str) -> PatientScans:
        """Reads what is there and notes what is not, without checking the content."""
        raise NotImplementedError

    def fixed_splits(self) -> None:
        """There are none: patients are split by a seed or a file."""
        return None

    def facts(self) -> dict:
        """What the source adds to preprocessing.json."""
        facts = {"labels_sha256": None if self.labels is None else self.labels.digest}
        return facts | ({"lenient": True} if self.lenient else {})

    def inspect(self, patient: str) -> PatientScans:
        """Loads and checks a patient."""
        found = self.load(patient)
        for modality, scan in found.scans.items():
            errors = scan_errors(modality, scan)
            found.errors += errors
            found.warnings += [] if errors else skull_warnings(modality, scan)
        if found.seg is not None:
            errors, warnings = seg_problems(found.seg, self.known_ids)
            found.errors += errors
            found.warnings += warnings
        if found.seg_path is None:
            found.errors += self._label_errors(patient, found)
        grids = [*found.scans.values(), *([] if found.seg is None else [found.seg])]
        try:
            check_same_grid(grids)
        except InputError as error:
            found.errors.append(str(error))
        return found

    def _label_errors(self, patient: str, found: PatientScans) -> list[str]:
        """What is wrong with the labels of a patient without a segmentation."""
        if self.labels is None:
            return [f"{patient}: no segmentation, and no labels file instead of it (--labels)"]
        depth = max((scan.data.shape[2] for scan in found.scans.values()), default=0)
        if patient in self.labels.names() and (not depth or self.labels.lookup(patient, np.arange(depth)).max() >= 0):
            return []
        return [f"{self.labels.path}: no label for any slice of {patient}, which has no segmentation"]

    def problems(self, patient: str) -> list[str]:
        """Every problem of a patient in words; empty if it is good."""
        found = self.inspect(patient)
        return found.errors + ([] if self.lenient else found.warnings)

    def read(self, patient: str) -> PatientSlices:
        """Reads a patient and cuts it into slices.

        Raises:
            InputError: The patient has a problem; the message is the first one.
        """
        found = self.inspect(patient)
        problems = found.errors + ([] if self.lenient else found.warnings)
        if problems:
            more = f" (and {len(problems) - 1} more; --check lists all)" if len(problems) > 1 else ""
            raise InputError(problems[0] + more)
        volume = np.stack([found.scans[modality].data for modality in self.modalities])
        spacing = found.scans[self.modalities[0]].spacing_mm
        mask = None if found.seg is None else found.seg.data
        slices = slices_from_volume(patient, volume, mask, spacing, self.size, self.field_mm, self.normalize)
        if self.labels is not None:
            slices = apply_labels(slices, self.labels)
        return slices if self.has_masks else replace(slices, masks=None)
