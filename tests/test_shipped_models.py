"""The model for real FLAIR scans that ships: what it is, its card, and what it does to a patient that it has not seen."""

import json
from pathlib import Path

from data_files import DATA, needs_data

from diffusers_cf import CounterfactualDDIMPipeline
from diffusers_cf.cli import main
from diffusers_cf.hub.cards import model_card
from diffusers_cf.loading import PRETRAINED


FOLDER = PRETRAINED / "flair_tumour_small"
SCORES = [Path(__file__).parents[1] / "results/real_patients" / f"{name}.json" for name in ("lgg_zero_shot",)]


def test_its_card_is_what_publish_would_write():
    text = model_card(FOLDER, "USER/flair_tumour_small", "cc-by-sa-4.0", [json.loads(p.read_text()) for p in SCORES])
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == text
    license = (FOLDER / "LICENSE").read_text(encoding="utf-8")
    assert "CC BY-SA 4.0" in license and "Medical Segmentation Decathlon" in license


def test_it_recommends_its_student_and_keeps_its_counterfactual():
    pipe = CounterfactualDDIMPipeline.from_pretrained("flair_tumour_small")
    settings = pipe.resolve_settings()
    assert settings["map"] == "student" and 0 < settings["threshold"] < 1 and pipe.network_evaluations() == 1
    assert pipe.preprocessing["modalities"] == ["flair"] and pipe.preprocessing["normalize"] == "median"
    assert pipe.network_evaluations(map="counterfactual") == 18


@needs_data
def test_a_patient_that_it_has_not_seen(tmp_path):
    """Patient 6 of BraTS 2021, whose tumour is bright: nearly any method finds it."""
    patient = DATA / "volumes" / "BraTS2021_00006"
    assert main(["segment", str(patient), "--model", "flair_tumour_small", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "BraTS2021_00006" / "report.json").read_text())
    assert report["network_evaluations_per_slice"] == 1 and report["warnings"] == []
    assert report["dice"] > 0.8 and report["auprc"] > 0.9
    names = {path.name for path in (tmp_path / "BraTS2021_00006").iterdir()}
    assert names == {"heatmap.nii.gz", "mask.nii.gz", "preview.png", "report.json"}
