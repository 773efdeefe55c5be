"""The sources of NIfTI scans, `brats` and `decathlon`, and the checks of one patient's scans."""

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from diffusers_cf.data.geometry import outside_field, slices_from_volume
from diffusers_cf.data.intensity import DEFAULT_NORMALIZE, intensity_problem
from diffusers_cf.data.nifti import (
    ALIASES,
    MODALITIES,
    Scan,
    canonical_modality,
    check_same_grid,
    find_modality_file,
    nifti_suffix,
    read_nifti,
    to_canonical,
)
from diffusers_cf.data.slices import PatientSlices
from diffusers_cf.data.source import Source, noting_errors
from diffusers_cf.errors import InputError, reading
from diffusers_cf.files import read_json


# A brain fills about half of its bounding box, and hardly any of the faces of one.
MAX_FOREGROUND = 0.6
MAX_FACE = 0.2
MOST_OUTSIDE = 1e-3  # share of the foreground that may lie outside the field


def check_patient_id(name: str) -> str:
    """Return the id, or raise `InputError` if it is not safe as a file name."""
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or name.startswith("."):
        raise InputError(f"{name!r} can't be a patient's id: letters, digits, '.', '_' and '-' only")
    return name


def choose_modalities(path: Path, known: Sequence[str], wanted: Iterable[str]) -> tuple[str, ...]:
    """Return the canonical names of the modalities that become the channels; raise `InputError` if one is unknown."""
    chosen = tuple(canonical_modality(name) for name in wanted)
    if absent := [name for name in chosen if name not in known]:
        raise InputError(f"{path}: no modality {', '.join(absent)} (there are {', '.join(known)})")
    return chosen


def scan_warnings(modality: str, scan: Scan) -> list[str]:
    """Return a warning if tissue or noise fills a RAS scan's frame or its sides: it seems not to be skull-stripped.

    Only the left, right, anterior and posterior sides count. A slab of a brain fills the other two.

    Raises:
        InputError: the scan is empty or its intensities are not raw.
    """
    if problem := intensity_problem(scan.data, DEFAULT_NORMALIZE):
        raise InputError(f"{scan.path}: {modality}: {problem}")
    foreground = scan.data > 0
    share = foreground.mean()
    face = np.mean([foreground[0].mean(), foreground[-1].mean(), foreground[:, 0].mean(), foreground[:, -1].mean()])
    if share <= MAX_FOREGROUND and face <= MAX_FACE:
        return []
    return [
        f"{scan.path}: {modality} seems not to be skull-stripped, or its background is not 0 "
        f"({round(100 * share)} % of all voxels and {round(100 * face)} % of those at the frame's sides are above 0)"
    ]


def field_warnings(patient: str, foreground: np.ndarray, spacing_mm: Sequence[float], field_mm: float) -> list[str]:
    """Return a warning if more than 0.1 % of a patient's foreground lies outside the field that the network sees."""
    share = outside_field(foreground, spacing_mm, field_mm)
    if share <= MOST_OUTSIDE:
        return []
    return [
        f"{patient}: {100 * share:.1f} % of the foreground lies outside the central field of {field_mm:g} mm and is not"
        " looked at: crop the scan around the brain"
    ]


def seg_problems(seg: Scan, known_ids: frozenset[int]) -> tuple[list[str], list[str]]:
    """Return the errors (ids that are not whole numbers from 0 up) and warnings (unknown ids) of a segmentation.

    Ids within 1e-3 of a whole number are that number: header scaling and resampling leave 0.9999999.
    """
    values = np.unique(seg.data).astype(np.float64)
    wrong = values[(np.abs(values - np.rint(values)) > 1e-3) | (np.rint(values) < 0)]
    if wrong.size:
        return [f"{seg.path}: labels must be whole numbers from 0 up, found {wrong[0]:.6g}"], []
    unknown = sorted({int(i) for i in np.rint(values)} - known_ids)
    found, known = (", ".join(map(str, some)) for some in (unknown[:5], sorted(known_ids)))
    return [], [f"{seg.path}: unknown label ids {found} (known: {known})"] if unknown else []


class VolumeSource(Source):
    """Base of the NIfTI sources.

    A subclass implements `patients`; `read_scans(patient, problems)`, which returns the RAS scans by modality without
    those that can't be read, and notes why in `problems`; and `seg_file(patient)`, which returns a path or None.

    Args:
        path (`str` or `Path`): the folder with the data.
        lenient (`bool`): accept scans that seem not to be skull-stripped, and unknown label ids.
        **options: as in [`Source`]; patients without a segmentation require labels.
    """

    known_ids = frozenset(range(5))

    def __init__(self, path: str | Path, lenient: bool = False, **options):
        super().__init__(path, **options)
        if self.normalize == "none":
            raise InputError("--normalize none: scanner units have no common scale, use median or p99")
        self.lenient = lenient

    @functools.cached_property
    def has_masks(self) -> bool:
        # Without a labels file a missing segmentation is a problem of its patient, not of the data set.
        return self.labels is None or all(self.seg_file(patient) is not None for patient in self.patients())

    def facts(self) -> dict:
        return super().facts() | ({"lenient": True} if self.lenient else {})

    def load(self, patient: str, problems: list[str]) -> PatientSlices | None:
        scans, seg, doubts = self.read_scans(patient, problems), None, []
        for modality, scan in scans.items():
            with noting_errors(problems):
                doubts += scan_warnings(modality, scan)
        with noting_errors(problems):
            path = self.seg_file(patient)
            if path is not None:
                seg = to_canonical(read_nifti(path))
                errors, unknown_ids = seg_problems(seg, self.known_ids)
                problems += errors
                doubts += unknown_ids
            elif self.labels is None:
                raise InputError(f"{patient}: no segmentation, and no labels file instead of it (--labels)")
        with noting_errors(problems):
            check_same_grid([*scans.values(), *([] if seg is None else [seg])])
        if not problems:
            volume = np.stack([scans[name].data for name in self.modalities])
            spacing = scans[self.modalities[0]].spacing_mm
            doubts += field_warnings(patient, (volume > 0).any(axis=0), spacing, self.field_mm)
        problems += [] if self.lenient else doubts
        if problems:
            return None
        mask = None if seg is None else np.rint(seg.data)
        return slices_from_volume(patient, volume, mask, spacing, self.size, self.field_mm, self.normalize)


class BratsSource(VolumeSource):
    """Patients in BraTS layout: one folder per patient, one NIfTI file per modality.

        FOLDER/PATIENT/PATIENT_{t1,t1ce,t2,flair,seg}.nii.gz        BraTS up to 2021
        FOLDER/PATIENT/PATIENT-{t1n,t1c,t2w,t2f,seg}.nii.gz         BraTS from 2023

    Only the end of a file's name counts, in upper or lower case. Any orientation is read. Every label id above 0 is
    lesion.

    Args:
        path (`str` or `Path`): the folder that holds a folder per patient.
        modalities (`Iterable[str]`): the modalities to use as channels, in this order.
        **options: as in [`VolumeSource`].
    """

    name = "brats"

    def __init__(self, path: str | Path, modalities: Iterable[str] = MODALITIES, **options):
        super().__init__(path, **options)
        self.modalities = tuple(canonical_modality(modality) for modality in modalities)

    def patients(self) -> list[str]:
        with reading(self.path, "folder"):
            files = sorted(self.path.iterdir())
        folders = [file.name for file in files if file.is_dir() and not file.name.startswith(".")]
        if not folders:
            scans = any(nifti_suffix(file.name) for file in files)
            hint = "it holds scans itself: give the folder above it" if scans else "no folder per patient in it"
            raise InputError(f"{self.path}: {hint}")
        return folders

    def read_scans(self, patient: str, problems: list[str]) -> dict[str, Scan]:
        scans = {}
        for modality in self.modalities:
            with noting_errors(problems):
                path = find_modality_file(self.path / patient, modality)
                if path is None:
                    names = ", ".join(ALIASES.get(modality, (modality,)))
                    raise InputError(f"{self.path / patient}: modality missing: {modality} (names end in {names})")
                scans[modality] = to_canonical(read_nifti(path))
        return scans

    def seg_file(self, patient: str) -> Path | None:
        return find_modality_file(self.path / patient, "seg")


class DecathlonSource(VolumeSource):
    """Patients of Task01_BrainTumour of the Medical Segmentation Decathlon, or of another task in its layout.

    FOLDER/dataset.json, FOLDER/imagesTr/PATIENT.nii.gz (4-D: one volume per modality), FOLDER/labelsTr/PATIENT.nii.gz

    Args:
        path (`str` or `Path`): the folder with dataset.json.
        modalities (`Iterable[str]`, *optional*): the modalities to use as channels, in this order; by default all of
            dataset.json, in alphabetical order: flair, t1, t1ce, t2.
        **options: as in [`VolumeSource`].
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

    def patients(self) -> list[str]:
        return sorted(self.entries)

    def read_scans(self, patient: str, problems: list[str]) -> dict[str, Scan]:
        image = to_canonical(read_nifti(self._inside(self.entries[patient]["image"]), dimensions=4))
        count = image.data.shape[3]
        if count != len(self.channels):
            names = f"{len(self.channels)} modalities ({', '.join(self.channels)})"
            raise InputError(f"{image.path}: {count} volumes, but {self.index.name} names {names}")
        return {name: replace(image, data=image.data[..., self.channels.index(name)]) for name in self.modalities}

    def seg_file(self, patient: str) -> Path | None:
        name = self.entries[patient].get("label")
        # With a labels file the segmentation may be missing; without one, reading the missing file is an error.
        return self._inside(name) if name and (self.labels is None or self._inside(name).is_file()) else None

    def _inside(self, name: str) -> Path:
        """Return the path of an entry of dataset.json; refuse one that leads out of the folder."""
        path = self.path / name
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise InputError(f"{self.index}: {name} lies outside {self.path}")
        return path
