"""Validation during training: heatmaps of fixed slices as a picture and, where the data has masks, their scores."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffusers_cf.data.intensity import normalize_of, unit_in_words
from diffusers_cf.data.preprocessing import convention_of
from diffusers_cf.data.slices import SliceDataset, batches_of
from diffusers_cf.evaluation.protocol import evaluate
from diffusers_cf.plots import plot_slices
from diffusers_cf.training.curves import SCORES, add_to_curve, read_curve


# 12 network evaluations a slice, and the map that says most on real patients for so few (results/README.md); a network
# that knows no classes has no such map.
SETTINGS = {"guidance_scale": 6.0, "strength": 0.75, "num_inference_steps": 8, "map": "forward"}
UNCONDITIONAL = SETTINGS | {"map": "counterfactual"}
BATCH_SIZE = 32
NUM_PICTURES = 8


class Validation:
    """Run the pipeline on slices of the validation split: always the same ones, spread evenly over the split.

    Args:
        args (`Namespace`): options of the training script.
        accelerator (`Accelerator`): its trackers log the scores; only the main process computes.
        output (`Path`): pictures and the scores of all steps, scores.json, go to `output/validation`.
        global_batch (`int`): images per optimiser step.
    """

    def __init__(self, args, accelerator, output: Path, global_batch: int):
        self.accelerator, self.curve, self.dataset = accelerator, output / SCORES, None
        self.global_batch, self.steps, self.last = global_batch, args.validation_steps, args.max_train_steps
        if not args.validation_steps or not accelerator.is_main_process:
            return
        dataset = SliceDataset(args.dataset, "validation")
        if len(dataset):
            self.dataset = dataset
            count = min(args.num_validation_slices, len(dataset))
            self.indices = np.unique(np.linspace(0, len(dataset) - 1, count).astype(int))

    def is_due(self, step: int) -> bool:
        """Return whether this step is to be validated."""
        return self.dataset is not None and (step == self.last or step % self.steps == 0)

    def is_done(self, step: int) -> bool:
        """Return whether the scores of this step are written."""
        return step in [row["step"] for row in read_curve(self.curve)]

    def run(self, pipe, step: int) -> dict[str, float]:
        """Measure the pipeline at a step, log its scores and return them; {} if there is nothing to validate on."""
        if self.dataset is None:
            return {}
        settings = SETTINGS if pipe.class_encoder else UNCONDITIONAL

        def anomaly_map(images: torch.Tensor) -> torch.Tensor:
            return pipe(images, **settings).heatmaps.cpu()

        scores = self._scores(anomaly_map)
        self._picture(pipe, settings, step, scores)
        add_to_curve(self.curve, {"step": step, "images": step * self.global_batch, **scores})
        self.accelerator.log({f"validation/{key}": value for key, value in scores.items()}, step=step)
        self.accelerator.print(f"step {step}: " + ", ".join(f"{key} {value:.4f}" for key, value in scores.items()))
        return scores

    def _scores(self, anomaly_map) -> dict[str, float]:
        if not self.dataset.has_masks:
            return self._mean_by_class(anomaly_map)
        result = evaluate(anomaly_map, self.dataset, indices=self.indices, batch_size=BATCH_SIZE, progress=False)
        keys = ("auprc", "ideal_dice", "foreground_auprc", "foreground_ideal_dice", "slice_auroc")
        return {key: result[key] for key in keys if result[key] is not None}

    def _mean_by_class(self, anomaly_map) -> dict[str, float]:
        sums, counts = np.zeros(len(self.dataset.class_names)), np.zeros(len(self.dataset.class_names))
        for batch in batches_of(self.dataset, self.indices, BATCH_SIZE):
            maps = anomaly_map(batch["images"]).mean(dim=(1, 2)).numpy()
            np.add.at(sums, batch["labels"].numpy(), maps)
            np.add.at(counts, batch["labels"].numpy(), 1)
        means = sums / np.maximum(counts, 1)
        return {f"mean_{name}": mean for name, mean in zip(self.dataset.class_names, means.tolist(), strict=True)}

    def _picture(self, pipe, settings: dict, step: int, scores: dict[str, float]) -> None:
        chosen = self.indices[np.linspace(0, len(self.indices) - 1, min(NUM_PICTURES, len(self.indices))).astype(int)]
        batch = self.dataset.collate(self.dataset.__getitems__(chosen.tolist()))
        out = pipe(batch["images"], output_type="np", **settings)
        path = self.curve.with_name(f"step-{step:07d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        plot_slices(
            path, batch["images"].numpy(), out.counterfactuals, out.heatmaps,
            references=None if batch["masks"] is None else batch["masks"].numpy(),
            channel_names=self.dataset.preprocessing["modalities"],
            convention=convention_of(self.dataset.preprocessing),
            unit=unit_in_words(normalize_of(self.dataset.preprocessing)),
            title=f"step {step}: " + ", ".join(f"{key} {value:.3f}" for key, value in scores.items()),
        )  # fmt: skip
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                picture = np.asarray(Image.open(path).convert("RGB"))
                tracker.log_images({"validation": picture[None]}, step=step, **layout)
