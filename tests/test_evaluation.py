import json

import numpy as np
import pytest
import torch
from evaluation_data import FakeDataset
from sklearn.metrics import average_precision_score, roc_auc_score

from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.postprocessing import postprocess_maps, remove_small_components
from diffusers_cf.evaluation.protocol import bootstrap_interval, dice, evaluate, read_counts, write_result


def second_channel(images):
    return images[:, 1]


def without_time(result):
    return {key: value for key, value in result.items() if key != "seconds_per_slice"}


def test_every_measure_against_its_definition():
    dataset = FakeDataset()
    result = evaluate(second_channel, dataset, threshold=0.7, progress=False, network_evaluations_per_slice=7)
    for name, maps in (
        ("raw", dataset.images[:, 1]),
        ("post", postprocess_maps(dataset.images[:, 1], dataset.images)),
    ):
        part = result if name == "raw" else result["postprocessed"]
        lesion, foreground = dataset.masks > 0, (dataset.images > 0).any(1)
        assert part["auprc"] == pytest.approx(average_precision_score(lesion.ravel(), maps.ravel()), abs=1e-9)
        expected = average_precision_score(lesion[foreground], maps[foreground])
        assert part["foreground_auprc"] == pytest.approx(expected, abs=1e-9)
        assert part["prevalence"] == pytest.approx(lesion.mean())
        assert part["foreground_prevalence"] == pytest.approx(lesion[foreground].mean())
        values = [dice(maps >= t, lesion) for t in np.unique(maps)]
        assert part["ideal_dice"] == pytest.approx(max(values), abs=1e-9)
        assert dice(maps >= part["ideal_threshold"], lesion) == pytest.approx(part["ideal_dice"], abs=1e-9)
        values = [dice(maps[foreground] >= t, lesion[foreground]) for t in np.unique(maps)]
        assert part["foreground_ideal_dice"] == pytest.approx(max(values), abs=1e-9)
        scores = [m[f].mean() for m, f in zip(maps, foreground, strict=True)]
        assert part["slice_auroc"] == pytest.approx(roc_auc_score(dataset.labels, scores), abs=1e-9)
    assert result["postprocessed"]["auprc"] > result["auprc"] + 0.05
    assert result["n_slices"] == 15 and result["n_patients"] == 3
    assert result["network_evaluations_per_slice"] == 7 and result["seconds_per_slice"] > 0
    assert set(result["per_patient_dice"]) == {"patients", "values", "mean", "interval", "threshold"}
    assert "24 x 24" in result["protocol"]["resolution"]


def test_a_bright_background_counts_for_all_pixels_only():
    dataset = FakeDataset()

    def bright(images):
        return images[:, 1] + 0.9 * (images.sum(1) == 0)

    dark, result = (evaluate(method, dataset, progress=False) for method in (second_channel, bright))
    for name in ("foreground_auprc", "foreground_ideal_dice", "slice_auroc", "postprocessed"):
        assert result[name] == dark[name]
    assert result["auprc"] < dark["auprc"] - 0.1
    assert result["ideal_dice"] < dark["ideal_dice"] - 0.1
    assert result["per_patient_dice"]["threshold"] == result["ideal_threshold"] != dark["ideal_threshold"]


def expected_patient_dice(dataset, threshold, postprocessed):
    maps = dataset.images[:, 1]
    values = []
    for name in np.unique(dataset.patients):
        rows = np.flatnonzero(dataset.patients == name)
        found = maps[rows] >= threshold
        if postprocessed:
            found = postprocess_maps(maps[rows], dataset.images[rows]) >= threshold
            found = remove_small_components(found, dataset.slices[rows])
        values.append(dice(found, dataset.masks[rows]))
    return values


@pytest.mark.parametrize("threshold", [0.62, None])
def test_dice_per_patient_at_a_given_and_at_the_ideal_threshold(threshold):
    dataset = FakeDataset()
    result = evaluate(second_channel, dataset, threshold=threshold, progress=False)
    for postprocessed, part in ((False, result), (True, result["postprocessed"])):
        found = part["per_patient_dice"]
        assert found["threshold"] == (part["ideal_threshold"] if threshold is None else threshold)
        assert found["patients"] == ["patient_a", "patient_b", "patient_c"]
        expected = expected_patient_dice(dataset, found["threshold"], postprocessed)
        assert found["values"] == pytest.approx(expected, abs=1e-12)
        assert found["mean"] == pytest.approx(np.mean(expected))
        low, high = found["interval"]
        assert min(expected) <= low < found["mean"] < high <= max(expected)
    assert ("upper bound" in result["protocol"]["per_patient_dice"]) == (threshold is None)


def test_auprc_of_each_patient_and_of_lesions_by_size():
    """Per patient, scikit-learn's on all its pixels; a size pools the pixels of its patients."""
    dataset = FakeDataset()
    dataset.masks[dataset.patients == "patient_b"] = 0
    dataset.masks[np.flatnonzero(dataset.patients == "patient_b")[0], 10, 10:12] = 1  # far below 3 % of the foreground
    result = evaluate(second_channel, dataset, threshold=0.62, progress=False)
    for postprocessed, part in ((False, result), (True, result["postprocessed"])):
        pixels, shares = {}, {}
        for name in np.unique(dataset.patients):
            rows = np.flatnonzero(dataset.patients == name)
            images, masks = dataset.images[rows], dataset.masks[rows]
            maps = postprocess_maps(images[:, 1], images) if postprocessed else images[:, 1]
            pixels[name] = masks.ravel(), maps.ravel()
            shares[name] = masks.sum() / (images > 0).any(axis=1).sum()
        found, sizes = part["per_patient_auprc"], part["by_lesion_size"]
        expected = {name: average_precision_score(*values) for name, values in pixels.items()}
        assert found["patients"] == list(expected) and found["values"] == pytest.approx(list(expected.values()))
        assert found["mean"] == pytest.approx(np.mean(list(expected.values())))
        assert found["interval"][0] <= found["mean"] <= found["interval"][1]
        assert sizes["small"]["patients"] == ["patient_b"] and shares["patient_b"] < 0.03
        dice = dict(zip(part["per_patient_dice"]["patients"], part["per_patient_dice"]["values"], strict=True))
        for size in sizes.values():
            low, high = size["share_of_foreground"]
            assert size["patients"] == [patient for patient, share in shares.items() if low <= share < high]
            if not size["patients"]:
                assert size["auprc"] is size["ideal_dice"] is size["per_patient_dice"] is None
                continue
            pooled = [np.concatenate([pixels[patient][i] for patient in size["patients"]]) for i in (0, 1)]
            assert size["auprc"] == pytest.approx(average_precision_score(*pooled))
            assert size["per_patient_auprc"] == pytest.approx(np.mean([expected[p] for p in size["patients"]]))
            assert size["per_patient_dice"] == pytest.approx(np.mean([dice[p] for p in size["patients"]]))


def test_small_components_are_removed_for_postprocessed_dice_only():
    dataset = FakeDataset((4,))
    dataset.images[:] = 0.5
    dataset.masks[:] = 0
    dataset.masks[0, 4:12, 4:12] = 1
    maps = dataset.masks.astype(np.float32)
    maps[3, 15:19, 15:19] = 1  # 16 voxels that a median filter keeps in part
    result = evaluate(lambda images: torch.from_numpy(maps), dataset, threshold=0.5, progress=False)
    smooth = postprocess_maps(maps, dataset.images)
    assert smooth[3].sum() > 0
    assert result["per_patient_dice"]["values"] == pytest.approx([2 * 64 / (64 + 80)])
    lesion = smooth[0].sum()
    assert result["postprocessed"]["per_patient_dice"]["values"] == pytest.approx([2 * lesion / (64 + lesion)])


@pytest.mark.parametrize("how", [{"batch_size": 1}, {"batch_size": 4}, {"batch_size": None}, {"whole_patients": True}])
def test_result_depends_neither_on_batches_nor_on_the_order_of_rows(how):
    expected = without_time(evaluate(second_channel, FakeDataset(), batch_size=64, progress=False))
    shuffled = evaluate(second_channel, FakeDataset().shuffled(), **how, progress=False)
    assert without_time(shuffled) == expected


@pytest.mark.parametrize(
    ("how", "calls"),
    [({"batch_size": 4}, [4, 4, 4, 3]), ({"batch_size": None}, [15]), ({"whole_patients": True}, [5, 4, 6])],
)
def test_a_call_is_full_or_holds_one_whole_patient(how, calls):
    sizes = []
    evaluate(lambda images: sizes.append(len(images)) or images[:, 0], FakeDataset(), **how, progress=False)
    assert sizes == calls


def test_a_smaller_map_is_upsampled_and_nothing_else():
    dataset = FakeDataset()

    def halved(images):
        return torch.nn.functional.avg_pool2d(images[:, 1:], 2)[:, 0]

    def restored(images):
        return torch.nn.functional.interpolate(halved(images)[:, None], scale_factor=2, mode="bilinear")[:, 0]

    small = evaluate(halved, dataset, progress=False)
    assert small["auprc"] == pytest.approx(evaluate(restored, dataset, progress=False)["auprc"], abs=1e-6)
    assert abs(small["auprc"] - evaluate(second_channel, dataset, progress=False)["auprc"]) > 0.01


@pytest.mark.parametrize("shape", [(1, 24, 24), (4, 48, 48), (4, 2, 24, 24), (4, 24)])
def test_a_map_of_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"anomaly_map must return \(4, <= 24, <= 24\)|4 slices became \(1, 24, 24\)"):
        evaluate(lambda images: torch.zeros(shape), FakeDataset((4,)), progress=False)


def test_nan_in_a_map_names_the_patient():
    def broken(images):
        return images[:, 0] * (float("nan") if len(images) == 4 else 1)

    with pytest.raises(InputError, match="patient_b: the anomaly map holds NaN"):
        evaluate(broken, FakeDataset(), whole_patients=True, progress=False)


def test_without_masks_or_slices_there_is_nothing_to_evaluate():
    dataset = FakeDataset()
    with pytest.raises(InputError, match="the split is empty"):
        evaluate(second_channel, dataset, indices=[], progress=False)
    dataset.has_masks = False
    with pytest.raises(InputError, match="trains a model, but can't be evaluated"):
        evaluate(second_channel, dataset, progress=False)


def test_some_rows_only():
    dataset = FakeDataset()
    rows = np.flatnonzero(dataset.patients != "patient_b")
    part = evaluate(second_channel, dataset, indices=rows, progress=False)
    assert part["n_patients"] == 2 and part["n_slices"] == 11
    lesion, maps = dataset.masks[rows] > 0, dataset.images[rows, 1]
    assert part["auprc"] == pytest.approx(average_precision_score(lesion.ravel(), maps.ravel()), abs=1e-9)


def test_a_patient_without_lesion_has_no_dice_but_counts_elsewhere():
    dataset = FakeDataset()
    dataset.masks[dataset.patients == "patient_b"] = 0
    result = evaluate(second_channel, dataset, threshold=0.6, progress=False)
    assert result["per_patient_dice"]["patients"] == ["patient_a", "patient_c"]
    assert len(result["per_patient_dice"]["values"]) == 2 and result["n_patients"] == 3
    lesion, maps = dataset.masks > 0, dataset.images[:, 1]
    assert result["auprc"] == pytest.approx(average_precision_score(lesion.ravel(), maps.ravel()), abs=1e-9)


def test_without_any_lesion_measures_are_none_and_the_result_is_valid_json(tmp_path):
    dataset = FakeDataset()
    dataset.masks[:], dataset.labels[:] = 0, 0
    result = evaluate(second_channel, dataset, progress=False)
    for part in (result, result["postprocessed"]):
        for name in ("auprc", "ideal_dice", "ideal_threshold", "foreground_auprc", "slice_auroc"):
            assert part[name] is None
        expected = {"patients": [], "values": [], "mean": None, "interval": None, "threshold": None}
        assert part["per_patient_dice"] == expected
    write_result(result, tmp_path / "RESULT.json")
    assert json.loads((tmp_path / "RESULT.json").read_text()) == result


def test_a_constant_map_scores_the_prevalence():
    dataset = FakeDataset()
    result = evaluate(lambda images: torch.zeros(len(images), 24, 24), dataset, progress=False)
    for part in (result, result["postprocessed"]):
        assert part["auprc"] == pytest.approx((dataset.masks > 0).mean())
        assert part["slice_auroc"] == 0.5


def test_postprocessing_can_be_left_out():
    result = evaluate(second_channel, FakeDataset(), postprocess=False, progress=False)
    assert "postprocessed" not in result and result["protocol"]["postprocessed"] == "not done"


def test_the_file_of_counts_adds_up_to_the_result(tmp_path):
    dataset, path = FakeDataset().shuffled(), tmp_path / "RESULT.counts.npz"
    result = evaluate(second_channel, dataset, counts_path=path, progress=False)
    patients = dict(read_counts(path))
    assert list(patients) == ["patient_a", "patient_b", "patient_c"]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    for chain, part in (("raw", result), ("postprocessed", result["postprocessed"])):
        a, b, c = (found[f"{chain}/foreground"] for found in patients.values())
        assert (a + b + c).average_precision() == pytest.approx(part["foreground_auprc"], abs=1e-12)
        d, e, f = (found[f"{chain}/background"] for found in patients.values())
        assert (a + b + c + d + e + f).ideal_dice()[0] == pytest.approx(part["ideal_dice"], abs=1e-12)
        scores = np.concatenate([found[f"{chain}/slice_scores"] for found in patients.values()])
        labels = np.concatenate([found["labels"] for found in patients.values()])
        assert roc_auc_score(labels, scores) == pytest.approx(part["slice_auroc"], abs=1e-12)
    assert patients["patient_b"]["slices"].tolist() == [10, 11, 12, 13]
    assert patients["patient_b"]["labels"].tolist() == [0, 1, 0, 1]


def test_the_seed_is_that_of_the_bootstrap():
    first, second = (evaluate(second_channel, FakeDataset((3,) * 8), seed=seed, progress=False) for seed in (0, 1))
    assert first["per_patient_dice"].pop("interval") != second["per_patient_dice"].pop("interval")
    assert first["per_patient_dice"] == second["per_patient_dice"]


def test_dice_by_hand():
    assert dice([1, 1, 0, 0], [1, 0, 1, 0]) == 0.5
    assert dice([0, 0], [1, 0]) == 0
    assert dice([1, 1], [1, 1]) == 1
    assert dice([1, 0], [0, 0]) is None


def test_bootstrap_interval_is_that_of_a_mean():
    values = np.random.default_rng(0).normal(0.6, 0.1, 400)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=1e-3)
    assert bootstrap_interval(values) == [low, high] != bootstrap_interval(values, seed=1)
    assert bootstrap_interval([0.5]) is None


def test_a_method_of_whole_patients_sees_the_slices_that_are_not_measured_too():
    data = FakeDataset().shuffled()
    chosen = np.arange(0, len(data), 2)

    def share_of_the_scan(images):
        """What only the whole scan tells: how bright a pixel is beside the scan's mean."""
        return images[:, 1] / images[:, 1].mean()

    seen = []

    def spied(images):
        seen.append(len(images))
        return share_of_the_scan(images)

    result = evaluate(spied, data, indices=chosen, whole_patients=True, postprocess=False, progress=False)
    assert sorted(seen) == [4, 5, 6] and result["n_slices"] == len(chosen)
    scores = np.zeros(data.masks.shape, np.float32)
    for name in np.unique(data.patients):
        rows = data.patients == name
        scores[rows] = share_of_the_scan(torch.from_numpy(data.images[rows]))
    expected = average_precision_score(data.masks[chosen].ravel(), scores[chosen].ravel())
    assert result["auprc"] == pytest.approx(expected, abs=1e-6)


def test_a_result_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "RESULT.json"
    write_result({"auprc": 0.25}, path)
    with pytest.raises(ValueError):
        write_result({"auprc": float("nan")}, path)
    assert json.loads(path.read_text()) == {"auprc": 0.25} and len(list(tmp_path.iterdir())) == 1
