"""From a scan's voxels to slices and back."""

import numpy as np
import pytest
import torch
from data_files import SPACING_MM, brain
from torch.nn.functional import interpolate

from diffusers_cf.data.geometry import (
    display,
    outside_field,
    resample_slices,
    slices_from_volume,
    undisplay,
    volume_from_slices,
)


@pytest.mark.parametrize("field_mm, share", [(40.0, 0.0), (20.0, 0.5), (10.0, 0.7)])
def test_the_share_of_the_foreground_outside_the_field(field_mm, share):
    """20 voxels of 2 mm along x, 8 along y: a field of 20 mm holds the middle 10 of them along x."""
    assert outside_field(np.ones((20, 4, 3), bool), (2.0, 2.0, 5.0), field_mm) == pytest.approx(share)
    assert outside_field(np.zeros((20, 4, 3), bool), (2.0, 2.0, 5.0), field_mm) == 0


def test_display_orientation():
    volume = np.zeros((5, 7, 3), dtype=np.float32)
    volume[4, 5, 2] = 1  # right, anterior
    shown = display(volume)
    assert shown.shape == (3, 7, 5) and np.argwhere(shown).tolist() == [[2, 1, 4]]
    np.testing.assert_array_equal(undisplay(shown), volume)
    four = np.random.default_rng(0).random((2, 5, 7, 3))
    assert display(four).shape == (3, 2, 7, 5)
    np.testing.assert_array_equal(undisplay(display(four)), four)


def test_slices_follow_the_papers_protocol():
    volume, mask = brain()
    found = slices_from_volume("p", volume, mask, SPACING_MM, 32, normalize="p99")
    filled = np.flatnonzero((volume > 0).any(axis=(0, 1, 2)))
    assert found.slices.tolist() == list(range(filled[0], filled[-1] + 1)) and 0 < filled[0] and filled[-1] < 11
    assert found.images.shape == (len(found.slices), 4, 32, 32) and found.images.dtype == np.float32
    np.testing.assert_array_equal(found.labels, mask.any(axis=(0, 1))[found.slices])
    assert 0 < found.labels.sum() < len(found.labels)
    native = slices_from_volume("p", volume, mask, (1, 1, 1), 32, field_mm=32.0, normalize="p99")
    for channel in range(4):
        foreground = volume[channel][volume[channel] > 0]
        assert np.isclose(native.images[:, channel].max(), foreground.max() / np.percentile(foreground, 99))
    np.testing.assert_array_equal(native.masks.sum(axis=(1, 2)), mask.sum(axis=(0, 1))[found.slices])


def test_each_channel_has_its_own_unit_and_the_gain_cancels():
    volume, mask = brain()
    gain = np.array([1, 3, 0.5, 10], dtype=np.float32)[:, None, None, None]
    first, second = (slices_from_volume("p", v, mask, SPACING_MM, 16).images for v in (volume, volume * gain))
    np.testing.assert_allclose(first, second, atol=1e-5)


def test_background_stays_exactly_zero_and_negative_voxels_become_background():
    volume, _ = brain()
    outside = volume == 0
    ringing = np.where(outside, -3, volume)
    found = slices_from_volume("p", ringing, None, SPACING_MM, 29)
    expected = slices_from_volume("p", volume, None, SPACING_MM, 29)
    np.testing.assert_array_equal(found.images, expected.images)
    touched = resample_slices(display(volume > 0), SPACING_MM, 29)[expected.slices] > 0
    assert (expected.images[~touched] == 0).all() and (~touched).any() and found.masks is None


def test_mask_resampling_invents_no_lesion():
    volume, _ = brain()
    mask = np.zeros(volume.shape[1:], dtype=np.uint8)
    mask[10, 15, 5] = 1
    found = slices_from_volume("p", volume, mask, SPACING_MM, 8)
    # 8 x 6 mm of lesion in a pixel of 30 x 30 mm: the slice is unhealthy, the mask has nothing to show.
    assert found.labels.sum() == 1 and found.labels[found.slices == 5] == 1 and not found.masks.any()
    full = slices_from_volume("p", volume, np.ones_like(mask), SPACING_MM, 17)
    assert full.masks[:, 4:13, 4:13].all() and set(np.unique(full.masks)) <= {0, 1}
    drawn = (np.random.default_rng(0).random(mask.shape) < 0.3).astype(np.uint8)
    for size in (9, 23, 61):
        found = slices_from_volume("p", volume, drawn, SPACING_MM, size)
        nothing = ~drawn.any(axis=(0, 1))[found.slices]
        assert not found.masks[nothing].any()
        area = resample_slices(display(drawn).astype(np.float32), SPACING_MM, size)[found.slices]
        assert area[found.masks == 1].min() > 0.49 and area[found.masks == 0].max() < 0.51


def test_whole_factor_equals_area_interpolation_and_growing_bilinear():
    slices = np.random.default_rng(0).random((3, 2, 24, 24)).astype(np.float32)
    expected = interpolate(torch.from_numpy(slices), size=(8, 8), mode="area")
    np.testing.assert_allclose(resample_slices(slices, (10, 10, 1), 8), expected, atol=1e-6)
    small = slices[..., :8, :8]
    expected = interpolate(torch.from_numpy(small), size=(24, 24), mode="bilinear", align_corners=False)
    # Inside; at the rim ours blends with the background outside the frame.
    found = resample_slices(small, (30, 30, 1), 24)
    np.testing.assert_allclose(found[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2], atol=1e-6)


@pytest.mark.parametrize("shape", [(24, 24), (20, 30), (30, 18)])
def test_frames_are_padded_or_cropped_about_their_centre(shape):
    slices = np.random.default_rng(0).random((1, *shape)).astype(np.float32)
    rows, columns = ((24 - n) // 2 for n in shape)
    padded = np.pad(slices, ((0, 0), (max(0, rows),) * 2, (max(0, columns),) * 2))
    r, c = max(0, -rows), max(0, -columns)
    found = resample_slices(slices, (10, 10, 1), 24)
    np.testing.assert_allclose(found, padded[:, r : r + 24, c : c + 24], atol=1e-6)


def test_map_returns_to_the_scans_grid():
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (50, 60, 4)), indexing="ij")
    smooth = (np.exp(-3 * ((x - 0.2) ** 2 + (y + 0.3) ** 2)) * (1 + z)).astype(np.float32)
    spacing = (4.0, 3.5, 5.0)
    maps = resample_slices(display(smooth), spacing, 64)
    back = volume_from_slices(maps, np.arange(4), smooth.shape, spacing)
    inner = (slice(4, -4), slice(4, -4))
    assert back.shape == smooth.shape and np.abs(back - smooth)[inner].max() < 0.01
    assert np.abs(back[::-1] - smooth)[inner].max() > 0.1 and np.abs(back[:, ::-1] - smooth)[inner].max() > 0.1


def test_map_at_the_scans_own_resolution_returns_exactly():
    volume = np.random.default_rng(0).random((24, 24, 5)).astype(np.float32)
    maps = resample_slices(display(volume), (10, 10, 3), 24)
    back = volume_from_slices(maps[1:4], np.array([1, 2, 3]), volume.shape, (10, 10, 3))
    np.testing.assert_allclose(back[..., 1:4], volume[..., 1:4], atol=1e-6)
    assert not back[..., [0, 4]].any()


def test_map_is_zero_outside_the_field_and_full_inside():
    back = volume_from_slices(np.ones((1, 16, 16)), np.array([0]), (30, 20, 1), (10, 10, 3))
    assert (back[3:27] == 1).all() and not back[:3].any() and not back[27:].any()


def test_whole_numbers_give_the_same_slices_as_floats():
    volume, mask = brain()
    for name in ("median", "p99", "none"):
        found, expected = (
            slices_from_volume("p", v, mask, SPACING_MM, 16, normalize=name) for v in (volume.astype(np.int16), volume)
        )
        np.testing.assert_array_equal(found.images, expected.images)
