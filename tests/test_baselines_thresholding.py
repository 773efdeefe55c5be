import numpy as np
import pytest
import torch

from diffusers_cf.baselines import make_baseline


def patient_images(size=16):
    """float32 (3, 2, H, W), channels t1 and flair, background 0 around a square."""
    images = np.zeros((3, 2, size, size), dtype=np.float32)
    images[:, :, 2:-2, 2:-2] = np.random.default_rng(0).gamma(4, 0.15, (3, 2, size - 4, size - 4))
    return torch.from_numpy(images)


@pytest.mark.parametrize(("method", "channel"), [("threshold-t1", 0), ("threshold-FLAIR", 1)])
def test_plain_thresholding_is_the_intensity(method, channel):
    images = patient_images()
    assert torch.equal(make_baseline(method, ["t1", "flair"]).anomaly_map(images), images[:, channel])


def test_equalised_intensity_is_uniform_in_the_foreground_and_zero_outside():
    images = patient_images(size=32)
    images[0, 1, 5, 5] = 0  # no FLAIR, but foreground by T1
    maps, inside = make_baseline("threshold", ["T1", "FLAIR"]).anomaly_map(images), (images > 0).any(1)
    assert maps.shape == (3, 32, 32) and maps.dtype == torch.float32 and (maps[~inside] == 0).all()
    levels = np.linspace(0.05, 0.95, 19)
    np.testing.assert_allclose(np.quantile(maps[inside], levels), levels, atol=0.01)
    # the order stays, and unlike integer levels the scores tie few intensities
    scores = maps[inside][images[:, 1][inside].argsort()]
    assert (scores.diff() >= 0).all() and len(scores.unique()) > 0.99 * len(images[:, 1][inside].unique())


def test_equalisation_removes_the_gain_of_a_scanner_but_not_that_of_a_slice():
    images, method = patient_images(), make_baseline("threshold", ["t1", "flair"])
    torch.testing.assert_close(method.anomaly_map(images * 3.7), method.anomaly_map(images), atol=1e-3, rtol=0)
    images[0] *= 2
    maps = method.anomaly_map(images)
    assert method.whole_patient and maps[0].mean() > 1.3 * maps[1].mean()


@pytest.mark.parametrize("method", ["threshold-median", "threshold-robust-z"])
def test_flair_on_a_scale_of_the_patient(method):
    images, made = patient_images(), make_baseline(method, ["t1", "flair"])
    flair = images[:, 1]
    values = flair[flair > 0].numpy()
    median = np.median(values)
    z = (values - median) / (1.4826 * np.median(np.abs(values - median)))
    expected = values / (2.5 * median) if method == "threshold-median" else z + 6
    maps = made.anomaly_map(images)
    np.testing.assert_allclose(maps[flair > 0], expected.clip(min=0), rtol=1e-4)
    assert made.whole_patient and (maps[flair == 0] == 0).all() and (maps >= 0).all()
    torch.testing.assert_close(made.anomaly_map(3.7 * images), maps, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", ["threshold", "threshold-median", "threshold-robust-z"])
def test_an_empty_patient_has_an_empty_map(method):
    assert (make_baseline(method, ["flair"]).anomaly_map(torch.zeros(2, 1, 8, 8)) == 0).all()
    assert make_baseline(method, ["flair"]).anomaly_map(torch.ones(2, 1, 8, 8)).isfinite().all()
