"""What the figures draw, read back from their axes."""

import itertools

import numpy as np
import pytest

from diffusers_cf.benchmark.figures import (
    percentile_scales,
    plot_method_maps,
    plot_process,
    plot_quality_against_evaluations,
    plot_strengths,
    robustness,
)
from diffusers_cf.plots import GREY


RNG = np.random.default_rng(0)


def shown(axis):
    """The image of an axes."""
    return np.asarray(axis.images[0].get_array())


def is_png_of(path, figure):
    """Whether the file holds a picture of the figure's size."""
    from PIL import Image

    with Image.open(path) as image:
        return image.format == "PNG" and image.size == figure.canvas.get_width_height()


# Figure 2


@pytest.fixture
def slices():
    images, masks = RNG.random((3, 2, 16, 16)), np.zeros((3, 16, 16), dtype=np.uint8)
    masks[:2, 4:9, 4:9] = 1
    return images, masks, {"ours": RNG.random((3, 16, 16)), "restoration, of 500 steps": 40 * RNG.random((3, 8, 8))}


def test_every_map_is_shown_in_its_methods_one_unit(slices, tmp_path):
    images, masks, maps = slices
    maps["ours"][1] *= 0.1
    scales = {"ours": 0.5, "restoration, of 500 steps": 20.0}
    figure = plot_method_maps(tmp_path / "f.png", images, masks, maps, scales, "threshold", maximum=2.0, channel=1)
    assert is_png_of(tmp_path / "f.png", figure)
    axes = np.array(figure.axes[:-1]).reshape(3, 4)
    for i, row in enumerate(axes):
        np.testing.assert_array_equal(shown(row[0]), images[i, 1])
        np.testing.assert_array_equal(shown(row[1]), images[i, 1])
        for axis, name in zip(row[2:], maps, strict=True):
            np.testing.assert_allclose(shown(axis), maps[name][i] / scales[name])
            # The same colours for all rows: a faint slice stays dark.
            assert axis.images[0].get_clim() == (0, 2)
    assert [axis.get_xlabel() for axis in axes[-1]] == ["", "", "1 = 0.5", "1 = 20"]
    titles = [axis.get_title() for axis in axes[0]]
    assert titles == ["input\n(FLAIR)", "ground\ntruth", "ours", "restoration,\nof 500 steps"]
    assert figure.axes[-1].get_xlabel().startswith("map / threshold")


def test_the_outline_is_that_of_the_lesion(slices, tmp_path):
    images, masks, maps = slices
    figure = plot_method_maps(tmp_path / "f.png", images, masks, maps, percentile_scales(maps), "", row_names="abc")
    axes = np.array(figure.axes[:-1]).reshape(3, 4)
    outline = axes[0, 1].collections[0].get_paths()[0].vertices
    assert outline.min(axis=0) == pytest.approx([3.5, 3.5]) and outline.max(axis=0) == pytest.approx([8.5, 8.5])
    assert [[len(axis.collections) for axis in row] for row in axes] == [[0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert [axis.get_ylabel() for axis in axes[:, 0]] == list("abc")


def test_a_methods_unit_is_the_percentile_of_all_its_maps_together():
    maps = {"ours": np.stack([np.zeros((10, 10)), np.arange(100.0).reshape(10, 10)])}
    assert percentile_scales(maps, 75) == {"ours": pytest.approx(np.percentile(maps["ours"], 75))}
    assert percentile_scales(maps, 10) == {"ours": 99}
    assert percentile_scales({"empty": np.zeros((2, 4, 4))}) == {"empty": 1}


def test_a_unit_must_be_positive(slices, tmp_path):
    images, masks, maps = slices
    with pytest.raises(ValueError, match="scale of ours must be positive"):
        plot_method_maps(tmp_path / "f.png", images, masks, maps, dict.fromkeys(maps, 0.0), "")


# Figure 1


def test_the_process_runs_right_above_and_left_below(tmp_path):
    image, counterfactual = RNG.random((2, 2, 16, 16))
    encodings, decodings = RNG.normal(size=(2, 3, 2, 8, 8))
    latent, heat, mask = RNG.normal(size=(2, 8, 8)), RNG.random((16, 16)), np.zeros((16, 16))
    mask[3:8, 3:8] = 1
    figure = plot_process(
        tmp_path / "f.png", image, encodings, latent, decodings, counterfactual, heat, mask, channel=1,
        encoding_names=["t = 1", "t = 2", "t = 3"], decoding_names=["t = 3", "t = 2", "t = 1"],
    )  # fmt: skip
    assert is_png_of(tmp_path / "f.png", figure)
    *rows, end = sorted(figure.axes, key=lambda axis: axis.get_position().x0)
    below, above = ([a for a in rows if (a.get_position().y0 > 0.4) == upper] for upper in (False, True))
    expected = [image[1], image[1], *(step[1] for step in encodings)]
    for axis, picture in zip(above, expected, strict=True):
        np.testing.assert_allclose(shown(axis), picture)
    # Decoding goes left: what came last stands next to the counterfactual.
    expected = [heat, counterfactual[1], *(step[1] for step in decodings[::-1])]
    for axis, picture in zip(below, expected, strict=True):
        np.testing.assert_allclose(shown(axis), picture)
    np.testing.assert_allclose(shown(end), latent[1])
    assert {a.images[0].get_clim() for a in [*above, *below[1:], end]} == {(GREY["vmin"], GREY["vmax"])}
    assert below[0].images[0].get_clim() == (0, np.percentile(heat, 99.9))
    assert [axis.get_title() for axis in above[2:]] == [axis.get_xlabel() for axis in below[2:]]
    assert [len(axis.collections) for axis in above] == [1, 0, 0, 0, 0]


# Figure 3


def points(guidance, scales, dice):
    settings = [(scale, strength) for scale in scales for strength in (0.8, 0.4, 0.6)]
    return [
        {"guidance": guidance, "guidance_scale": scale, "strength": strength, "ideal_dice": value}
        for (scale, strength), value in zip(settings, dice, strict=True)
    ]


POINTS = points("implicit", (1.5, 3.0), (0.5, 0.6, 0.7, 0.5, 0.6, 0.7)) + points(
    "classifier", (10.0,), (0.2, 0.2, 0.8)
)


def test_robustness_is_the_spread_over_the_grid():
    spread = robustness(POINTS)
    assert list(spread) == ["implicit", "classifier"]
    std = np.sqrt(0.02 / 3)
    expected = {"std": std, "range": 0.2, "best": 0.7, "mean": 0.6, "relative_std": std / 0.6, "n": 6}
    assert spread["implicit"] == pytest.approx(expected)
    std = np.sqrt(0.08)
    expected = {"std": std, "range": 0.6, "best": 0.8, "mean": 0.4, "relative_std": std / 0.4, "n": 3}
    assert spread["classifier"] == pytest.approx(expected)


def test_a_guidance_that_finds_nothing_has_no_relative_spread(tmp_path):
    nothing = points("classifier", (10.0,), (0.0, 0.0, 0.0))
    assert robustness(nothing)["classifier"]["relative_std"] is None
    figure = plot_strengths(tmp_path / "f.png", POINTS[:6] + nothing)
    assert "std 0.000\nmax - min 0.000" in figure.legends[1].get_title().get_text()
    # Its spread of 0 must not pass for robustness.
    assert "classifier" not in figure.get_suptitle()


def test_strengths_has_a_curve_for_each_guidance_and_scale(tmp_path):
    figure = plot_strengths(tmp_path / "f.png", POINTS)
    assert is_png_of(tmp_path / "f.png", figure)
    curves = figure.axes[0].lines
    assert [list(line.get_xdata()) for line in curves] == [[0.4, 0.6, 0.8]] * 3
    assert [list(line.get_ydata()) for line in curves] == [[0.6, 0.7, 0.5]] * 2 + [[0.2, 0.8, 0.2]]
    # Guidance differs in colour and line style, scales in marker.
    assert len({(line.get_color(), line.get_linestyle()) for line in curves}) == 2
    assert curves[0].get_marker() != curves[1].get_marker()
    legends = {legend.get_title().get_text(): [t.get_text() for t in legend.get_texts()] for legend in figure.legends}
    assert legends == {
        "implicit guidance, 6 settings:\nbest 0.700, mean 0.600\nstd 0.082 = 14 % of the mean\nmax - min 0.200": [
            "scale 1.5",
            "scale 3",
        ],
        "classifier guidance, 3 settings:\nbest 0.800, mean 0.400\nstd 0.283 = 71 % of the mean\nmax - min 0.600": [
            "scale 10"
        ],
    }


def test_strengths_says_in_words_that_a_small_spread_alone_is_no_robustness(tmp_path):
    """The classifier's std is the smaller one, but of a tenth of the Dice."""
    weak = points("classifier", (10.0,), (0.01, 0.07, 0.1))
    spread = robustness(POINTS[:6] + weak)
    assert spread["classifier"]["std"] < spread["implicit"]["std"]
    caveat = "A small spread is robustness only where ideal Dice is high, too."
    words = plot_strengths(tmp_path / "f.png", POINTS[:6] + weak).get_suptitle()
    assert words == f"Best ideal Dice: implicit. Least std / mean: implicit.\n{caveat}"
    words = plot_strengths(tmp_path / "f.png", POINTS).get_suptitle()
    assert words == f"Best ideal Dice: classifier. Least std / mean: implicit.\n{caveat}"
    assert plot_strengths(tmp_path / "f.png", POINTS[:6]).get_suptitle() == caveat


def test_words_of_strengths_lie_within_the_picture_and_not_on_each_other(tmp_path):
    figure = plot_strengths(tmp_path / "f.png", POINTS)
    axis, renderer = figure.axes[0], figure.canvas.get_renderer()
    parts = [axis.get_tightbbox(renderer), figure._suptitle.get_window_extent(renderer)]
    parts += [legend.get_window_extent(renderer) for legend in figure.legends]
    for part in parts:
        assert figure.bbox.x0 <= part.x0 and part.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= part.y0 and part.y1 <= figure.bbox.y1
    assert not any(a.overlaps(b) for a, b in itertools.combinations(parts, 2))
    # No line of it is broken.
    assert len(figure.get_suptitle().splitlines()) == 2


def test_strengths_shows_one_guidance_while_the_other_is_missing(tmp_path):
    figure = plot_strengths(tmp_path / "f.png", POINTS[:6])
    assert len(figure.axes[0].lines) == 2 and len(figure.legends) == 1


# Figure 4


def cell(method, evaluations, auprc, seed=0):
    facts = {"method": method, "row": f"The row of {method}", "tables": [1], "seed": seed, "auprc": auprc}
    return facts | {"network_evaluations_per_slice": evaluations, "postprocessed": {"auprc": auprc / 2}}


def crowded_cells():
    places = [
        (0, 0.40),
        (0, 0.405),
        (1, 0.41),
        (1, 0.4),
        (1, 0.42),
        (2, 0.41),
        (30, 0.6),
        (45, 0.6),
        (45, 0.61),
        (500, 0.6),
    ]
    return [cell(name, *place) for name, place in zip("abcdefghij", places, strict=True)]


def points_and_names(figure):
    axis = figure.axes[0]
    points = [container.lines[0] for container in axis.containers]
    return axis, {container.get_label(): point for container, point in zip(axis.containers, points, strict=True)}


@pytest.mark.parametrize("chain", ["raw", "postprocessed"])
def test_quality_is_the_mean_over_seeds_at_what_a_slice_costs(chain, tmp_path):
    cells = [cell("threshold", 0, 0.4), cell("ours", 45, 0.6), cell("ours", 45, 0.7, seed=1)]
    figure = plot_quality_against_evaluations(tmp_path / "f.png", cells, chain)
    assert is_png_of(tmp_path / "f.png", figure)
    axis, found = points_and_names(figure)
    part = 1 if chain == "raw" else 0.5
    assert {name: point.get_xydata().tolist() for name, point in found.items()} == {
        "The row of threshold": [[0, pytest.approx(part * 0.4)]],
        "The row of ours": [[45, pytest.approx(part * 0.65)]],
    }
    bar = axis.containers[1].lines[2][0].get_segments()[0]
    assert np.ptp(bar[:, 1]) == pytest.approx(2 * part * np.std([0.6, 0.7], ddof=1))
    assert [point.get_color() for point in found.values()][0] != [point.get_color() for point in found.values()][1]
    assert ("post-processed" in axis.get_ylabel()) == (chain == "postprocessed")


def test_rows_of_table_2_alone_are_dots_without_a_name(tmp_path):
    cells = [cell("threshold", 0, 0.4), cell("ours", 45, 0.6), cell("ours-clipped", 60, 0.5) | {"tables": [2]}]
    axis, found = points_and_names(plot_quality_against_evaluations(tmp_path / "f.png", cells))
    assert list(found) == ["The row of threshold", "The row of ours"] == [text.get_text() for text in axis.texts]
    (dots,) = [line for line in axis.lines if line.get_label() == "rows of Table 2 alone"]
    assert dots.get_xydata().tolist() == [[60, 0.5]]


def test_methods_without_a_network_stand_at_zero_left_of_one(tmp_path):
    figure = plot_quality_against_evaluations(tmp_path / "f.png", crowded_cells())
    axis, _ = points_and_names(figure)
    zero, one, ten, hundred = (axis.transData.transform((x, 0.5))[0] for x in (0, 1, 10, 100))
    frame = axis.get_window_extent()
    assert frame.x0 < zero < one and ten - one == pytest.approx(hundred - ten)
    assert 0.2 * (ten - one) < one - zero < ten - one
    assert [text.get_text() for text in axis.get_xticklabels()] == ["0", "1", "10", "100", "1,000"]


def test_names_cover_neither_each_other_nor_points(tmp_path):
    from matplotlib.text import Text

    figure = plot_quality_against_evaluations(tmp_path / "f.png", crowded_cells())
    axis, found = points_and_names(figure)
    names = {text.get_text(): Text.get_window_extent(text) for text in axis.texts}
    assert list(names) == list(found)
    for (first, a), (second, b) in itertools.combinations(names.items(), 2):
        assert not a.overlaps(b), (first, second)
    frame = axis.get_window_extent()
    pixels = {name: axis.transData.transform(point.get_xydata()[0]) for name, point in found.items()}
    for name, box in names.items():
        assert frame.contains(*box.min) and frame.contains(*box.max), name
        assert not any(box.contains(*pixel) for pixel in pixels.values()), name
