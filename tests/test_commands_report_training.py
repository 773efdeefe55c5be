"""The page about a training: curves, scores and maps of a finished and of a running one; damaged folders."""

import base64
import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from segmentation_files import cli, foreign_addresses, text_of

from diffusers_cf.commands.training_report import plot_training
from diffusers_cf.training.curves import LOSSES, SCORES, add_to_curve, read_curve


AUPRC = {4: 0.25, 8: 0.75, 12: 0.5}


@pytest.fixture
def model(tmp_path):
    """A folder as the training script leaves it, with a picture of one colour for each validation."""
    folder = tmp_path / "model"
    (folder / "validation").mkdir(parents=True)
    for step in range(1, 13):
        add_to_curve(
            folder / LOSSES, {"step": step, "images": 8 * step, "loss": 1 / step, "lr": 1e-3, "images_per_second": 5.0}
        )
    for step, auprc in AUPRC.items():
        add_to_curve(folder / SCORES, {"step": step, "images": 8 * step, "foreground_auprc": auprc})
        Image.new("RGB", (4, 4), (step, 0, 0)).save(folder / "validation" / f"step-{step:07d}.png")
    known = {"modalities": ["flair", "t1"], "size": 16, "training": {"images": 96, "command": "<b>train"}}
    (folder / "preprocessing.json").write_text(json.dumps(known))
    return folder


def report(tmp_path, *words):
    assert cli("report", *words, "--output", tmp_path / "page" / "report.html") == 0
    return (tmp_path / "page" / "report.html").read_text(encoding="utf-8")


def test_a_curve_goes_on_where_a_training_was_resumed(tmp_path):
    path = tmp_path / "curve.json"
    assert read_curve(path) == []
    for step, loss in ((5, 0.5), (10, 0.4), (15, 0.3), (10, 0.2)):
        add_to_curve(path, {"step": step, "loss": loss})
    assert read_curve(path) == [{"step": 5, "loss": 0.5}, {"step": 10, "loss": 0.2}]


def test_the_page_shows_curves_scores_and_the_first_best_and_last_maps(model, tmp_path, monkeypatch, capsys):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: (figures.append(figure), file.write(b"curves")))
    page = report(tmp_path, "--training", model)
    assert capsys.readouterr().out == f"training of {model} -> {tmp_path / 'page' / 'report.html'}\n"
    loss, scores = figures[0].axes
    lines = {line.get_label(): line.get_xydata() for line in (*loss.lines, *scores.lines)}
    assert np.allclose(lines["loss, mean between log entries"], [(8 * n, 1 / n) for n in range(1, 13)])
    assert np.allclose(lines["foreground_auprc"], [(8 * n, score) for n, score in AUPRC.items()])
    text = text_of(page)
    assert "96 images seen in 12 steps; loss 0.08333, learning rate 0.001, 5.0 images per second" in text
    assert "not finished" not in text and "flair, t1" in text and "<b>train" not in page
    titles = ["First: step 4", "Best foreground_auprc: step 8", "Last: step 12"]
    assert [text.count(title) for title in titles] == [1, 1, 1]
    assert sorted(titles, key=text.index) == titles
    for step in AUPRC:
        picture = (model / "validation" / f"step-{step:07d}.png").read_bytes()
        assert page.count(base64.b64encode(picture).decode()) == 1
    assert foreign_addresses(page) == []


def test_a_running_training_without_validation(model, tmp_path):
    for name in ("preprocessing.json", SCORES):
        (model / name).unlink()
    text = text_of(report(tmp_path, "--training", model))
    assert "The training is not finished" in text and "No validation:" in text and "First" not in text


def test_the_best_maps_may_be_the_last(model, tmp_path):
    add_to_curve(model / SCORES, {"step": 12, "images": 96, "foreground_auprc": 0.9})
    assert "Last, and best foreground_auprc: step 12" in text_of(report(tmp_path, "--training", model))


def test_the_mean_of_the_loss_lies_where_its_last_value_was_measured(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: figures.append(figure))
    plot_training("curves.png", [{"images": n, "loss": float(n)} for n in range(1, 61)], [])
    (axis,) = figures[0].axes
    mean = axis.lines[1].get_xydata()
    assert axis.lines[1].get_label() == "mean of 3" and np.allclose(mean, [(n, n - 1) for n in range(3, 61)])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--training", "{tmp}"], "{tmp}: no training to show (losses.json is missing, which"),
        (["--training", "{model}", "{tmp}"], "give either folders of segment or --training MODEL"),
        ([], "give either folders of segment or --training MODEL"),
        (["--training", "{damaged}"], "losses.json: not a readable JSON file"),
        (["--training", "{other}"], "losses.json: not a JSON list"),
    ],
)
def test_wrong_inputs(words, reason, model, tmp_path, capsys):
    for name, text in (("damaged", "[{"), ("other", '{"step": 1}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / LOSSES).write_text(text)
    places = {"tmp": tmp_path, "model": model, "damaged": tmp_path / "damaged", "other": tmp_path / "other"}
    words = [word.format(**places) for word in words]
    assert cli("report", *words, "--output", tmp_path / "page" / "report.html") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and reason.format(**places) in line
    assert not (tmp_path / "page").exists()
