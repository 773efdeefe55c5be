"""Validation during training: scores with masks, mean heatmaps of each class without, and pictures."""

import json
from types import SimpleNamespace
from unittest.mock import Mock

import datasets
import numpy as np
import pytest
from model_files import tiny_pipeline
from training_data import stub_accelerator, write_training_set

from diffusers_cf.training.validation import Validation


@pytest.mark.parametrize("masks", [True, False])
def test_validation(tmp_path, monkeypatch, masks):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = write_training_set(tmp_path / "set", masks=masks)
    args = SimpleNamespace(dataset=str(folder), validation_steps=2, num_validation_slices=5, max_train_steps=5)
    acc = stub_accelerator()
    acc.log = lambda values, step: acc.logged.append((step, values))
    draws = SimpleNamespace(name="other", log_images=Mock())
    acc.trackers = [draws, SimpleNamespace(name="without pictures")]
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    validation = Validation(args, acc, tmp_path / "out", global_batch=8)
    assert validation.indices.tolist() == [0, 1, 3, 5, 7]
    scores = validation.run(pipe, 4)
    assert acc.logged == [(4, {f"validation/{key}": value for key, value in scores.items()})]
    if masks:
        assert set(scores) == {"auprc", "ideal_dice", "foreground_auprc", "foreground_ideal_dice", "slice_auroc"}
        assert all(0 <= value <= 1 for value in scores.values())
    else:
        dataset = validation.dataset
        batch = dataset.collate(dataset.__getitems__(validation.indices.tolist()))
        settings = {"guidance_scale": 6.0, "strength": 0.75, "num_inference_steps": 8, "map": "forward"}
        means = pipe(batch["images"], **settings).heatmaps.mean(dim=(1, 2))
        healthy, unhealthy = (means[batch["labels"] == label].mean().item() for label in (0, 1))
        assert scores == pytest.approx({"mean_healthy": healthy, "mean_unhealthy": unhealthy}, rel=1e-4)
    folder = tmp_path / "out" / "validation"
    assert sorted(path.name for path in folder.iterdir()) == ["scores.json", "step-0000004.png"]
    assert [step for step in range(1, 7) if validation.is_due(step)] == [2, 4, 5, 6]
    assert validation.is_done(4) and not validation.is_done(2)
    curve = [{"step": 2, "auprc": 0.1}, {"step": 4, "auprc": 0.2}, {"step": 6, "auprc": 0.3}]
    (folder / "scores.json").write_text(json.dumps(curve))  # a run that was stopped after step 6 goes on from step 2
    again = validation.run(pipe, 4)
    expected = [curve[0], {"step": 4, "images": 32, **again}]
    assert json.loads((folder / "scores.json").read_text()) == expected
    picture, _ = draws.log_images.call_args_list
    (step, image) = picture.kwargs["step"], picture.args[0]["validation"]
    assert step == 4 and image.dtype == np.uint8 and image.ndim == 4 and image.shape[-1] == 3 and image.std() > 5


def test_validation_has_nothing_to_do_without_slices(tmp_path):
    args = SimpleNamespace(dataset="missing", validation_steps=0, num_validation_slices=5, max_train_steps=5)
    assert Validation(args, stub_accelerator(), tmp_path, 8).run(None, 1) == {}
