"""The bootstrap of the pooled AUPRC against scikit-learn on the pixels of the drawn patients."""

import json
import zlib

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.bootstrap import Bootstrap, bootstrap_auprc, bootstrap_mean, mean_of_runs
from diffusers_cf.evaluation.pixel_counts import PixelCounts


PATIENTS = [f"p{i}" for i in range(8)]


def patient_pixels(seed, shift=1.0, n=500, healthy=("p0",)):
    """Scores and masks of each patient; the masks are the same whatever the seed and shift."""
    rng, pixels = np.random.default_rng(seed), {}
    for index, patient in enumerate(PATIENTS):
        masks = np.random.default_rng(index).random(n) < (0 if patient in healthy else 0.05 + 0.02 * index)
        # a patient's own difficulty, the same for every method
        hardness = np.random.default_rng(100 + index).normal(0, 0.8)
        scores = rng.normal(size=n) + masks * (shift + hardness)
        pixels[patient] = np.round(scores, 2).astype(np.float32), masks
    return pixels


def counted(pixels, **kwargs):
    counts = {patient: PixelCounts(**kwargs) for patient in pixels}
    for patient, (scores, masks) in pixels.items():
        counts[patient].update(scores, masks)
    return counts


def pooled(pixels, patients):
    """scikit-learn's average precision of these patients, each as often as it is named."""
    scores, masks = (np.concatenate([pixels[patient][i] for patient in patients]) for i in (0, 1))
    return average_precision_score(masks, scores)


def draws(samples, patients=PATIENTS):
    """Patients of each draw, as the bootstrap's weights count them."""
    random = np.random.default_rng([0, zlib.crc32("\n".join(patients).encode())])
    weights = random.multinomial(len(patients), np.full(len(patients), 1 / len(patients)), size=samples)
    return [np.repeat(patients, row) for row in weights]


def drawn_runs(values):
    """Means over runs that are drawn, too; values (runs, samples)."""
    values = np.asarray(values)
    runs = np.random.default_rng([0, len(values)]).integers(len(values), size=values.shape)
    return np.array([np.mean([values[run, draw] for run in runs[:, draw]]) for draw in range(values.shape[1])])


def over_runs(runs, samples):
    """The bootstrap of a method from the pixels of its runs."""
    return mean_of_runs([bootstrap_auprc(counted(run), samples) for run in runs])


def test_draws_are_measured_as_scikit_learn_measures_their_pixels():
    first, second = patient_pixels(1), patient_pixels(2)
    # 70 draws are more than two blocks, and no multiple of one.
    found = over_runs([first, second], 70)
    expected = drawn_runs([[pooled(run, names) for names in draws(70)] for run in (first, second)])
    np.testing.assert_allclose(found.samples, expected, rtol=0, atol=1e-12)
    assert found.value == pytest.approx((pooled(first, PATIENTS) + pooled(second, PATIENTS)) / 2, abs=1e-12)
    assert found.interval() == pytest.approx(np.percentile(expected, [2.5, 97.5]), abs=1e-12)


def test_a_difference_is_paired_and_averages_seeds():
    ours, others = [patient_pixels(1, 2.0), patient_pixels(2, 2.0)], [patient_pixels(3), patient_pixels(4)]
    first, second = over_runs(ours, 200), over_runs(others, 200)
    assert first.minus(first) == {"difference": 0, "by_run": [0, 0], "interval": [0, 0], "p_worse": 1}
    found = first.minus(second)
    means = [drawn_runs([[pooled(run, d) for d in draws(200)] for run in runs]) for runs in (ours, others)]
    differences = np.subtract(*means)
    assert found["interval"] == pytest.approx(np.percentile(differences, [2.5, 97.5]), abs=1e-12)
    assert found["p_worse"] == np.mean(differences <= 0)
    by_run = np.subtract(*([pooled(run, PATIENTS) for run in runs] for runs in (ours, others)))
    assert found["by_run"] == pytest.approx(by_run) and found["difference"] == pytest.approx(by_run.mean())
    # two separate intervals are together wider
    assert np.ptp(found["interval"]) < 0.7 * (np.ptp(first.interval()) + np.ptp(second.interval()))


def test_bins_of_different_precision_come_together():
    pixels = patient_pixels(1, n=6000)
    pixels["p3"] = (np.random.default_rng(0).random(6000, dtype=np.float32), pixels["p3"][1])
    counts = counted(pixels, max_bins=4096)
    assert counts["p3"].shift > counts["p1"].shift == 0
    expected = sum(counts.values(), start=PixelCounts()).average_precision()
    assert bootstrap_auprc(counts, samples=1).value == pytest.approx(expected, abs=1e-12)


def test_few_common_bins_change_little():
    rng = np.random.default_rng(0)
    pixels = {name: (rng.random(20_000, dtype=np.float32), rng.random(20_000) < 0.05) for name in PATIENTS}
    pixels = {name: (scores + 0.4 * masks.astype(np.float32), masks) for name, (scores, masks) in pixels.items()}
    found = bootstrap_auprc(counted(pixels), samples=1)
    assert found.value == pytest.approx(pooled(pixels, PATIENTS), abs=5e-4)


def test_draws_without_a_lesion_are_left_out():
    pixels = patient_pixels(1, healthy=PATIENTS[1:])
    pixels["p0"] = (pixels["p0"][0], np.arange(500) < 20)
    found = bootstrap_auprc(counted(pixels), samples=100)
    without = np.array(["p0" not in names for names in draws(100)])
    assert 0 < without.sum() < 100
    np.testing.assert_array_equal(np.isnan(found.samples), without)
    assert np.isfinite(found.interval()).all()


def test_undefined_values_are_none():
    nothing = bootstrap_auprc(counted(patient_pixels(1, healthy=PATIENTS)), samples=20)
    assert nothing.minus(nothing) == {"difference": None, "by_run": [None], "interval": None, "p_worse": None}
    one = bootstrap_auprc({"p1": counted(patient_pixels(1))["p1"]}, samples=20)
    assert one.minus(one) == {"difference": 0, "by_run": [0], "interval": None, "p_worse": None}
    assert mean_of_runs([one, nothing]).value is None


def test_methods_on_other_patients_are_not_compared():
    def of(pixels):
        return bootstrap_auprc(counted(pixels), samples=5)

    whole, other_masks = of(patient_pixels(2)), of(patient_pixels(2, healthy=("p6",)))
    fewer = of({patient: pixels for patient, pixels in patient_pixels(2).items() if patient != "p5"})
    for other in (fewer, other_masks, mean_of_runs([fewer, whole])):
        with pytest.raises(InputError, match="not measured on the same pixels"):
            other.minus(whole)


def test_runs_with_test_sets_of_their_own_are_drawn_each_for_itself():
    halves = PATIENTS[:4], PATIENTS[4:]
    pixels = [{name: patient_pixels(seed)[name] for name in half} for seed, half in enumerate(halves)]
    values = [[pooled(run, names) for names in draws(40, half)] for half, run in zip(halves, pixels, strict=True)]
    np.testing.assert_allclose(over_runs(pixels, 40).samples, drawn_runs(values), rtol=0, atol=1e-12)
    # with one stream of random numbers the draws of both halves would be the same
    picks = [[sorted(map(half.index, names)) for names in draws(40, half)] for half in halves]
    assert picks[0] != picks[1]


def test_means_of_patients_are_drawn_as_their_pixels_are():
    runs = [{"a": 0.1, "b": 0.5, "c": 0.9}, {"a": 0.3, "b": 0.3, "c": 0.6}]
    found = mean_of_runs([bootstrap_mean(run, samples=60) for run in runs])
    assert found.value == pytest.approx(0.45) and found.values == pytest.approx([0.5, 0.4])
    means = [[np.mean([run[name] for name in names]) for names in draws(60, list("abc"))] for run in runs]
    np.testing.assert_allclose(found.samples, drawn_runs(means), rtol=0, atol=1e-12)


def test_a_bootstrap_survives_json():
    found = bootstrap_auprc(counted(patient_pixels(1, healthy=PATIENTS[1:])), samples=30)
    again = Bootstrap.from_json(json.loads(json.dumps(found.to_json())))
    np.testing.assert_allclose(again.samples, found.samples, rtol=0, atol=1e-6)
    assert (again.value, again.test_sets) == (found.value, found.test_sets)
