"""Render the results of `segment` as one HTML page that needs no network, one patient in memory at a time."""

import base64
import io
import itertools
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import nibabel
import numpy as np
from tqdm.auto import tqdm

from diffusers_cf.data.nifti import Scan, read_nifti, to_canonical
from diffusers_cf.errors import InputError, in_one_line, reading
from diffusers_cf.files import new_file, read_json
from diffusers_cf.plots import CONVENTIONS, plot_cohort
from diffusers_cf.segmentation.cohorts import find_patients, patient_files
from diffusers_cf.segmentation.volumes import read_scan, scan_sha256


def write_report(
    folders: Sequence[Path], output: Path, scans: Sequence[str] = (), unsegmented: Sequence[str] = (),
    convention: str = "radiological",
) -> tuple[int, list[str]]:  # fmt: skip
    """Write the page, as a whole or not at all. A patient that can't be shown is named on it.

    Args:
        folders (`Sequence[Path]`): folders OUT/PATIENT.
        output (`Path`): an .html file.
        scans (`Sequence[str]`): folders of the segmented patients or cohorts. A patient found there is shown over the
            scan, any other over the counterfactual.
        unsegmented (`Sequence[str]`): one line for each patient that `segment` failed on.
        convention (`str`): of the viewers, `radiological` or `neurological`.

    Returns:
        `tuple`: the number of patients in the table, and one line for each failure.

    Raises:
        InputError: no patient can be read, or nilearn is not installed.
    """
    from jinja2 import Environment, PackageLoader

    try:
        import nilearn.plotting  # noqa: F401
    except ImportError:
        raise InputError("report needs nilearn: pip install nilearn") from None
    patients, failures = [], []
    for folder in tqdm(folders, desc="Patients", unit="patient"):
        try:
            patients.append(read_patient(folder))
        except (InputError, OSError, MemoryError) as error:
            failures.append(in_one_line(error))
    if not patients:
        raise InputError(failures[0])
    folders_of_scans = {}
    for folder in scans:
        found, unread = find_patients(folder, patients[0]["report"]["preprocessing"]["modalities"])
        folders_of_scans |= dict(found)
        failures += unread.values()
    # one colour scale, so that patients can be compared
    vmax = max(max(patient["bright_heat"], 1.5 * patient["report"]["threshold"]) for patient in patients)
    cohort, reports = io.BytesIO(), [patient["report"] for patient in patients]
    volumes_ml = [report["lesion_volume_ml"] for report in reports]
    found = {title: [report.get(title.lower()) for report in reports] for title in ("Dice", "AUPRC")}
    scores = {title: [v if isinstance(v, float) else None for v in values] for title, values in found.items()}
    plot_cohort(cohort, [str(report["patient"]) for report in reports], volumes_ml, scores)
    environment = Environment(loader=PackageLoader("diffusers_cf"), autoescape=True, trim_blocks=True)
    page = environment.get_template("report.html").stream(
        cohort=base64.b64encode(cohort.getvalue()).decode(), patients=patients, failures=tuple(failures),
        unsegmented=unsegmented, ranges=ranges,
        sections=_sections(patients, folders_of_scans, vmax, convention, failures), vmax=vmax,
        convention=CONVENTIONS[convention][-1],
    )  # fmt: skip
    with new_file(output) as temporary:
        # names of files may hold bytes that are no UTF-8
        page.dump(str(temporary), encoding="utf-8", errors="backslashreplace")
    return len(patients), failures


def read_patient(folder: Path) -> dict:
    """Return the numbers of one patient on the page.

    Args:
        folder (`Path`): OUT/PATIENT.

    Returns:
        `dict`: `folder`; `report`, the content of report.json; `areas_mm2` `(Z,)`, the area of the mask in each axial
        slice, lowest slice first; `lesion_slices`, the indices of those with lesion; `max_heat`; `bright_heat`, the
        99.5th percentile of all heat above 0, or 0 if there is none.

    Raises:
        InputError: a file is missing, damaged, or not what `segment` writes.
    """
    report = read_json(folder / "report.json")
    if "lesion_volume_ml" not in report:
        raise InputError(f"{folder / 'report.json'}: not a report of segment")
    heat, mask = (to_canonical(read_nifti(folder / f"{name}.nii.gz")) for name in ("heatmap", "mask"))
    areas_mm2 = (mask.data > 0).sum(axis=(0, 1)) * float(mask.spacing_mm[0] * mask.spacing_mm[1])
    positive = heat.data[heat.data > 0]
    return {
        "folder": folder, "report": report, "areas_mm2": areas_mm2,
        "lesion_slices": np.flatnonzero(areas_mm2).tolist(), "max_heat": float(heat.data.max()),
        "bright_heat": float(np.percentile(positive, 99.5)) if positive.size else 0.0,
    }  # fmt: skip


def _sections(
    patients: Sequence[dict], scans: Mapping[str, Path], vmax: float, convention: str, failures: list[str]
) -> Iterator[dict]:
    """Yield the content of each patient's section when the template asks for it, and add its failure to `failures`."""
    for patient in tqdm(patients, desc="Viewers", unit="patient"):
        folder, report = patient["folder"], patient["report"]
        section, name, modality = {"patient": patient}, report["patient"], report["preprocessing"]["modalities"][0]
        try:
            section["preview"] = base64.b64encode((folder / "preview.png").read_bytes()).decode()
            heat = to_canonical(read_nifti(folder / "heatmap.nii.gz"))
            if name in scans:
                path, section["background"] = patient_files(scans[name], [modality])[modality], modality
                if scan_sha256(path) != report["inputs"][modality]:
                    raise InputError(f"{path}: not the {modality} that was segmented as {name}")
            else:
                path = folder / f"counterfactual_{modality}.nii.gz"
                section["background"] = f"the counterfactual of {modality} (--scans shows the scan itself)"
            # a student alone makes no counterfactual
            if name in scans or path.exists() or report["settings"]["map"] != "student":
                section["viewer"] = volume_viewer(report, heat, to_canonical(read_scan(path)), vmax, convention)
        except (InputError, OSError, MemoryError) as error:
            section["failure"] = in_one_line(error)
            failures.append(section["failure"])
        yield section


def volume_viewer(report: Mapping, heat: Scan, scan: Scan, vmax: float, convention: str) -> str:
    """Return a page of nilearn to scroll through the heat over a scan, from the threshold to `vmax`.

    Raises:
        InputError: nilearn can't show the volumes.
    """
    from nilearn.plotting import view_img

    images = [nibabel.Nifti1Image(part.data.astype(np.float32), part.affine) for part in (heat, scan)]
    with reading(heat.path, "volume for the viewer"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about empty maps and the number of open views
        view = view_img(
            images[0], bg_img=images[1], threshold=report["threshold"], vmax=vmax, cmap="inferno",
            symmetric_cmap=False, black_bg=True, opacity=0.6, width_view=900, title=report["patient"],
            radiological=convention == "radiological",
        )  # fmt: skip
    return re.sub(r"<link[^>]*favicon[^>]*>", "", view.html)  # the only thing that it would load from the network


def ranges(numbers: Sequence[int]) -> str:
    """Describe rising numbers: `3 to 5, 9` for 3, 4, 5, 9."""
    runs = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    found = [[number for _, number in run] for _, run in runs]
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in found)
