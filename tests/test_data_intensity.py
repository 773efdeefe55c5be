"""Intensity scales."""

import numpy as np
import pytest
from data_files import SPACING_MM, brain

from diffusers_cf.data.geometry import slices_from_volume
from diffusers_cf.data.intensity import normalize_of, unit_intensity, with_named_scale


def test_scales_of_one_scan_differ_by_one_factor_per_modality():
    volume, mask = brain()
    names = ("median", "p99", "p50", "none")
    images = {name: slices_from_volume("p", volume, mask, SPACING_MM, 16, normalize=name).images for name in names}
    for channel, scan in enumerate(volume):
        foreground = scan[scan > 0]
        units = {"median": 2.5 * np.median(foreground), "p99": np.percentile(foreground, 99), "none": 1}
        for name, unit in (units | {"p50": np.median(foreground)}).items():
            np.testing.assert_allclose(images[name][:, channel] * unit, images["none"][:, channel], rtol=1e-5)
    default = slices_from_volume("p", volume, mask, SPACING_MM, 16).images
    np.testing.assert_array_equal(default, images["median"])


@pytest.mark.parametrize("name", ["p101", "p", "mean", "P99", "", None, 99.0])
def test_unknown_scale(name):
    with pytest.raises(ValueError, match="it must be median, p99"):
        unit_intensity(np.ones(3), name)


def test_an_empty_scan_has_no_scale():
    with pytest.raises(ValueError, match="the scan is empty"):
        unit_intensity(np.zeros(3), "median")


def test_older_files_name_a_percentile():
    older = ({"percentile": 98.5}, {"percentile": None}, {})
    assert [normalize_of(facts) for facts in older] == ["p98.5", "none", "p99"]
    assert with_named_scale({"percentile": 99.0, "size": 3}) == {"size": 3, "normalize": "p99"}
