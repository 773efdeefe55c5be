import numpy as np
import pytest
import torch

from diffusers_cf.baselines import BASELINES, make_baseline
from diffusers_cf.errors import InputError


def patient_images(n=3, size=16, seed=0):
    """float32 (N, 2, H, W), channels t1 and flair, background 0 round a square."""
    images = np.zeros((n, 2, size, size), dtype=np.float32)
    images[:, :, 2:-2, 2:-2] = np.random.default_rng(seed).gamma(4, 0.15, (n, 2, size - 4, size - 4))
    return torch.from_numpy(images)


def test_ids_are_those_of_table_1():
    assert list(BASELINES) == ["threshold", "threshold-median", "threshold-robust-z", "threshold-<modality>"]


@pytest.mark.parametrize(("method", "channel"), [("threshold-t1", 0), ("threshold-FLAIR", 1)])
def test_plain_thresholding_is_the_intensity(method, channel):
    images = patient_images()
    maps = make_baseline(method, ["t1", "flair"]).anomaly_map(images)
    assert torch.equal(maps, images[:, channel])


def test_equalised_intensity_is_uniform_in_the_foreground_and_zero_outside():
    images = patient_images(size=32)
    maps = make_baseline("threshold", ["T1", "FLAIR"]).anomaly_map(images)
    foreground = (images > 0).any(1)
    assert maps.shape == (3, 32, 32) and maps.dtype == torch.float32
    assert (maps[~foreground] == 0).all()
    levels = np.linspace(0.05, 0.95, 19)
    np.testing.assert_allclose(np.quantile(maps[foreground], levels), levels, atol=0.01)


def test_equalisation_keeps_the_order_of_intensities():
    images = patient_images()
    flair, maps = images[:, 1], make_baseline("threshold", ["t1", "flair"]).anomaly_map(images)
    foreground = (images > 0).any(1)
    order = flair[foreground].argsort()
    sorted_scores = maps[foreground][order]
    assert (sorted_scores.diff() >= 0).all()
    # Floating point throughout: no intensity falls together with another as integer levels would.
    assert len(sorted_scores.unique()) > 0.99 * len(flair[foreground].unique())


def test_equalisation_takes_out_the_gain_of_a_scanner():
    images, method = patient_images(), make_baseline("threshold", ["t1", "flair"])
    torch.testing.assert_close(method.anomaly_map(images * 3.7), method.anomaly_map(images), atol=1e-3, rtol=0)


def test_equalisation_is_that_of_the_patient_not_of_the_slice():
    images, method = patient_images(), make_baseline("threshold", ["t1", "flair"])
    images[0] *= 2
    maps = method.anomaly_map(images)
    assert method.whole_patient
    assert maps[0].mean() > 1.3 * maps[1].mean()


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


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("threshold", "needs the modality flair, but the images hold t1, t2"),
        ("threshold-t1ce", "needs the modality t1ce, but the images hold t1, t2"),
        ("threshold-", "there is no method threshold-; the methods are threshold,"),
        ("treshold", "there is no method treshold; the methods are threshold,"),
    ],
)
def test_a_wrong_id_or_modality_is_named(method, message):
    with pytest.raises(InputError, match=message):
        make_baseline(method, ["t1", "t2"])
