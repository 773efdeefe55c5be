"""The sources of NIfTI scans, `brats` and `decathlon`, and the checks of one patient's scans."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from diffusers_cf.data.geometry import FIELD_MM, slices_from_volume
from diffusers_cf.data.intensity import DEFAULT_NORMALIZE
from diffusers_cf.data.labels import apply_labels
from diffusers_cf.data.nifti import (
    MODALITIES,
    Scan,
    canonical_modality,
    check_same_grid,
    find_file,
    find_modality_files,
    nifti_suffix,
    read_nifti,
    to_canonical,
)
from diffusers_cf.data.slices import PatientSlices
from diffusers_cf.data.source import Source
from diffusers_cf.errors import InputError, reading
from diffusers_cf.files import read_json


# A brain fills about half of its bounding box, and hardly any of the faces of one.
MAX_FOREGROUND = 0.6
MAX_FACE = 0.2
# Resampling with splines rings a little below 0; z-scored scans are negative in about half of their voxels.
MAX_NEGATIVE = 0.2


def check_patient_id(name: str) -> str:
    """Return the id if it is safe as a file name, else raise `InputError`."""
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or name.startswith("."):
        raise InputError(f"{name!r} can't be a patient's id: letters, digits, '.', '_' and '-' only")
    return name


def choose_modalities(path: Path, known: Sequence[str], wanted: Iterable[str]) -> tuple[str, ...]:
    """Return the canonical names of the modalities that become the channels.

    Raises:
        InputError: one of them is not known; the message names the file.
    """
    chosen = tuple(canonical_modality(name) for name in wanted)
    absent = [name for name in chosen if name not in known]
    if absent:
        raise InputError(f"{path}: no modality {', '.join(absent)} (there are {', '.join(known)})")
    return chosen


def scan_errors(modality: str, scan: Scan) -> list[str]:
    """Return what makes a modality unusable: it is empty or holds no raw intensities."""
    positive, negative = int((scan.data > 0).sum()), int((scan.data < 0).sum())
    if not positive:
        return [f"{scan.path}: {modality} is empty: no voxel above 0"]
    if negative > MAX_NEGATIVE * (positive + negative):
        share = round(100 * negative / (positive + negative))
        return [f"{scan.path}: {share} % of the voxels of {modality} are negative: intensities from 0 up are needed"]
    return []


def skull_warnings(modality: str, scan: Scan) -> list[str]:
    """Return a warning if a RAS scan seems not to be skull-stripped: tissue or noise fills the frame or its sides.

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
    """Return errors (ids that are no whole numbers from 0 up) and warnings (unknown ids) of a segmentation."""
    ids = np.unique(seg.data)
    wrong = ids[(ids != np.rint(ids)) | (ids < 0)]
    if wrong.size:
        return [f"{seg.path}: labels must be whole numbers from 0 up, found {wrong[0]:g}"], []
    unknown = [int(i) for i in ids if int(i) not in known_ids]
    if unknown:
        known = ", ".join(str(i) for i in sorted(known_ids))
        return [], [f"{seg.path}: unknown label ids {', '.join(map(str, unknown[:5]))} (known: {known})"]
    return [], []


@dataclass
class PatientScans:
    """The scans of one patient, RAS-canonical, and what could not be read."""

    scans: dict[str, Scan] = field(default_factory=dict)  # by modality
    seg: Scan | None = None
    has_seg: bool = False  # whether there is a file of it, readable or not
    errors: list[str] = field(default_factory=list)

    @contextmanager
    def noting_errors(self) -> Iterator[None]:
        """Append an `InputError` of the block to `errors`."""
        try:
            yield
        except InputError as error:
            self.errors.append(str(error))


class VolumeSource(Source):
    """Base of the NIfTI sources; a subclass implements `patients` and `load`.

    Args:
        path (`str` or `Path`): the folder with the data.
        size, field_mm, normalize, labels: as in [`Source`]; labels are needed where there are no masks.
        lenient (`bool`): accept patients that are only doubtful: not skull-stripped, unknown label ids.

    Raises:
        InputError: the folder or the labels file can't be used.
    """

    known_ids = frozenset(range(5))

    def __init__(
        self, path: str | Path, size: int = 128, field_mm: float = FIELD_MM, normalize: str = DEFAULT_NORMALIZE,
        labels: str | Path | None = None, lenient: bool = False,
    ):  # fmt: skip
        super().__init__(path, size, field_mm, normalize, labels)
        if normalize == "none":
            raise InputError("--normalize none: scanner units have no scale of their own, use median or p99")
        self.lenient = lenient

    def load(self, patient: str) -> PatientScans:
        """Read the files of a patient and note those that fail, without checking the content."""
        raise NotImplementedError

    def facts(self) -> dict:
        return super().facts() | ({"lenient": True} if self.lenient else {})

    def problems(self, patient: str) -> list[str]:
        return self._problems_of(patient, self.load(patient))

    def read(self, patient: str) -> PatientSlices:
        found = self.load(patient)
        problems = self._problems_of(patient, found)
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

    def _problems_of(self, patient: str, found: PatientScans) -> list[str]:
        """Return what could not be read and what is wrong with what was."""
        errors, warnings = found.errors, []
        for modality, scan in found.scans.items():
            of_scan = scan_errors(modality, scan)
            errors += of_scan
            warnings += [] if of_scan else skull_warnings(modality, scan)
        if found.seg is not None:
            of_seg, doubts = seg_problems(found.seg, self.known_ids)
            errors += of_seg
            warnings += doubts
        if not found.has_seg and self.labels is None:
            errors.append(f"{patient}: no segmentation, and no labels file instead of it (--labels)")
        elif not found.has_seg:
            # Without a readable scan the number of slices is unknown: any label of the patient is enough then.
            slices = self.labels.slices.get(patient, [-1])
            for scan in found.scans.values():
                slices = range(scan.data.shape[2])
            if self.labels.lookup(patient, slices).max() < 0:
                path = self.labels.path
                errors.append(f"{path}: no label for any slice of {patient}, which has no segmentation")
        with found.noting_errors():
            check_same_grid([*found.scans.values(), *([] if found.seg is None else [found.seg])])
        return errors + ([] if self.lenient else warnings)


class BratsSource(VolumeSource):
    """Patients in BraTS layout: one folder per patient, one NIfTI file per modality.

        FOLDER/PATIENT/PATIENT_{t1,t1ce,t2,flair,seg}.nii.gz        BraTS up to 2021
        FOLDER/PATIENT/PATIENT-{t1n,t1c,t2w,t2f,seg}.nii.gz         BraTS from 2023

    Only the end of a file's name counts, in any case. Any orientation is read; any label id above 0 is lesion.

    Args:
        path (`str` or `Path`): the folder that holds a folder per patient.
        modalities (`Iterable[str]`): which modalities become the channels, in this order.
        **options: as in [`VolumeSource`].
    """

    name = "brats"

    def __init__(self, path: str | Path, modalities: Iterable[str] = MODALITIES, **options):
        super().__init__(path, **options)
        self.modalities = tuple(canonical_modality(modality) for modality in modalities)
        # Without a labels file a missing segmentation is a problem of its patient, not of the data set.
        self.has_masks = self.labels is None or all(
            find_file(self.path / patient, "seg") is not None for patient in self.patients()
        )

    def patients(self) -> list[str]:
        with reading(self.path, "folder"):
            files = sorted(self.path.iterdir())
        folders = [file.name for file in files if file.is_dir() and not file.name.startswith(".")]
        if not folders:
            scans = any(nifti_suffix(file.name) for file in files)
            hint = "it holds scans itself: give the folder above it" if scans else "no folder per patient in it"
            raise InputError(f"{self.path}: {hint}")
        return folders

    def load(self, patient: str) -> PatientScans:
        folder, found = self.path / patient, PatientScans()
        for modality in self.modalities:
            with found.noting_errors():
                path = find_modality_files(folder, [modality])[modality]
                found.scans[modality] = to_canonical(read_nifti(path))
        with found.noting_errors():
            path = find_file(folder, "seg")
            found.has_seg = path is not None
            found.seg = to_canonical(read_nifti(path)) if found.has_seg else None
        return found


class DecathlonSource(VolumeSource):
    """Patients of Task01_BrainTumour of the Medical Segmentation Decathlon, or of another task in its layout.

    FOLDER/dataset.json, FOLDER/imagesTr/PATIENT.nii.gz (4-D: one volume per modality), FOLDER/labelsTr/PATIENT.nii.gz

    Args:
        path (`str` or `Path`): the folder with dataset.json.
        modalities (`Iterable[str]`, *optional*): which of the file's modalities become the channels, in this order; by
            default all that dataset.json names, in the order flair, t1, t1ce, t2.
        **options: as in [`VolumeSource`].

    Raises:
        InputError: dataset.json can't be used, or a modality is not in it.
    """

    name = "decathlon"

    def __init__(self, path: str | Path, modalities: Iterable[str] | None = None, **options):
        super().__init__(path, **options)
        self.index = self.path / "dataset.json"
        described = read_json(self.index)
        with reading(self.index, "dataset.json of the Decathlon"):
            channels = sorted(described["modality"].items(), key=lambda item: int(item[0]))
            self.channels = [canonical_modality(name) for _, name in channels]
            self.entries = {
                Path(entry["image"]).name.removesuffix(".gz").removesuffix(".nii"): entry
                for entry in described["training"]
            }
            self.known_ids = frozenset(int(i) for i in described.get("labels") or range(5))
        if not self.entries:
            raise InputError(f"{self.index}: its training list is empty")
        self.modalities = choose_modalities(self.index, self.channels, modalities or sorted(self.channels))
        self.has_masks = self.labels is None or all(self._has_mask(entry) for entry in self.entries.values())

    def patients(self) -> list[str]:
        return sorted(self.entries)

    def load(self, patient: str) -> PatientScans:
        entry, found = self.entries[patient], PatientScans()
        with found.noting_errors():
            image = to_canonical(read_nifti(self._inside(entry["image"]), dimensions=4))
            if image.data.shape[3] != len(self.channels):
                raise InputError(
                    f"{image.path}: {image.data.shape[3]} volumes, but {self.index.name} names "
                    f"{len(self.channels)} modalities ({', '.join(self.channels)})"
                )
            for modality in self.modalities:
                found.scans[modality] = replace(image, data=image.data[..., self.channels.index(modality)])
        with found.noting_errors():
            # With a labels file a segmentation may be missing; without one, the missing file is an error.
            if self._has_mask(entry) or (entry.get("label") and self.labels is None):
                found.has_seg = True
                found.seg = to_canonical(read_nifti(self._inside(entry["label"])))
        return found

    def _has_mask(self, entry: dict) -> bool:
        return bool(entry.get("label")) and self._inside(entry["label"]).is_file()

    def _inside(self, name: str) -> Path:
        """Return the path of an entry of dataset.json; refuse one that leads out of the folder."""
        path = self.path / name
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise InputError(f"{self.index}: {name} lies outside {self.path}")
        return path
