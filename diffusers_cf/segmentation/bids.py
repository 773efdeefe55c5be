"""BIDS in and out: the scans of participants, and the results of `segment` as a derivative dataset (BIDS 1.10).

The specification has a name for a lesion mask and for a changed scan, and none for a heatmap or a picture, so these two
stand in .bidsignore.
"""

import os
import re
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from diffusers_cf import __version__
from diffusers_cf.data.intensity import unit_in_words
from diffusers_cf.errors import InputError
from diffusers_cf.files import alone_at, new_file, new_folder, read_json, write_json
from diffusers_cf.segmentation.cohorts import find_patients, patient_files


NATIVE = Path("sourcedata", "diffusers_cf")  # results as `segment` writes them; no validator looks below sourcedata
TEXTS = {
    ".bidsignore": "*_heatmap.*\n*_preview.png\nreport.html\n",
    "README.md": """# Lesions by diffusers_cf
`*_label-lesion_mask`: 1 where the model finds a lesion; its JSON file has model, settings, threshold and volume.
`*_label-lesion_heatmap`: the map before the threshold. `*_label-lesion_preview.png`: a picture of the most suspicious slices.
`*_desc-counterfactual_*`: the scan as the model would expect it in health; `*_desc-filled_*` (`--fill`): that in the lesion alone.
`sourcedata/diffusers_cf` has the same files as `diffusers-cf segment` names them, and the outcome of every participant.
""",
}
PARTICIPANT = re.compile(r"sub-([a-zA-Z0-9+]+)(?:_ses-([a-zA-Z0-9+]+))?")


def find_participants(
    folder: Path, modalities: Sequence[str], participants: Collection[str], sessions: Collection[str]
) -> tuple[list[tuple[str, Path]], dict[str, str]]:
    """Find the scans of participants, as [`find_patients`] finds patients.

    Args:
        folder (`Path`): a BIDS dataset, raw or derivative.
        modalities (`Sequence[str]`): modalities of the model.
        participants (`Collection[str]`): labels, with or without `sub-`; none for all.
        sessions (`Collection[str]`): labels, with or without `ses-`; none for all.

    Returns:
        `tuple`: names, such as `sub-01_ses-1`, and folders; and one line for each path that can't be read and each
        label that has no scan.

    Raises:
        InputError: `folder` is no BIDS dataset.
    """
    read_json(folder / "dataset_description.json")
    wanted = [{label.removeprefix(f"{kind}-") for label in labels}
              for kind, labels in (("sub", participants), ("ses", sessions))]  # fmt: skip
    patients, problems = find_patients(folder, modalities)
    found = [(name, path, PARTICIPANT.fullmatch(name)) for name, path in patients]
    found = [(name, path, match.groups()) for name, path, match in found if match]
    for index, kind in enumerate(("sub", "ses")):
        for label in sorted(wanted[index] - {labels[index] for *_, labels in found}):
            problems[f"{kind}-{label}"] = (
                f"{folder}: {kind}-{label} has no scan (names end in {', '.join(modalities)})"
            )
        found = [row for row in found if not wanted[index] or row[2][index] in wanted[index]]
    return [(name, path) for name, path, _ in found], problems


def describe_derivatives(source: Path, output: Path) -> None:
    """Write `dataset_description.json` and `TEXTS`.

    Raises:
        InputError: `output` is the source itself, or a dataset that `diffusers-cf bids` has not written.
    """
    path, raw = output / "dataset_description.json", read_json(source / "dataset_description.json")
    makers = read_json(path).get("GeneratedBy", []) if path.exists() else []
    ours = any(isinstance(maker, dict) and maker.get("Name") == "diffusers_cf" for maker in makers)
    if not ours and (path.exists() or any(output.glob("sub-*"))):
        raise InputError(f"{output}: a dataset of another kind; choose another output folder")
    doi = {"DOI": raw["DatasetDOI"]} if "DatasetDOI" in raw else {}
    description = {
        "Name": f"Lesions by diffusers_cf in {raw.get('Name', source.resolve().name)}",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "diffusers_cf", "Version": __version__}],
        "SourceDatasets": [{"URL": source.resolve().as_uri()} | doi],
        "DatasetLinks": {"source": source.resolve().as_uri()},
    } | {name: raw[name] for name in ("License",) if name in raw}
    write_json(description, path)
    for name, text in TEXTS.items():
        with new_file(output / name) as temporary:
            temporary.write_text(text)


def write_derivatives(name: str, scans: Path, result: Path, report: dict, source: Path, output: Path) -> Path:
    """Write a participant's results, as a whole or not at all, under BIDS names and with JSON sidecars.

    NIfTI files and the picture are hard links to those of `segment`, or copies where the file system has no links.

    Args:
        name (`str`): from [`find_participants`].
        scans (`Path`): the folder of the scans.
        result (`Path`): the folder that `segment` has written.
        report (`dict`): content of its report.json.
        source (`Path`): the BIDS dataset.
        output (`Path`): the derivative dataset.

    Returns:
        `Path`: the folder `output/sub-01/[ses-1/]anat`.
    """
    inputs = patient_files(scans, report["preprocessing"]["modalities"])
    inputs.pop("seg", None)
    sources = [f"bids:source:{path.relative_to(source).as_posix()}" for path in inputs.values()]
    entities = {modality: _entities(path, name) for modality, path in inputs.items()}
    first, reference = next(iter(entities.values())), sources[0]
    lesion = name + "".join(f"_{part}" for part in first.split("_") if part.startswith(("space-", "res-")))
    lesion += "_label-lesion"
    what = "what a counterfactual diffusion model takes for a lesion"
    unit = unit_in_words(report["preprocessing"]["normalize"], report["settings"]["map"])
    named = {
        "mask.nii.gz": (f"{lesion}_mask", {"Type": "Lesion", "Description": what, "Report": report}),
        "heatmap.nii.gz": (f"{lesion}_heatmap", {"Units": unit}),
        "preview.png": (f"{lesion}_preview", {}),
    }
    stripped = not any("skull-stripped" in warning for warning in report["warnings"])
    for modality, path in inputs.items():
        suffix = path.name.split(".")[0].rpartition("_")[2]
        facts = {"Description": "the scan as the model would expect it in health", "SkullStripped": stripped}
        named[f"counterfactual_{modality}.nii.gz"] = (f"{entities[modality]}_desc-counterfactual_{suffix}", facts)
        facts = {"Description": "the scan, but in the lesion mask that of the counterfactual"}
        facts["SkullStripped"] = stripped and not report["skull_strip"]
        named[f"filled_{modality}.nii.gz"] = (f"{entities[modality]}_desc-filled_{suffix}", facts)
    folder = output.joinpath(*name.split("_"), "anat")
    with alone_at(folder, timeout=60), new_folder(folder) as temporary:
        for file, (stem, facts) in named.items():
            if not (result / file).exists():  # some maps have no counterfactual, and filling is an option
                continue
            _link(result / file, temporary / f"{stem}.{file.partition('.')[2]}")
            if facts:
                write_json(facts | {"Sources": sources, "SpatialReference": reference}, temporary / f"{stem}.json")
    return folder


def _entities(path: Path, name: str) -> str:
    """Return the entities of a scan's name that a derivative keeps, or the participant's where it has none."""
    stem = path.name.split(".")[0].rpartition("_")[0]
    kept = "_".join(part for part in stem.split("_") if not part.startswith("desc-"))
    return kept if stem.startswith(name) else name


def _link(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except OSError:  # across file systems, or one without links
        shutil.copyfile(file, target)
