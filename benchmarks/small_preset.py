"""Quality against time of candidates for the `small` U-Net: validation loss (Eq. 1) after equal minutes of training.

python benchmarks/small_preset.py --dataset DATASET --minutes 5 --output results/small_preset.json
"""

import json
import time
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel

from diffusers_cf import models
from diffusers_cf.arguments import ArgumentParser, run_command
from diffusers_cf.data.slices import SliceDataset
from diffusers_cf.losses import drop_condition, noise_prediction_loss
from diffusers_cf.provenance import package_commit
from diffusers_cf.training.loop import TrainingSlices


THIN = models.UNET_SIZES["small"]
CANDIDATES = {
    "thin 16-48-80-112, attention 16/8": {},
    "thin 16-48-80-112, attention 8": {"attention_levels": (3,)},
    "thin 24-64-80-96, attention 16/8": {"block_out_channels": (24, 64, 80, 96)},
    "narrow 16-32-64-96, attention 16/8": {"block_out_channels": (16, 32, 64, 96)},
    "even 32-48-64-80, attention 16/8": {"block_out_channels": (32, 48, 64, 80)},
}
BATCH_SIZE, LEARNING_RATE, WARMUP_STEPS = 32, 2e-3, 100


def train(model, batches, scheduler, minutes: float) -> tuple[int, float]:
    """Trains for some minutes as the training script does, leaves the EMA weights; `(steps, ms an image)`."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    ema = EMAModel(model.parameters(), 0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < 60 * minutes:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (steps + 1) / WARMUP_STEPS)
        validation_loss(model, batches(steps), scheduler).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        steps += 1
    spent = time.perf_counter() - start
    ema.copy_to(model.parameters())
    return steps, spent / steps / BATCH_SIZE * 1000


def validation_loss(model, batch: dict, scheduler) -> torch.Tensor:
    """Eq. 1 on one batch, in bfloat16 autocast."""
    class_ids = drop_condition(batch["labels"], model.class_encoder.null_id, 0.35, batch["uniform"])
    with torch.autocast("cpu", torch.bfloat16):
        return noise_prediction_loss(model, scheduler, batch["images"], class_ids, batch["noise"], batch["timesteps"])


def measure(name: str, change: dict, args, scheduler) -> dict:
    """One candidate's row of the table."""
    models.UNET_SIZES["candidate"] = THIN | change
    torch.manual_seed(args.seed)
    unet = models.counterfactual_unet("candidate", "attention", 64, 4)
    model = models.ConditionalNoisePredictor(unet, models.class_token_encoder("candidate"))

    def batches(split: str):
        slices = TrainingSlices(SliceDataset(args.dataset, split), args.seed, (64, 64), random_flip=True)
        positions = lambda step: list(range(step * BATCH_SIZE, (step + 1) * BATCH_SIZE))  # noqa: E731
        return lambda step: slices.collate(slices.__getitems__(positions(step)))

    steps, milliseconds = train(model, batches("train"), scheduler, args.minutes)
    held_out = batches("validation")
    with torch.no_grad():
        start = time.perf_counter()
        losses = [validation_loss(model.eval(), held_out(step), scheduler).item() for step in range(args.batches)]
        inference = (time.perf_counter() - start) / args.batches / BATCH_SIZE * 1000
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "candidate": name,
        "parameters": parameters,
        "steps": steps,
        "training_ms_an_image": round(milliseconds, 1),
        "inference_ms_an_image": round(inference, 1),
        "validation_loss": sum(losses) / len(losses),
    }


def main(args) -> None:
    """Every candidate in turn; the file is written again after each."""
    scheduler, rows = DDPMScheduler(), []
    for name, change in CANDIDATES.items():
        rows.append(measure(name, change, args, scheduler))
        print(rows[-1], flush=True)
        facts = {"minutes": args.minutes, "threads": torch.get_num_threads(), "commit": package_commit()}
        Path(args.output).write_text(json.dumps(facts | vars(args) | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", required=True, help="phantom slices at 64 px")
    parser.add_argument("--output", required=True, metavar="RESULT.json")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--batches", type=int, default=24, help="of validation")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    raise SystemExit(run_command(lambda: main(arguments)))
