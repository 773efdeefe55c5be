"""Every measure of a result against its definition; batches, shards and interruptions do not change it."""

import json

import numpy as np
import pytest
import torch
from evaluation_data import FakeDataset
from sklearn.metrics import average_precision_score, roc_auc_score

from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.bootstrap import bootstraps_of_file, read_patient_counts
from diffusers_cf.evaluation.pixel_counts import PixelCounts
from diffusers_cf.evaluation.postprocessing import PostProcessing, remove_small_components
from diffusers_cf.evaluation.processes import Share
from diffusers_cf.evaluation.protocol import begin_parts, bootstrap_interval, dice, evaluate


def second_channel(images):
    return images[:, 1]


def measured(dataset, anomaly_map=second_channel, **options):
    return evaluate(anomaly_map, dataset, progress=False, **options)


def without_time(result):
    return {key: value for key, value in result.items() if key != "seconds_per_slice"}


def rows_of(dataset):
    return {str(name): np.flatnonzero(dataset.patients == name) for name in np.unique(dataset.patients)}


def parts_of(result, dataset):
    """The result and its post-processed part, each with the maps they are of."""
    maps = dataset.images[:, 1]
    return (result, maps), (result["postprocessed"], PostProcessing().apply(maps, dataset.images))


def test_every_pooled_measure_against_its_definition():
    dataset = FakeDataset()
    result = measured(dataset, threshold=0.7, network_evaluations_per_slice=7)
    lesion, foreground = dataset.masks > 0, (dataset.images > 0).any(1)
    for part, maps in parts_of(result, dataset):
        assert part["auprc"] == pytest.approx(average_precision_score(lesion.ravel(), maps.ravel()), abs=1e-9)
        expected = average_precision_score(lesion[foreground], maps[foreground])
        assert part["foreground_auprc"] == pytest.approx(expected, abs=1e-9)
        assert part["prevalence"] == pytest.approx(lesion.mean())
        assert part["foreground_prevalence"] == pytest.approx(lesion[foreground].mean())
        best = max(dice(maps >= t, lesion) for t in np.unique(maps))
        assert part["ideal_dice"] == pytest.approx(best, abs=1e-9)
        assert dice(maps >= part["ideal_threshold"], lesion) == pytest.approx(best, abs=1e-9)
        best = max(dice(maps[foreground] >= t, lesion[foreground]) for t in np.unique(maps))
        assert part["foreground_ideal_dice"] == pytest.approx(best, abs=1e-9)
        scores = [m[f].mean() for m, f in zip(maps, foreground, strict=True)]
        assert part["slice_auroc"] == pytest.approx(roc_auc_score(dataset.labels, scores), abs=1e-9)
    assert result["postprocessed"]["auprc"] > result["auprc"] + 0.05
    assert result["n_slices"] == 15 and result["n_patients"] == 3
    assert result["network_evaluations_per_slice"] == 7 and result["seconds_per_slice"] > 0


def test_a_bright_background_counts_for_all_pixels_only():
    dataset = FakeDataset()
    dark = measured(dataset)
    result = measured(dataset, lambda images: images[:, 1] + 0.9 * (images.sum(1) == 0))
    for name in ("foreground_auprc", "foreground_ideal_dice", "slice_auroc", "postprocessed"):
        assert result[name] == dark[name]
    assert result["auprc"] < dark["auprc"] - 0.1 and result["ideal_dice"] < dark["ideal_dice"] - 0.1


@pytest.mark.parametrize("threshold", [0.62, {"raw": 0.62, "postprocessed": 0.5}, None])
def test_dice_per_patient_at_a_given_and_at_the_ideal_threshold(threshold):
    dataset = FakeDataset()
    result = measured(dataset, threshold=threshold)
    for chain, (part, maps) in zip(("raw", "postprocessed"), parts_of(result, dataset), strict=True):
        found, limit = part["per_patient_dice"], part["ideal_threshold"]
        if threshold is not None:
            limit = threshold[chain] if isinstance(threshold, dict) else threshold
        expected = {}
        for name, rows in rows_of(dataset).items():
            marked = maps[rows] >= limit
            marked = remove_small_components(marked, dataset.slices[rows]) if chain == "postprocessed" else marked
            expected[name] = dice(marked, dataset.masks[rows])
        assert found["threshold"] == limit and found["patients"] == list(expected)
        assert found["values"] == pytest.approx(list(expected.values()), abs=1e-12)
        assert found["mean"] == pytest.approx(np.mean(found["values"]))
        low, high = found["interval"]
        assert min(found["values"]) <= low < found["mean"] < high <= max(found["values"])
    assert ("upper bound" in result["protocol"]["per_patient_dice"]) == (threshold is None)


def test_auprc_of_each_patient_and_of_lesions_by_size():
    dataset = FakeDataset()
    dataset.masks[dataset.patients == "patient_b"] = 0
    dataset.masks[np.flatnonzero(dataset.patients == "patient_b")[0], 10, 10:12] = 1  # far below 3 % of the foreground
    for part, maps in parts_of(measured(dataset, threshold=0.62), dataset):
        pixels, shares = {}, {}
        for name, rows in rows_of(dataset).items():
            pixels[name] = dataset.masks[rows].ravel(), maps[rows].ravel()
            shares[name] = dataset.masks[rows].sum() / (dataset.images[rows] > 0).any(axis=1).sum()
        found, sizes = part["per_patient_auprc"], part["by_lesion_size"]
        expected = {name: average_precision_score(*values) for name, values in pixels.items()}
        assert found["patients"] == list(expected) and found["values"] == pytest.approx(list(expected.values()))
        assert sizes["small"]["patients"] == ["patient_b"] and shares["patient_b"] < 0.03
        dice_of = dict(zip(part["per_patient_dice"]["patients"], part["per_patient_dice"]["values"], strict=True))
        for size in sizes.values():
            low, high = size["share_of_foreground"]
            assert size["patients"] == [patient for patient, share in shares.items() if low <= share < high]
            if not size["patients"]:
                assert size["auprc"] is size["ideal_dice"] is size["per_patient_dice"] is None
                continue
            pooled = [np.concatenate([pixels[patient][i] for patient in size["patients"]]) for i in (0, 1)]
            assert size["auprc"] == pytest.approx(average_precision_score(*pooled))
            assert size["per_patient_auprc"] == pytest.approx(np.mean([expected[p] for p in size["patients"]]))
            assert size["per_patient_dice"] == pytest.approx(np.mean([dice_of[p] for p in size["patients"]]))


@pytest.mark.parametrize(
    ("how", "calls"),
    [
        ({"batch_size": 1}, [1] * 15), ({"batch_size": 4}, [4, 4, 4, 3]), ({"batch_size": None}, [15]),
        ({"whole_patients": True}, [5, 4, 6]),
    ],
)  # fmt: skip
def test_the_result_does_not_depend_on_batches_or_the_order_of_rows(how, calls):
    sizes = []
    found = measured(FakeDataset().shuffled(), lambda images: sizes.append(len(images)) or images[:, 1], **how)
    assert sizes == calls
    assert without_time(found) == without_time(measured(FakeDataset(), batch_size=64))


def test_a_method_of_whole_patients_also_sees_the_slices_that_are_not_measured():
    data = FakeDataset().shuffled()
    chosen, seen = np.arange(0, len(data), 2), []

    def relative(images):
        """The brightness of a pixel relative to the mean of the whole scan."""
        seen.append(len(images))
        return images[:, 1] / images[:, 1].mean()

    result = measured(data, relative, indices=chosen, whole_patients=True)
    assert sorted(seen) == [4, 5, 6] and result["n_slices"] == len(chosen)
    scores = np.zeros(data.masks.shape, np.float32)
    for rows in rows_of(data).values():
        scores[rows] = relative(torch.from_numpy(data.images[rows]))
    expected = average_precision_score(data.masks[chosen].ravel(), scores[chosen].ravel())
    assert result["auprc"] == pytest.approx(expected, abs=1e-6)


def test_a_smaller_map_is_upsampled_and_nothing_else():
    dataset = FakeDataset()

    def halved(images):
        return torch.nn.functional.avg_pool2d(images[:, 1:], 2)[:, 0]

    def restored(images):
        return torch.nn.functional.interpolate(halved(images)[:, None], scale_factor=2, mode="bilinear")[:, 0]

    small = measured(dataset, halved)["auprc"]
    assert small == pytest.approx(measured(dataset, restored)["auprc"], abs=1e-6)
    assert abs(small - measured(dataset)["auprc"]) > 0.01


@pytest.mark.parametrize("shape", [(1, 24, 24), (4, 48, 48), (4, 2, 24, 24), (4, 24)])
def test_a_map_of_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match="anomaly_map must return|for 4 slices"):
        measured(FakeDataset((4,)), lambda images: torch.zeros(shape))


def test_nan_in_a_map_names_the_patient():
    def broken(images):
        return images[:, 0] * (float("nan") if len(images) == 4 else 1)

    with pytest.raises(InputError, match="patient_b: .* NaN"):
        measured(FakeDataset(), broken, whole_patients=True)


def test_a_patient_without_lesion_has_no_dice_but_counts_elsewhere():
    dataset = FakeDataset()
    dataset.masks[dataset.patients == "patient_b"] = 0
    for threshold in (0.6, None):
        result = measured(dataset, threshold=threshold)
        assert result["per_patient_dice"]["patients"] == ["patient_a", "patient_c"] and result["n_patients"] == 3
        lesion, maps = dataset.masks > 0, dataset.images[:, 1]
        assert result["auprc"] == pytest.approx(average_precision_score(lesion.ravel(), maps.ravel()), abs=1e-9)


def test_measures_are_none_without_lesions():
    dataset = FakeDataset()
    dataset.masks[:], dataset.labels[:] = 0, 0
    result = json.loads(json.dumps(measured(dataset), allow_nan=False))
    for part in (result, result["postprocessed"]):
        for name in ("auprc", "ideal_dice", "ideal_threshold", "foreground_auprc", "slice_auroc"):
            assert part[name] is None
        expected = {"patients": [], "values": [], "mean": None, "interval": None, "threshold": None}
        assert part["per_patient_dice"] == expected


def test_the_file_of_counts_adds_up_to_the_result(tmp_path):
    dataset, path = FakeDataset().shuffled(), tmp_path / "RESULT.counts.npz"
    result = measured(dataset, counts_path=path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    for chain, part in (("raw", result), ("postprocessed", result["postprocessed"])):
        patients = read_patient_counts(path, chain)
        assert list(patients) == ["patient_a", "patient_b", "patient_c"]
        total, each = sum(patients.values(), start=PixelCounts()), part["per_patient_auprc"]["values"]
        assert total.average_precision() == pytest.approx(part["auprc"], abs=1e-12)
        assert total.ideal_dice()[0] == pytest.approx(part["ideal_dice"], abs=1e-12)
        assert [counts.average_precision() for counts in patients.values()] == pytest.approx(each, abs=1e-12)
        assert bootstraps_of_file(path, samples=5)[chain]["value"] == pytest.approx(part["auprc"])


class Counting:
    """A map that counts its calls and is interrupted at one of them."""

    def __init__(self, stop_at=None):
        self.calls, self.stop_at = 0, stop_at

    def __call__(self, images):
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        return images[:, 1]


@pytest.mark.parametrize("threshold", [None, {"raw": 0.5, "postprocessed": 0.3}])
def test_shards_add_up_to_the_result_of_one_process(threshold, tmp_path):
    data, options = FakeDataset().shuffled(), {"threshold": threshold, "batch_size": 1}
    counts = [tmp_path / f"{name}.counts.npz" for name in ("one", "several")]
    expected, maps = measured(data, counts_path=counts[0], **options), [Counting(), Counting(), Counting()]
    for index in (0, 1):
        assert measured(data, maps[index], parts=tmp_path / "parts", share=Share(index, 2), **options) is None
    found = measured(data, maps[2], parts=tmp_path / "parts", counts_path=counts[1], **options)
    assert sorted(one.calls for one in maps) == [0, 6, 9]  # patients of 5, 4 and 6 slices
    assert without_time(found) == without_time(expected)
    for one, several in zip(*(read_patient_counts(path).values() for path in counts), strict=True):
        assert np.array_equal(one.positives, several.positives) and np.array_equal(one.scores, several.scores)


def test_an_interrupted_run_continues_with_the_missing_patients(tmp_path):
    data, options = FakeDataset(), {"batch_size": 1}
    with pytest.raises(KeyboardInterrupt):
        measured(data, Counting(stop_at=11), parts=tmp_path / "parts", **options)
    rest = Counting()
    found = measured(data, rest, parts=tmp_path / "parts", **options)
    assert rest.calls == 6  # of the last patient
    assert without_time(found) == without_time(measured(data, **options))


def test_parts_of_another_run_are_refused(tmp_path):
    begin_parts(tmp_path / "parts", {"method": "a", "sizes": (1, 2)})
    begin_parts(tmp_path / "parts", {"method": "a", "sizes": [1, 2]})
    with pytest.raises(InputError, match="parts: .* other method"):
        begin_parts(tmp_path / "parts", {"method": "b", "sizes": (1, 2)})


def test_dice_by_hand():
    assert dice([1, 1, 0, 0], [1, 0, 1, 0]) == 0.5
    assert dice([0, 0], [1, 0]) == 0 and dice([1, 1], [1, 1]) == 1 and dice([1, 0], [0, 0]) is None


def test_the_bootstrap_interval_is_that_of_a_mean():
    values = np.random.default_rng(0).normal(0.6, 0.1, 400)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=1e-3)
    assert bootstrap_interval(values) == [low, high] != bootstrap_interval(values, seed=1)
    assert bootstrap_interval([0.5]) is None
