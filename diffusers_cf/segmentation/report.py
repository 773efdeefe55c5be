"""`diffusers-cf report`: what `segment` found in one patient or a cohort, as one page that opens without a network."""

import argparse
import base64
import itertools
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from tqdm.auto import tqdm

from diffusers_cf.data.nifti import Scan, check_same_grid, find_file, read_nifti, to_canonical
from diffusers_cf.data.scans import scan_errors
from diffusers_cf.errors import InputError
from diffusers_cf.files import make_folder, new_file
from diffusers_cf.loading import sha256_of
from diffusers_cf.segmentation.cohorts import find_patients
from diffusers_cf.segmentation.dicom import find_series, read_series, series_sha256
from diffusers_cf.segmentation.results import REPORT, own_file, read_preview, read_report, read_summary


COLUMNS = ("Patient", "Lesion, ml", "Slices with lesion", "Largest, mm²", "Highest heat", "Threshold")


@dataclass
class PatientReport:
    """What the page says about one patient.

    Attributes:
        name: Id.
        volume_ml: Of the mask.
        n_slices: How many slices the model has seen.
        lesion_slices: The axial slices with lesion, as ranges; 0 is the lowest of the scan.
        n_lesion_slices: How many.
        largest_slice: The one with most of it.
        largest_mm2: And how much.
        threshold: From which heat on a voxel is lesion.
        max_heat: The highest heat.
        dice: With the expert's mask; None without one.
        model: Name and fingerprint.
        settings: In words.
        postprocessed: Whether the mask is that of the post-processed heat.
        heat: RAS-canonical.
        scan: What the heat is shown over, RAS-canonical.
        background: What that is.
        preview: preview.png in base 64.
        viewer: A page of its own to scroll through.
    """

    name: str
    volume_ml: float
    n_slices: int
    lesion_slices: str
    n_lesion_slices: int
    largest_slice: int
    largest_mm2: float
    threshold: float
    max_heat: float
    dice: float | None
    model: str
    settings: str
    postprocessed: bool
    heat: Scan
    scan: Scan
    background: str
    preview: str
    viewer: str = ""


def read_patient(folder: Path, scans: Mapping[str, Path]) -> PatientReport:
    """Reads what `segment` has written about a patient, or somebody else has put in its place.

    Args:
        folder: `OUT/PATIENT`.
        scans: Folders of scans by patient; one that is not among them is shown over its counterfactual.

    Raises:
        InputError: A file is missing or damaged, a link or not what `segment` writes, or the scans are not those that
            were segmented.
    """
    facts = read_report(folder)
    heat, mask = (to_canonical(read_nifti(own_file(folder, f"{name}.nii.gz"))) for name in ("heatmap", "mask"))
    check_same_grid([heat, mask])
    foreign = mask.data[(mask.data != 0) & (mask.data != 1)]
    if foreign.size:
        raise InputError(f"{mask.path}: holds {foreign[0]:g}: a mask of segment holds 0 and 1 alone")
    scan, background = _background(folder, facts, scans.get(facts["patient"]))
    check_same_grid([heat, scan])
    lesion_mm2 = (mask.data > 0).sum(axis=(0, 1)) * float(mask.spacing_mm[0] * mask.spacing_mm[1])
    return PatientReport(
        name=facts["patient"],
        volume_ml=facts["lesion_volume_ml"],
        n_slices=facts["n_slices"],
        lesion_slices=ranges(np.flatnonzero(lesion_mm2).tolist()),
        n_lesion_slices=int((lesion_mm2 > 0).sum()),
        largest_slice=int(lesion_mm2.argmax()),
        largest_mm2=float(lesion_mm2.max()),
        threshold=facts["threshold"],
        max_heat=float(heat.data.max()),
        dice=facts.get("dice"),
        model=f"{Path(facts['model']).name}, SHA-256 {facts['model_sha256'][:12]}",
        settings=_in_words(facts),
        postprocessed=facts["postprocessed"],
        heat=heat,
        scan=scan,
        background=background,
        preview=base64.b64encode(read_preview(folder)).decode(),
    )


def _background(folder: Path, facts: dict, scans: Path | None) -> tuple[Scan, str]:
    """The first modality of the scan itself, or else its counterfactual; and what it is."""
    modality = next(name for name in facts["inputs"] if name != "seg")
    if scans is None:
        name = f"the counterfactual of {modality}"
        scan = read_nifti(own_file(folder, f"counterfactual_{modality}.nii.gz"))
        shown = f"{name} (--scans shows the scan itself)"
    else:
        path = find_file(scans, modality) or find_series(scans, modality)
        is_folder = path is not None and path.is_dir()
        if path is None or (series_sha256 if is_folder else sha256_of)(path) != facts["inputs"][modality]:
            raise InputError(f"{scans}: its {modality} is not the one that was segmented as {facts['patient']}")
        scan, name, shown = (read_series if is_folder else read_nifti)(path), modality, modality
    if errors := scan_errors(name, scan):
        raise InputError(errors[0])
    return to_canonical(scan), shown


def _in_words(facts: dict) -> str:
    values = facts["settings"]
    chain = "post-processed" if facts["postprocessed"] else "not post-processed"
    return (
        f"w = {values['guidance_scale']:g}, L = {values['strength']:g}, {values['num_inference_steps']} steps,"
        f" map {values['map']}, {chain}"
    )


def ranges(numbers: Sequence[int]) -> str:
    """Rising numbers in words: 3, 4, 5, 9 is `3 to 5, 9`."""
    runs = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    found = [[number for _, number in run] for _, run in runs]
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in found)


def volume_viewer(patient: PatientReport, vmax: float) -> str:
    """A page to scroll through the heat over the scan, from the threshold to `vmax`, made by nilearn.

    Raises:
        InputError: nilearn is not installed.
    """
    try:
        from nilearn.plotting import view_img
    except ImportError:
        raise InputError("report needs nilearn: pip install 'diffusers_cf[phantom]'") from None
    heat, scan = (nibabel.Nifti1Image(s.data.astype(np.float32), s.affine) for s in (patient.heat, patient.scan))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an empty map, and that several views are open
            view = view_img(
                heat, bg_img=scan, threshold=patient.threshold, vmax=vmax, cmap="inferno", symmetric_cmap=False,
                black_bg=True, opacity=0.6, width_view=900, title=patient.name,
            )  # fmt: skip
    except Exception as error:  # whatever it likes about a geometry or a scale that it can't show
        raise InputError(f"{patient.heat.path}: no viewer shows it ({error})") from None
    # the one thing that it would fetch
    return re.sub(r"<link[^>]*favicon[^>]*>", "", view.html)


def add_viewers(patients: Sequence[PatientReport]) -> tuple[list[PatientReport], list[str], float]:
    """Fills in `viewer`, on one scale of colours, so that patients compare.

    Returns:
        The patients that have one, a line for each of the others, and the heat that has the brightest colour.
    """
    vmax = max(float(np.percentile(p.heat.data[p.heat.data > 0], 99.5)) if p.max_heat > 0 else 0 for p in patients)
    vmax = max(vmax, 1.5 * max(p.threshold for p in patients))
    shown, failures = [], []
    for patient in tqdm(patients, desc="Viewers", unit="patient"):
        try:
            patient.viewer = volume_viewer(patient, vmax)
            shown.append(patient)
        except InputError as error:
            failures.append(" ".join(str(error).split()))
    return shown, failures, vmax


def write_report(
    patients: Sequence[PatientReport], failures: Sequence[str], unsegmented: Sequence[str], vmax: float, output: Path
) -> None:
    """Writes the page, whole or not at all.

    Args:
        patients: In the order of the table, with their viewers.
        failures: Lines about patients that can't be shown.
        unsegmented: Lines about patients that `segment` failed on.
        vmax: The heat that has the brightest colour in the viewers.
        output: An .html file.

    Raises:
        InputError: It can't be written.
    """
    from jinja2 import Environment, PackageLoader

    with_dice = any(patient.dice is not None for patient in patients)
    columns = [*COLUMNS, *(["Dice"] if with_dice else []), "Settings"]
    title = f"Lesions of {patients[0].name}" if len(patients) == 1 else f"Lesions of {len(patients)} patients"
    template = Environment(loader=PackageLoader("diffusers_cf"), autoescape=True, trim_blocks=True).get_template(
        "report.html"
    )
    page = template.render(
        title=title, columns=columns, patients=patients, failures=failures, unsegmented=unsegmented,
        with_dice=with_dice, vmax=vmax, numeric_columns=len(columns) - 1,
    )  # fmt: skip
    try:
        with new_file(output) as temporary:
            # a foreign name may hold what is no character
            temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise InputError(f"{output}: can't be written ({error.strerror or error})") from None


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `diffusers-cf report`."""
    add = parser.add_argument
    add("folders", nargs="+", metavar="OUT", help="what segment has written: of one patient, or of many")
    add("--output", required=True, metavar="REPORT.html")
    add(
        "--scans",
        nargs="+",
        metavar="FOLDER",
        default=[],
        help="patients or cohorts that were segmented, to show them",
    )


def run_report(args: argparse.Namespace) -> int:
    """Writes the page; a patient that can't be read is named in it, and does not stop the others.

    Returns:
        0, or 2 if a patient could not be read.

    Raises:
        InputError: There is nothing to report, or the output can't be written.
    """
    output = Path(args.output)
    if output.suffix != ".html" or output.is_dir():
        raise InputError(f"{output}: the output must be a file REPORT.html")
    folders = [folder for given in args.folders for folder in _finished(Path(given))]
    (scans, failures), patients = _scans(args.scans, folders), []
    unsegmented = _unsegmented(args.folders, failures)
    for folder in tqdm(folders, desc="Patients", unit="patient"):
        try:
            if folder.is_symlink() and folder not in map(Path, args.folders):  # it could lead to anybody's patient
                raise InputError(f"{folder}: a link: give the folder that it leads to")
            patients.append(read_patient(folder, scans))
        except InputError as error:
            failures.append(" ".join(str(error).split()))
    if patients:
        patients, without_viewer, vmax = add_viewers(patients)
        failures += without_viewer
    if not patients:
        raise InputError(failures[0])
    make_folder(output.parent)
    write_report(patients, failures, unsegmented, vmax, output)
    print(f"{len(patients)} patients, {len(failures)} failed -> {output}")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 2 if failures else 0


def _finished(folder: Path) -> list[Path]:
    """Folders that `segment` has written: this one, or those in it."""
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder")
    try:
        below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder}: can't be read ({error.strerror})") from None
    found = [path for path in (folder, *below) if os.path.lexists(path / REPORT)]
    if not found:
        raise InputError(f"{folder}: segment has written nothing in it ({REPORT} is missing)")
    return found[:1] if found[0] == folder else found


def _unsegmented(folders: Sequence[str], failures: list[str]) -> list[str]:
    """What `segment` says about patients that it failed on; a summary that can't be read is one of our `failures`."""
    lines = []
    for folder in folders:
        try:
            patients = read_summary(Path(folder))
        except InputError as error:
            failures.append(" ".join(str(error).split()))
            continue
        reasons = [(name, outcome["reason"]) for name, outcome in patients.items() if outcome["state"] == "failed"]
        lines += [reason if name in reason else f"{name}: {reason}" for name, reason in reasons]
    return lines


def _scans(folders: Sequence[str], finished: Sequence[Path]) -> tuple[dict[str, Path], list[str]]:
    """Folders of scans by patient, and what can't be looked into.

    Which files are scans is known from the first finished patient that can be read.
    """
    scans, problems = {}, []
    for folder in finished if folders else ():
        try:
            modalities = [name for name in read_report(folder)["inputs"] if name != "seg"]
        except InputError:  # said again when its turn comes
            continue
        for given in folders:
            patients, unread = find_patients(given, modalities)
            scans |= dict(patients)
            problems += unread.values()
        break
    return scans, problems
