"""Inference side by side with equal weights: ours, the authors' way, and a plain diffusers loop, in turn in one run.

python benchmarks/speed.py --dataset DATASET --output results/speed.json [--patient FOLDER]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import make_parser, open_slices, run_script, spread, write_result
from diffusers import DDIMInverseScheduler, DDIMScheduler

from diffusers_cf import (
    CounterfactualDDIMPipeline,
    DynamicDDIMInverseScheduler,
    DynamicDDIMScheduler,
    anomaly_heatmap,
    class_token_encoder,
    counterfactual_unet,
)
from diffusers_cf.commands.options import add_device_arguments
from diffusers_cf.data.slices import batches_of
from diffusers_cf.images import network_images
from diffusers_cf.inference import DTYPES, compile_network, compute_in, open_pipeline
from diffusers_cf.loading import PRETRAINED
from diffusers_cf.segmentation.cohorts import patient_files
from diffusers_cf.segmentation.patient import segment_patient, segmentation_facts
from diffusers_cf.segmentation.volumes import map_slices, read_volumes
from diffusers_cf.settings import PAPER_SETTINGS


WAYS = ("ours", "authors", "plain")
AUTHORS_BATCH = 32


class AuthorsPipeline(CounterfactualDDIMPipeline):
    """The authors' way: whole images in float32, and one network call for each branch of the guidance."""

    def predict_noise(self, sample: torch.Tensor, timestep: int, condition: tuple) -> torch.Tensor:
        """Return the prediction, computed for at most `AUTHORS_BATCH` images a call."""
        groups = zip(*(part.split(AUTHORS_BATCH) for part in (sample, *condition)), strict=True)
        predict = super().predict_noise
        return torch.cat([predict(images, timestep, tuple(parts)) for images, *parts in groups])


class PlainLoop:
    """What a user of diffusers would write: stock schedulers and both branches in one batch."""

    def __init__(self, pipe: CounterfactualDDIMPipeline):
        self.pipe, self.unet, self.encoder = pipe, pipe.unet, pipe.class_encoder
        names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
        options = {name: pipe.scheduler.config[name] for name in names} | {"clip_sample": False}
        self.scheduler, self.inverse_scheduler = DDIMScheduler(**options), DDIMInverseScheduler(**options)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        device, count = self.pipe.device, len(images)
        image = network_images(images.to(device), self.pipe.image_size, clip=False)
        ids = torch.tensor([self.encoder.null_id] * count + [0] * count, device=device)
        tokens, vector = self.encoder(ids)
        steps = PAPER_SETTINGS["num_inference_steps"]
        walked = round(steps * PAPER_SETTINGS["strength"])
        self.scheduler.set_timesteps(steps, device=device)
        self.inverse_scheduler.set_timesteps(steps, device=device)
        x = image
        for t in self.inverse_scheduler.timesteps[:walked]:
            noise = self.unet(x, t, encoder_hidden_states=tokens[:count], class_labels=vector[:count]).sample
            x = self.inverse_scheduler.step(noise, t, x).prev_sample
        for t in self.scheduler.timesteps[-walked:]:
            noise = self.unet(torch.cat([x, x]), t, encoder_hidden_states=tokens, class_labels=vector).sample
            null, target = noise.chunk(2)
            x = self.scheduler.step(null + PAPER_SETTINGS["guidance_scale"] * (target - null), t, x).prev_sample
        return anomaly_heatmap(image, x) / 2


def load(args: argparse.Namespace, way: str) -> tuple[CounterfactualDDIMPipeline, Callable]:
    """Return one of the three ways: the pipeline that holds its network, and a function of images."""
    ours = way == "ours"
    dtype = args.dtype if ours else "float32"
    pipe = _untrained(args, dtype) if args.unet_size else open_pipeline(args.model, args.device, dtype)
    if ours:
        if args.compile:
            compile_network(pipe)
        return pipe, lambda images: pipe(images).heatmaps
    pipe.unet.to(memory_format=torch.contiguous_format)
    if way == "plain":
        return pipe, PlainLoop(pipe)
    facts, parts = pipe.preprocessing, dict(pipe.components)
    first_order = {"solver_order": 1, "threshold_clean_sample": True}
    scheduler = DynamicDDIMScheduler.from_config(pipe.scheduler.config, **first_order)
    parts |= {"scheduler": scheduler, "inverse_scheduler": DynamicDDIMInverseScheduler.from_config(scheduler.config)}
    pipe = AuthorsPipeline(**parts, clip_input=False, crop_background=False)
    pipe.preprocessing = facts
    pipe.set_progress_bar_config(disable=True)
    return pipe, lambda images: pipe(images, settings="paper").heatmaps


def _untrained(args, dtype: str) -> CounterfactualDDIMPipeline:
    """Return the pipeline of the model with an untrained network of another size."""
    pipe = open_pipeline(args.model, args.device)
    torch.manual_seed(0)
    channels = pipe.unet.config.in_channels
    unet = counterfactual_unet(args.unet_size, "attention", 64, channels).eval()
    pipe.unet = unet.to(args.device, memory_format=torch.channels_last)
    pipe.class_encoder = class_token_encoder(args.unet_size).to(args.device)
    compute_in(pipe.unet, DTYPES[dtype])
    return pipe


def run_all(function: Callable, images: torch.Tensor, batch_size: int) -> float:
    """Return the seconds for all images, with the maps copied to the CPU."""
    start = time.perf_counter()
    for part in images.split(batch_size):
        function(part).cpu()
    return time.perf_counter() - start


def batch_size(args: argparse.Namespace, way: str) -> int:
    """Return the number of slices per call: the authors' 32 for their way and for the plain loop."""
    return args.batch_size if way == "ours" else AUTHORS_BATCH


def in_turn(args: argparse.Namespace, images: torch.Tensor) -> dict[str, dict]:
    """Run every way once per round, after a warm-up.

    Returns:
        `dict`: for each way NFE and seconds per slice, the time relative to ours and, on a GPU, the peak memory.
    """
    on_gpu = torch.device(args.device).type == "cuda"
    loaded = {way: load(args, way) for way in WAYS}
    rows = {}
    for way, (pipe, function) in loaded.items():
        # the plain loop takes the same steps as the authors
        evaluations = pipe.network_evaluations(settings=None if way == "ours" else "paper")
        rows[way] = {"passes_per_slice": evaluations, "seconds_per_slice": []}
        # every size of window is compiled separately
        run_all(function, images if way == "ours" else images[:2], batch_size(args, way))
    for _ in range(args.rounds):
        for way, (_, function) in loaded.items():
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            seconds = run_all(function, images, batch_size(args, way))
            rows[way]["seconds_per_slice"].append(seconds / len(images))
            if on_gpu:  # includes the weights of all three ways
                rows[way]["peak_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
    ours = rows["ours"]["seconds_per_slice"]
    for row in rows.values():
        row["times_ours"] = spread([one / other for one, other in zip(row["seconds_per_slice"], ours, strict=True)])
    return rows


def whole_patient(args: argparse.Namespace, way: str) -> dict[str, float]:
    """Return the seconds of `segment_patient` with reading and writing, and of its resampling and network alone.

    The model is loaded and warmed up. Both ways use the threshold that the model recommends.
    """
    pipe, _ = load(args, way)
    settings = {"settings": None if way == "ours" else "paper", "threshold": pipe.resolve_settings()["threshold"]}
    facts = segmentation_facts(pipe, **settings)
    volumes = read_volumes("patient", patient_files(args.patient, facts["preprocessing"]["modalities"]))
    if way == "ours":
        map_slices(pipe, volumes, facts, args.batch_size, progress=False)
    with TemporaryDirectory() as folder:
        start = time.perf_counter()
        segment_patient(pipe, args.patient, folder, batch_size=batch_size(args, way), progress=False, **settings)
        seconds = {"seconds": time.perf_counter() - start}
    if way == "ours":
        start = time.perf_counter()
        map_slices(pipe, volumes, facts, args.batch_size, progress=False)
        seconds["resampling_and_network_seconds"] = time.perf_counter() - start
    return seconds


def main(args: argparse.Namespace) -> dict:
    """Measure all ways on slices, and with `--patient` ours and the authors' on a whole scan."""
    dataset, rows = open_slices(args)
    images = torch.cat([batch["images"] for batch in batches_of(dataset, rows, 32)])
    result = {"torch": torch.__version__, "device": args.device, "dtype": args.dtype}
    result |= {"threads": torch.get_num_threads(), "n_slices": len(images), "ways": in_turn(args, images)}
    if args.patient:
        write_result(result, args.output)  # a whole patient takes minutes
        result["patient"] = {way: whole_patient(args, way) for way in ("ours", "authors")}
    report(result)
    return result


def report(result: dict) -> None:
    """Print the result."""
    for way, row in result["ways"].items():
        seconds, times = statistics.median(row["seconds_per_slice"]), row["times_ours"]
        spread = f"{times['median']:.1f} [{times['least']:.1f}, {times['most']:.1f}] times ours"
        print(f"{way:8} NFE {row['passes_per_slice']:5.1f} {seconds:8.3f} s a slice, {spread}")
    for way, seconds in result.get("patient", {}).items():
        inner = seconds.get("resampling_and_network_seconds")
        print(f"{way:8} {seconds['seconds']:8.1f} s a patient" + (f", network {inner:.1f} s" if inner else ""))


if __name__ == "__main__":
    parser = make_parser(__doc__, "test", max_slices=32)
    add = parser.add_argument
    add("--model", default=str(PRETRAINED / "phantom_small"), help="default: the shipped model")
    add("--unet_size", choices=("small", "paper"), help="use an untrained network of this size instead of the model's")
    add("--patient", type=Path, metavar="FOLDER", help="also segment a whole patient")
    add("--rounds", type=int, default=3)
    add_device_arguments(parser, batch_size=16, compile=True)
    raise SystemExit(run_script(main, parser.parse_args(), counts=("rounds", "max_slices")))
