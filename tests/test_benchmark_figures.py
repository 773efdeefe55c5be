from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffusers_cf.benchmark import figures
from diffusers_cf.files import write_json
from diffusers_cf.plots import GREY


RNG = np.random.default_rng(0)


def shown(axis):
    """The image of an axes."""
    return np.asarray(axis.images[0].get_array())


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_process_runs_right_above_and_left_below(tmp_path):
    image, latent, counterfactual, heat, *steps = RNG.random((8, 16, 16))
    mask = np.pad(np.ones((5, 5)), 5)[:16, :16]
    encoding = {"image": image, "t = 1": steps[0], "t = 2": steps[1], "latent": latent}
    decoding = {"counterfactual": counterfactual, "t = 1": steps[2], "t = 2": steps[3]}
    figure = figures.plot_process(tmp_path / "f.png", encoding, decoding, heat, mask)
    assert is_png(tmp_path / "f.png")
    *rows, end = sorted(figure.axes, key=lambda axis: axis.get_position().x0)
    below, above = ([a for a in rows if (a.get_position().y0 > 0.4) == upper] for upper in (False, True))
    np.testing.assert_array_equal([shown(axis) for axis in above], [image, image, *steps[:2]])
    np.testing.assert_array_equal([shown(axis) for axis in below], [heat, counterfactual, *steps[2:]])
    np.testing.assert_array_equal(shown(end), latent)
    assert {a.images[0].get_clim() for a in [*above, *below[1:], end]} == {(GREY["vmin"], GREY["vmax"])}
    assert below[0].images[0].get_clim() == (0, np.percentile(heat, 99.9))
    assert [len(axis.collections) for axis in above] == [1, 0, 0, 0]  # the outline of the lesion
    mirrored = figures.plot_process(tmp_path / "f.png", encoding, decoding, heat, mask, "radiological")
    assert "radiological: the patient's right" in mirrored.get_suptitle()
    for one, other in zip(figure.axes, mirrored.axes, strict=True):
        np.testing.assert_array_equal(shown(one), shown(other)[:, ::-1])


def test_every_map_is_shown_in_one_unit_per_method(tmp_path):
    images, masks = RNG.random((3, 16, 16)), np.zeros((3, 16, 16), dtype=np.uint8)
    masks[:2, 4:9, 4:9] = 1
    maps = {"ours": RNG.random((3, 16, 16)), "restoration": 40 * RNG.random((3, 8, 8))}
    maps["ours"][1] *= 0.1
    figure = figures.plot_method_maps(tmp_path / "f.png", images, masks, maps, "flair")
    assert is_png(tmp_path / "f.png")
    axes = np.array(figure.axes[:-1]).reshape(3, 4)
    for i, row in enumerate(axes):
        np.testing.assert_array_equal([shown(row[0]), shown(row[1])], [images[i]] * 2)
        for axis, values in zip(row[2:], maps.values(), strict=True):
            np.testing.assert_allclose(shown(axis), values[i] / np.percentile(values, 99.9))
            assert axis.images[0].get_clim() == (0, 1)  # the same colours for all rows: a faint slice stays dark
    mirrored = figures.plot_method_maps(tmp_path / "f.png", images, masks, maps, "flair", "radiological")
    assert "the patient's right is at the left" in mirrored.axes[-1].get_xlabel()
    for one, other in zip(figure.axes[:-1], mirrored.axes[:-1], strict=True):
        np.testing.assert_array_equal(shown(one), shown(other)[:, ::-1])
    outline = axes[0, 1].collections[0].get_paths()[0].vertices
    assert outline.min(axis=0) == pytest.approx([3.5, 3.5]) and outline.max(axis=0) == pytest.approx([8.5, 8.5])
    assert [[len(axis.collections) for axis in row] for row in axes] == [[0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


def test_the_unit_of_maps_is_positive():
    maps, single = np.arange(100.0).reshape(10, 10), np.zeros((100, 100))
    single[0, 0] = 5
    assert figures.scale_of_maps(maps) == pytest.approx(np.percentile(maps, 99.9))
    assert figures.scale_of_maps(single) == 5 and figures.scale_of_maps(0 * single) == 1


def test_strengths_has_a_curve_for_each_guidance_and_scale(tmp_path):
    dice = {("implicit", 1): (0.6, 0.7, 0.5), ("implicit", 3): (0.5, 0.8, 0.4), ("classifier", 9): (0.2, 0.8, 0.1)}
    points = [
        {"guidance": guidance, "guidance_scale": scale, "strength": (0.4, 0.6, 0.8)[i], "ideal_dice": values[i]}
        for (guidance, scale), values in dice.items()
        for i in (2, 0, 1)
    ]
    figure = figures.plot_strengths(tmp_path / "f.png", points)
    assert is_png(tmp_path / "f.png")
    curves = figure.axes[0].lines
    assert [list(line.get_xdata()) for line in curves] == [[0.4, 0.6, 0.8]] * 3
    assert [tuple(line.get_ydata()) for line in curves] == list(dice.values())
    # guidance differs in colour and line style, scales in marker
    assert len({(line.get_color(), line.get_linestyle()) for line in curves}) == 2
    assert curves[0].get_marker() != curves[1].get_marker()


def cell(method, evaluations, auprc, seed=0, tables=(1,)):
    facts = {"method": method, "row": f"The row of {method}", "tables": list(tables), "seed": seed}
    facts |= {"auprc": 0.9, "postprocessed": {"auprc": auprc}}
    return facts | {"network_evaluations_per_slice": evaluations}


def test_quality_is_the_mean_over_seeds_at_its_cost(tmp_path):
    cells = [cell("threshold", 0, 0.4), cell("ours", 45, 0.6), cell("ours", 45, 0.7, seed=1)]
    cells += [cell("ours-clipped", 60, 0.5, tables=[2]), cell("ours-unclipped", 60, 0.2, tables=[2])]
    figure = figures.plot_quality(tmp_path / "f.png", cells)
    assert is_png(tmp_path / "f.png")
    axis = figure.axes[0]
    found = {bars.get_label(): bars.lines[0].get_xydata().tolist() for bars in axis.containers}
    assert found == {"The row of threshold": [[0, 0.4]], "The row of ours": [[45, pytest.approx(0.65)]]}
    deviation = axis.containers[1].lines[2][0].get_segments()[0]
    assert np.ptp(deviation[:, 1]) == pytest.approx(2 * np.std([0.6, 0.7], ddof=1))
    dots = [line.get_xydata().tolist() for line in axis.lines if line.get_marker() == "."]
    assert dots == [[[60, 0.5]], [[60, 0.2]]]  # methods of Table 2 alone
    zero, one, ten, hundred = (axis.transData.transform((x, 0.5))[0] for x in (0, 1, 10, 100))
    assert axis.get_window_extent().x0 < zero < one and ten - one == pytest.approx(hundred - ten)


def test_a_result_older_than_a_setting_keeps_the_method_s_own(tmp_path, monkeypatch):
    """Early results of the forward map do not name their map."""
    seen, method = [], SimpleNamespace(whole_patient=False, settings={"strength": 0.2, "map": "forward"})
    method.learn = lambda train: None
    method.anomaly_map = lambda images: seen.append(method.settings) or images[:, 0]
    settings = {"guidance_scale": 16.0, "strength": 0.75, "num_inference_steps": 10}
    (tmp_path / "cells").mkdir()
    write_json(cell("forward-map", 10, 0.5, seed=1) | {"settings": settings}, tmp_path / "cells" / "x.json")
    batch = {"images": torch.ones(2, 1, 4, 4), "masks": torch.zeros(2, 4, 4)}
    test = SimpleNamespace(
        patients=np.array(["A", "B"]), __getitems__=lambda rows: rows, collate=lambda _: batch, preprocessing={}
    )
    networks = SimpleNamespace(is_ready=lambda *_: True, make=lambda *_: (method, {}))
    monkeypatch.setattr(figures, "example_rows", lambda *_: [0, 1])
    data = SimpleNamespace(train=None, test=test, modalities=["flair"])
    figures.write_figures(SimpleNamespace(output=tmp_path, networks=networks), {1: data}, pictures=True)
    assert seen == [settings | {"map": "forward"}] * 2 and is_png(tmp_path / "figure2.png")
