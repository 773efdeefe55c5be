"""The protocol that every row of the tables goes through: the same slices, the same choices, the same measures."""

import hashlib
import json

import numpy as np
import torch

from diffusers_cf.baselines import AnomalyMethod
from diffusers_cf.benchmark.presets import Preset
from diffusers_cf.benchmark.slice_scores import diffusion_classifier_scores, position_scores, relative_positions
from diffusers_cf.data.intensity import with_named_scale
from diffusers_cf.data.slices import SliceDataset, batches_of
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.pixel_counts import CHAINS, PixelCounts
from diffusers_cf.evaluation.postprocessing import foreground_mask, postprocess_maps
from diffusers_cf.evaluation.protocol import evaluate, maps_at_size
from diffusers_cf.evaluation.sweep import evenly_spread, has_lesion
from diffusers_cf.evaluation.trajectories import encode_trajectory


CLASSIFIER_TIMESTEPS = (100, 200, 300, 400, 500, 600)


# Facts of a data set that its splits share, so that several of them may stand in one table.
KIND = ("source", "size", "modalities", "class_names", "field_mm", "normalize")


def as_json(facts: dict) -> dict:
    """The facts as they come back from a JSON file: lists in the place of tuples."""
    return json.loads(json.dumps(facts))


class BenchmarkData:
    """The slices of one seed: the same for every method.

    Args:
        folder: a slice data set with masks.
        preset: how many slices of it.
        batch_size: slices at a time at inference.

    Attributes:
        train, validation, test: its splits.
        validation_rows, test_rows: the slices of them that are used, evenly spread.
        facts: what tells these slices from others, wherever they lie.

    Raises:
        InputError: it has no masks, its slices are smaller than the networks' input, or a split lacks healthy slices,
            unhealthy ones, or pixels of a lesion.
    """

    def __init__(self, folder: str, preset: Preset, batch_size: int = 32):
        self.folder, self.batch_size = folder, batch_size
        self.train, self.validation, self.test = (SliceDataset(folder, s) for s in ("train", "validation", "test"))
        if not self.test.has_masks:
            raise InputError(f"{folder} has no lesion masks: methods can be trained on it, but not measured")
        self.validation_rows = evenly_spread(len(self.validation), preset.validation_slices)
        self.test_rows = evenly_spread(len(self.test), preset.test_slices or len(self.test))
        rows = (range(len(self.train)), self.validation_rows, self.test_rows)
        for dataset, chosen in zip((self.train, self.validation, self.test), rows, strict=True):
            sick = dataset.labels[list(chosen)] != 0
            if sick.all() or not sick.any():
                raise InputError(f"{folder}: the split {dataset.split} needs healthy and unhealthy slices")
        side = self.train.preprocessing["size"]
        if side < preset.image_size:
            raise InputError(f"{folder} has slices of {side} px, less than the networks' {preset.image_size}")
        self._check_masks(self.validation, self.validation_rows)
        self._check_masks(self.test, self.test_rows)
        known = with_named_scale(self.train.preprocessing)
        splits = {dataset.split: _fingerprint(dataset) for dataset in (self.train, self.validation, self.test)}
        self.facts = as_json({**{name: known.get(name) for name in KIND}, "seed": known.get("seed"), **splits})
        self.modalities = self.train.preprocessing["modalities"]
        self.channels = self.train.preprocessing["channels"]

    def _check_masks(self, dataset: SliceDataset, rows) -> None:
        sick = [row for row in rows if dataset.labels[row] != 0]
        if not has_lesion(dataset, sick, self.batch_size):
            raise InputError(
                f"{self.folder}: no lesion in the foreground of the split {dataset.split}, though labels say so"
            )

    def healthy_validation_batches(self):
        """Batches of images `(N, C, H, W)` of the healthy among the validation slices."""
        healthy = [row for row in self.validation_rows if self.validation.labels[row] == 0]
        return (batch["images"] for batch in batches_of(self.validation, healthy, self.batch_size))


def _fingerprint(dataset: SliceDataset) -> str:
    """SHA-256 of the patients, slices and labels of a split."""
    digest = hashlib.sha256()
    for values in (dataset.patients, dataset.slices, dataset.labels):
        digest.update("\n".join(map(str, values)).encode() + b"\n\n")
    return digest.hexdigest()


def choose_settings(method: AnomalyMethod, data: BenchmarkData) -> dict:
    """Sets the method's `settings` to the best of its candidates on validation slices; returns what was tried.

    The best has the highest AUPRC of the post-processed map in the foreground. A method with a rule of its own, which
    needs no masks, has `choose`. A candidate whose maps are not finite is out.

    Raises:
        InputError: all of them are.
    """
    if hasattr(method, "choose"):
        choice = method.choose(data.healthy_validation_batches())
        method.settings = dict(choice["settings"])
        return {"by": "the method's own rule on healthy validation slices", **choice}
    if len(method.candidates) == 1:
        return {"by": "nothing to choose"}
    counts: list[PixelCounts | None] = [PixelCounts() for _ in method.candidates]
    for batch in batches_of(data.validation, data.validation_rows, data.batch_size):
        images, masks = batch["images"].numpy(), batch["masks"].numpy()
        inside = foreground_mask(images)
        for index, maps in method.maps_of_candidates(batch["images"]):
            if not torch.isfinite(maps).all():
                counts[index] = None
            if counts[index] is not None:
                maps = postprocess_maps(maps_at_size(maps, masks.shape[1:]), images)
                counts[index].update(maps[inside], masks[inside])
    scores = [None if count is None else count.average_precision() for count in counts]
    if not any(scores):
        raise InputError(f"{type(method).__name__}: the maps of every setting hold NaN or infinite values")
    method.settings = dict(method.candidates[int(np.argmax([score or 0 for score in scores]))])
    tried = [{**settings, "auprc": score} for settings, score in zip(method.candidates, scores, strict=True)]
    return {"by": "AUPRC in the foreground of post-processed validation slices", "tried": tried}


def measure(method: AnomalyMethod, data: BenchmarkData, counts_path=None) -> dict:
    """RESULT.json of a method on the test slices, with the thresholds that are best on the validation slices."""
    common = {
        "batch_size": data.batch_size,
        "whole_patients": method.whole_patient,
        "network_evaluations_per_slice": method.network_evaluations_per_slice,
        "progress": False,
    }
    chosen = evaluate(method.anomaly_map, data.validation, indices=data.validation_rows, **common)
    parts = dict(zip(CHAINS, (chosen, chosen["postprocessed"]), strict=True))
    thresholds = {chain: part["ideal_threshold"] for chain, part in parts.items()}
    result = evaluate(
        method.anomaly_map, data.test, indices=data.test_rows, threshold=thresholds, counts_path=counts_path, **common
    )
    kept = ("auprc", "ideal_dice", "foreground_auprc", "foreground_ideal_dice", "slice_auroc")
    return result | {"validation": {chain: {k: part[k] for k in kept} for chain, part in parts.items()}}


def position_auroc(data: BenchmarkData) -> float:
    """AUROC of telling healthy from unhealthy test slices by their position alone."""
    train, test = (relative_positions(split.patients, split.slices) for split in (data.train, data.test))
    return _slice_auroc(data, position_scores(data.train.labels != 0, train, test[data.test_rows]))


def diffusion_classifier_auroc(pipe, data: BenchmarkData, seed: int) -> float:
    """The same by which condition predicts the noise better."""
    batches = batches_of(data.test, data.test_rows, data.batch_size)
    scores = [
        diffusion_classifier_scores(pipe, batch["images"], CLASSIFIER_TIMESTEPS, seed).cpu() for batch in batches
    ]
    return _slice_auroc(data, torch.cat(scores).numpy())


def _slice_auroc(data: BenchmarkData, scores: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(data.test.labels[data.test_rows] != 0, scores))


def saturated_share(pipe, data: BenchmarkData, strength: float, num_inference_steps: int) -> float:
    """Share of the foreground where the last step of encoding predicts a clean image at the limits of [-1, 1] or beyond.

    Rows compare at one strength, whatever each has chosen for itself.
    """
    walk = {"strength": strength, "num_inference_steps": num_inference_steps}
    saturated = pixels = 0
    for batch in batches_of(data.validation, data.validation_rows, data.batch_size):
        image, *_, nearer, _ = encode_trajectory(pipe, pipe.prepare_images(batch["images"]), **walk)
        timestep = pipe.inverse_scheduler.timesteps[round(walk["num_inference_steps"] * walk["strength"]) - 1]
        noise = pipe.predict_noise(nearer, timestep, pipe.encode_classes(None, len(nearer)))
        predicted = pipe.inverse_scheduler.predict_original(noise, timestep, nearer)
        inside = (image > -1).any(dim=1, keepdim=True).expand_as(predicted)
        saturated += int((predicted[inside].abs() >= 1 - 1e-5).sum())
        pixels += int(inside.sum())
    return saturated / max(pixels, 1)
