"""The post-processing chain against its definition."""

import numpy as np
import pytest
import torch

from diffusers_cf.evaluation.postprocessing import (
    PostProcessing,
    eroded_foreground_mask,
    foreground_mask,
    remove_small_components,
)


def square_image(size=20, low=4, high=16, channels=2):
    """One slice whose second channel is tissue in a square [low, high)."""
    images = np.zeros((1, channels, size, size), dtype=np.float32)
    images[0, -1, low:high, low:high] = 0.5
    return images


def test_foreground_is_any_channel_above_zero():
    images = square_image()
    images[0, 0, 0, 0] = 1e-6
    images[0, 0, 1, 1] = -1.0
    expected = images[:, 1] > 0
    expected[0, 0, 0] = True
    np.testing.assert_array_equal(foreground_mask(images), expected)
    np.testing.assert_array_equal(foreground_mask(torch.from_numpy(images)), expected)


def test_erosion_is_a_mean_above_095():
    rng = np.random.default_rng(0)
    images = (rng.random((3, 1, 24, 24)) > 0.04).astype(np.float32)
    eroded = eroded_foreground_mask(images)
    inner = np.lib.stride_tricks.sliding_window_view(images[:, 0], (5, 5), axis=(1, 2)).mean((-1, -2))
    expected = (inner > 0.95) & (images[:, 0, 2:-2, 2:-2] > 0)
    assert expected.any() and not expected.all()
    assert eroded_foreground_mask(np.ones((1, 3, 8, 8))).all()  # an image that fills its frame keeps its border
    np.testing.assert_array_equal(eroded[:, 2:-2, 2:-2], expected)


def test_median_filter_is_the_median_of_25_pixels_of_the_same_slice():
    rng = np.random.default_rng(1)
    maps = rng.random((3, 12, 12)).astype(np.float32)
    result = PostProcessing().apply(maps, np.ones((3, 1, 12, 12), dtype=np.float32))
    expected = np.median(np.lib.stride_tricks.sliding_window_view(maps, (5, 5), axis=(1, 2)), axis=(-1, -2))
    np.testing.assert_array_equal(result[:, 2:-2, 2:-2], expected)
    assert result.dtype == np.float32


def test_a_bright_rim_and_a_speck_vanish_and_a_lesion_stays():
    images = square_image(size=32, low=4, high=28)
    tissue = images[:, 1] > 0
    maps = np.where(tissue & ~eroded_foreground_mask(images), 1.0, 0.0)
    maps[0, 9, 9] = 1.0
    maps[0, 14:21, 14:21] = 1.0
    result = PostProcessing().apply(maps, images)
    assert (result[0, 15:20, 15:20] == 1).all()
    result[0, 14:21, 14:21] = 0
    assert (result == 0).all()


def test_scores_outside_the_foreground_become_the_lowest():
    images = square_image()
    tissue = images[:, 1] > 0
    positive = PostProcessing().apply(np.full((1, 20, 20), 3.0), images)
    assert (positive[~tissue] == 0).all() and positive.max() == 3
    negative = PostProcessing().apply(np.where(tissue, -2.0, 5.0), images)
    assert (negative == -2).all()


def test_components_of_20_voxels_stay_and_of_19_go():
    masks = np.zeros((1, 16, 16), dtype=np.uint8)
    masks[0, 1:5, 1:6] = masks[0, 10:14, 10:15] = 1
    masks[0, 10, 10] = 0
    kept = remove_small_components(masks)
    assert kept.dtype == bool and kept[0, 1:5, 1:6].all() and kept.sum() == 20
    assert remove_small_components(masks[:0]).shape == (0, 16, 16)


def test_components_are_three_dimensional_with_26_neighbours():
    masks = np.zeros((3, 16, 16), dtype=bool)
    masks[0, 2:5, 2:5] = masks[1, 5:8, 5:8] = masks[2, 8:11, 8:11] = True  # 27 voxels that touch at corners
    np.testing.assert_array_equal(remove_small_components(masks), masks)


def test_a_gap_between_slices_separates_components():
    masks = np.zeros((2, 8, 8), dtype=bool)
    masks[:, 2:5, 2:6] = True  # 12 voxels in each of two slices
    assert remove_small_components(masks, slices=np.array([7, 8])).sum() == 24
    assert remove_small_components(masks, slices=np.array([7, 9])).sum() == 0


def test_components_follow_slice_indices_given_in_any_order():
    rng = np.random.default_rng(3)
    masks = rng.random((6, 12, 12)) > 0.85
    slices = np.array([10, 11, 12, 13, 20, 21])
    kept = remove_small_components(masks, slices)
    assert kept.any() and kept.sum() < masks.sum()
    shuffle = rng.permutation(6)
    np.testing.assert_array_equal(remove_small_components(masks[shuffle], slices[shuffle]), kept[shuffle])


def test_the_filter_across_slices_is_a_gaussian_mean_over_the_tissue():
    """Weights exp(-d^2 / 2 s^2) of the slice numbers' distances d; slices without tissue at a pixel have no say there."""
    rng = np.random.default_rng(0)
    maps, images, slices = rng.random((4, 8, 8)), np.ones((4, 1, 8, 8)), np.array([3, 4, 6, 20])
    images[1, :, 2, 2] = 0
    found = PostProcessing(1, 1.5, clear_rim=False).apply(maps, images, slices)
    inside = images[:, 0] > 0
    weights = np.exp(-(((slices[:, None] - slices) / 1.5) ** 2) / 2)
    expected = np.einsum("ij,jhw->ihw", weights, maps * inside) / np.einsum("ij,jhw->ihw", weights, inside)
    np.testing.assert_allclose(found, np.where(inside, expected, 0), rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(found[3], maps[3], rtol=1e-6)  # too far from the others


def test_without_filters_and_rim_only_the_background_is_cleared():
    images, maps = square_image(), np.random.default_rng(0).random((1, 20, 20)).astype(np.float32)
    found = PostProcessing(1, clear_rim=False).apply(maps, images)
    np.testing.assert_array_equal(found, np.where((images > 0).any(axis=1), maps, 0))


def test_a_map_counts_where_the_bright_channel_is_bright_in_this_patient():
    """w = min(max(z, 0) / 3, 1)^2 with z = (v - median) / (1.4826 MAD) over the channel's tissue."""
    rng = np.random.default_rng(2)
    images = rng.normal(5, 1, (4, 2, 8, 8)).clip(0.1).astype(np.float32)
    images[0, 1, 0, :4] = 0, 7.5, 30, 1  # background, bright, very bright, dark
    maps = np.full((4, 8, 8), 0.5, np.float32)
    chain = PostProcessing(1, clear_rim=False, bright_channel=1)
    found = chain.apply(maps, images)
    tissue = images[:, 1][images[:, 1] > 0]
    z = (images[:, 1] - np.median(tissue)) / (1.4826 * np.median(abs(tissue - np.median(tissue))))
    expected = 0.5 * np.clip(z / 3, 0, 1) ** 2
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert found[0, 0].tolist()[2:4] == [0.5, 0] and 0 < found[0, 0, 1] < 0.5
    np.testing.assert_allclose(chain.apply(maps[:1], images[:1], patient=images), found[:1])
    images[:, 1] = 0  # a patient without this channel
    np.testing.assert_array_equal(chain.apply(maps, images), maps)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(True, PostProcessing()), (False, None), ({"bright_channel": 0}, PostProcessing(bright_channel=0))],
)
def test_a_models_settings_name_its_chain(value, expected):
    assert PostProcessing.of({"postprocess": value}) == expected
    assert expected is None or PostProcessing.of({"postprocess": expected.as_setting}) == expected
    assert PostProcessing.of({"postprocess": value}, median_size=3).median_size == 3


@pytest.mark.parametrize(
    "value",
    ["yes", {"median": 3}, {"median_size": 4}, {"slice_sigma": -1}, {"slice_sigma": "1"}, {"bright_channel": -1}],
)
def test_a_chain_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match="median_size|slice_sigma|bright_channel"):
        PostProcessing.of({"postprocess": value})
