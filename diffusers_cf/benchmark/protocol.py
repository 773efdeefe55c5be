"""The protocol that every row of the tables goes through: the same slices, the same choices, the same measures."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import SplineTransformer

from diffusers_cf.baselines import AnomalyMethod
from diffusers_cf.benchmark.presets import Preset
from diffusers_cf.data.intensity import with_named_scale
from diffusers_cf.data.slices import SliceDataset, batches_of
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.chains import choose_chain
from diffusers_cf.evaluation.pixel_counts import CHAINS, PixelCounts
from diffusers_cf.evaluation.postprocessing import PostProcessing, foreground_mask
from diffusers_cf.evaluation.protocol import evaluate, maps_at_size
from diffusers_cf.evaluation.sweep import evenly_spread, has_lesion
from diffusers_cf.training.batches import relative_positions


SPLINE_KNOTS = 8  # of position_scores
# Metadata that data sets must share to stand in one table.
KIND = ("source", "size", "modalities", "class_names", "field_mm", "normalize")


def as_json(metadata: dict) -> dict:
    """Return metadata as it comes back from a JSON file, where tuples become lists."""
    return json.loads(json.dumps(metadata))


class BenchmarkData:
    """The slices of one seed, the same for every method.

    Args:
        folder (`str`): a slice data set with masks.
        preset (`Preset`): how many of its slices are used.
        batch_size (`int`): number of slices at a time at inference.

    Attributes:
        train, validation, test (`SliceDataset`): its splits.
        validation_rows, test_rows (`list[int]`): the rows of the splits that are used, evenly spread.
        metadata (`dict`): identifies these slices wherever the data set lies: `KIND`, its seed, and for each split the
            SHA-256 of its patients, slice numbers and labels.

    Raises:
        InputError: the data set has no masks, its slices are smaller than the input of the networks, or a split lacks
            healthy slices, unhealthy slices or lesion pixels.
    """

    def __init__(self, folder: str, preset: Preset, batch_size: int = 32):
        self.folder, self.batch_size = folder, batch_size
        self.train, self.validation, self.test = (SliceDataset(folder, s) for s in ("train", "validation", "test"))
        if not self.test.has_masks:
            raise InputError(f"{folder} has no lesion masks: methods can be trained on it, but not measured")
        known = with_named_scale(self.train.preprocessing)
        if known["size"] < preset.image_size:
            raise InputError(f"{folder} has slices of {known['size']} px, less than the networks' {preset.image_size}")
        self.validation_rows = evenly_spread(len(self.validation), preset.validation_slices)
        self.test_rows = evenly_spread(len(self.test), preset.test_slices or len(self.test))
        self.metadata = as_json({name: known.get(name) for name in (*KIND, "seed")})
        rows_of = {"train": range(len(self.train)), "validation": self.validation_rows, "test": self.test_rows}
        for dataset in (self.train, self.validation, self.test):
            rows = rows_of[dataset.split]
            unhealthy = [row for row in rows if dataset.labels[row] != 0]
            if not 0 < len(unhealthy) < len(rows):
                raise InputError(f"{folder}: the split {dataset.split} needs healthy and unhealthy slices")
            if dataset is not self.train and not has_lesion(dataset, unhealthy, batch_size):
                raise InputError(f"{folder}: the split {dataset.split} has unhealthy labels but no lesion pixels")
            digest = hashlib.sha256()
            for values in (dataset.patients, dataset.slices, dataset.labels):
                digest.update("\n".join(map(str, values)).encode() + b"\n\n")
            self.metadata[dataset.split] = digest.hexdigest()
        self.modalities, self.channels, self.size = known["modalities"], known["channels"], known["size"]

    def validation_batches(self, healthy_only: bool = False) -> Iterator[dict[str, torch.Tensor]]:
        """Return batches of the validation slices, or of the healthy ones among them."""
        rows = [row for row in self.validation_rows if not (healthy_only and self.validation.labels[row])]
        return batches_of(self.validation, rows, self.batch_size)

    def test_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Return batches of the test slices."""
        return batches_of(self.test, self.test_rows, self.batch_size)


def choose_settings(method: AnomalyMethod, data: BenchmarkData) -> dict:
    """Set `method.settings` to the best of its candidates on validation slices, and let it learn from labels.

    Returns:
        `dict`: `by`, the rule in words, what was tried, and what was `learned`.

    Raises:
        InputError: no candidate has finite maps, or the labels do not tell what is to be learned.
    """
    method.learn(data.train)
    choice = _choose(method, data)
    return choice | {"learned": method.learn(data.train)}


def _choose(method: AnomalyMethod, data: BenchmarkData) -> dict:
    """Set `method.settings` to the best of its candidates on validation slices.

    The best candidate has the highest AUPRC of the post-processed map in the foreground. A candidate whose maps are not
    finite is never chosen. A method with a `choose` method chooses by its own rule, which needs no masks.

    Returns:
        `dict`: `by`, the rule in words, and what was tried.

    Raises:
        InputError: no candidate has finite maps.
    """
    if hasattr(method, "choose"):
        choice = method.choose(batch["images"] for batch in data.validation_batches(healthy_only=True))
        method.settings = dict(choice["settings"])
        return {"by": "the method's own rule on healthy validation slices", **choice}
    if len(method.candidates) == 1:
        return {"by": "nothing to choose"}
    counts = {index: PixelCounts() for index in range(len(method.candidates))}
    for batch in data.validation_batches():
        images, masks = batch["images"].numpy(), batch["masks"].numpy()
        inside = foreground_mask(images)
        for index, maps in method.maps_of_candidates(batch["images"]):
            if not torch.isfinite(maps).all():
                counts.pop(index, None)
            if index in counts:
                maps = PostProcessing().apply(maps_at_size(maps, masks.shape[1:]), images)
                counts[index].update(maps[inside], masks[inside])
    if not counts:
        raise InputError(f"{type(method).__name__}: the maps of every setting hold NaN or infinite values")
    scores = {index: count.average_precision() for index, count in counts.items()}
    method.settings = dict(method.candidates[max(scores, key=scores.get)])
    tried = [{**settings, "auprc": scores.get(index)} for index, settings in enumerate(method.candidates)]
    return {"by": "AUPRC in the foreground of post-processed validation slices", "tried": tried}


def measure(method: AnomalyMethod, data: BenchmarkData, counts_path: str | Path | None = None) -> dict:
    """Return RESULT.json of a method on the test slices.

    Post-processing and thresholds are those that are best on validation patients.
    """
    chain, _ = choose_chain(method, data.validation, batch_size=data.batch_size)
    common = {
        "batch_size": data.batch_size,
        "whole_patients": method.whole_patient,
        "network_evaluations_per_slice": method.network_evaluations_per_slice,
        "progress": False,
        "chain": chain,
    }
    rows = None if chain.slice_sigma else data.validation_rows
    validation = evaluate(method.anomaly_map, data.validation, indices=rows, **common)
    parts = dict(zip(CHAINS, (validation, validation["postprocessed"]), strict=True))
    common["threshold"] = {chain: part["ideal_threshold"] for chain, part in parts.items()}
    result = evaluate(method.anomaly_map, data.test, indices=data.test_rows, counts_path=counts_path, **common)
    kept = ("auprc", "ideal_dice", "foreground_auprc", "foreground_ideal_dice", "slice_auroc")
    result |= {"postprocess": chain.as_setting}
    return result | {"validation": {chain: {name: part[name] for name in kept} for chain, part in parts.items()}}


def position_scores(
    train_labels: Sequence[int], train_positions: Sequence[float], test_positions: Sequence[float]
) -> np.ndarray:
    """Return the probability that a slice is unhealthy given its position: logistic regression on cubic splines.

    Lesions are rare at both ends of the head, so a score that only recognises the ends already detects some of them.

    Args:
        train_labels (`Sequence[int]`): `(N,)`, 0 healthy, anything else unhealthy; both must occur.
        train_positions (`Sequence[float]`): `(N,)`, from [`relative_positions`].
        test_positions (`Sequence[float]`): `(M,)`.

    Returns:
        `np.ndarray`: float64 `(M,)` in (0, 1).
    """
    # knots over all of [0, 1]: those of the data would coincide if every patient had one slice
    splines = SplineTransformer(knots=np.linspace(0, 1, SPLINE_KNOTS)[:, None], extrapolation="constant")
    model = make_pipeline(splines, LogisticRegression(C=10.0, max_iter=1000))
    model.fit(np.asarray(train_positions)[:, None], np.asarray(train_labels) != 0)
    return model.predict_proba(np.asarray(test_positions)[:, None])[:, 1]


def slice_aurocs(data: BenchmarkData) -> dict[str, float]:
    """Return the AUROC of telling healthy from unhealthy test slices by their position alone, as `position`."""
    train, test = (relative_positions(split.patients, split.slices) for split in (data.train, data.test))
    scores = position_scores(data.train.labels, train, test[data.test_rows])
    return {"position": float(roc_auc_score(data.test.labels[data.test_rows] != 0, scores))}
