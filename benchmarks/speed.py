"""Inference side by side at equal weights: ours, the authors' way, and a plain diffusers loop, in turn in one run.

python benchmarks/speed.py --dataset DATASET --output results/speed.json [--patient FOLDER]
"""

import argparse
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

from diffusers_cf import (
    CounterfactualDDIMPipeline,
    DynamicDDIMInverseScheduler,
    DynamicDDIMScheduler,
    anomaly_heatmap,
    class_token_encoder,
    counterfactual_unet,
    implicit_guidance,
)
from diffusers_cf.arguments import ArgumentParser, run_command
from diffusers_cf.commands.demo import SHIPPED_MODEL
from diffusers_cf.commands.options import (
    DTYPES,
    add_compile_argument,
    add_device_arguments,
    check_device_arguments,
    compile_network,
    open_pipeline,
)
from diffusers_cf.data.slices import SliceDataset, batches_of
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.protocol import write_result
from diffusers_cf.evaluation.sweep import evenly_spread
from diffusers_cf.files import make_folder
from diffusers_cf.images import network_images
from diffusers_cf.precision import compute_in
from diffusers_cf.provenance import command_line, package_commit
from diffusers_cf.segmentation.patient import segment_patient, segmentation_facts
from diffusers_cf.segmentation.volumes import map_slices, patient_files, read_volumes
from diffusers_cf.settings import PAPER_SETTINGS


WAYS = ("ours", "authors", "plain")
AUTHORS_BATCH = 32


class AuthorsPipeline(CounterfactualDDIMPipeline):
    """The authors' way: whole images in float32, and each branch of the guidance a call of its own."""

    def _guided_prediction(self, target, guidance_scale: float, batch_size: int) -> Callable:
        null, wanted = self.encode_classes(None, batch_size), self._encode_target(target, batch_size)
        return lambda sample, t: implicit_guidance(
            self.predict_noise(sample, t, null), self.predict_noise(sample, t, wanted), guidance_scale
        )


class PlainLoop:
    """What a user of diffusers writes: stock schedulers, both branches in one batch, nothing else."""

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
    """One of the three ways as the pipeline that holds its network, and a function of images."""
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
    """A network of a size that no shipped model has, with the shipped model's everything else."""
    pipe = open_pipeline(args.model, args.device)
    torch.manual_seed(0)
    channels = pipe.unet.config.in_channels
    unet = counterfactual_unet(args.unet_size, "attention", 64, channels).eval()
    pipe.unet = unet.to(args.device, memory_format=torch.channels_last)
    pipe.class_encoder = class_token_encoder(args.unet_size).to(args.device)
    compute_in(pipe.unet, DTYPES[dtype])
    return pipe


def run_all(function: Callable, images: torch.Tensor, batch_size: int) -> float:
    """Seconds for all images, maps on the CPU."""
    start = time.perf_counter()
    for part in images.split(batch_size):
        function(part).cpu()
    return time.perf_counter() - start


def peak_memory(args: argparse.Namespace, way: str, images: torch.Tensor) -> float:
    """Peak memory of a way in MiB: of the GPU, or of a process of its own where the CPU computes."""
    if torch.device(args.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run_all(load(args, way)[1], images, batch_size(args, way))
        return torch.cuda.max_memory_allocated() / 2**20
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_of_this_process, args, way, images.numpy()).result()


def _peak_of_this_process(args: argparse.Namespace, way: str, images) -> float:
    torch.set_num_threads(args.threads)
    run_all(load(args, way)[1], torch.from_numpy(images), batch_size(args, way))
    # not getrusage, which begins with the peak of the process that started this one
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) / 2**10


def batch_size(args: argparse.Namespace, way: str) -> int:
    """Slices a call: the authors' 32 for their way and the plain loop."""
    return args.batch_size if way == "ours" else AUTHORS_BATCH


def in_turn(args: argparse.Namespace, images: torch.Tensor) -> dict[str, dict]:
    """Every way once a round, after a warm-up that doesn't count; seconds of each round and passes a slice."""
    loaded = {way: load(args, way) for way in WAYS}
    rows = {way: {"passes_per_slice": passes(way, pipe), "seconds_per_slice": []} for way, (pipe, _) in loaded.items()}
    for way, (_, function) in loaded.items():
        # sizes of windows are graphs of their own where the network is compiled
        run_all(function, images if way == "ours" else images[:2], batch_size(args, way))
    for _ in range(args.rounds):
        for way, (_, function) in loaded.items():
            seconds = run_all(function, images, batch_size(args, way))
            rows[way]["seconds_per_slice"].append(seconds / len(images))
    del loaded, function, _  # or a GPU's memory would count them
    gc.collect()
    for way, row in rows.items():
        row["times_ours"] = ratio(row["seconds_per_slice"], rows["ours"]["seconds_per_slice"])
        row["peak_memory_mib"] = peak_memory(args, way, images)
    return rows


def passes(way: str, pipe: CounterfactualDDIMPipeline) -> int:
    """Network evaluations of one slice with content; the plain loop walks as the authors do."""
    return pipe.network_evaluations(settings=None if way == "ours" else "paper")


def ratio(seconds: list[float], ours: list[float]) -> dict[str, float]:
    """How many times ours, round by round: median, least and most."""
    found = [one / other for one, other in zip(seconds, ours, strict=True)]
    return {"median": statistics.median(found), "least": min(found), "most": max(found)}


def whole_patient(args: argparse.Namespace, way: str) -> dict[str, float]:
    """Seconds of `segment_patient`, reading and writing included, and of its resampling and network alone.

    The model is loaded and warm. Both ways make the mask with the threshold that the model recommends.
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


def main(args: argparse.Namespace) -> None:
    """All ways on some slices of the test split, and with `--patient` ours and the authors' on a whole scan."""
    check_device_arguments(args)
    for name in ("rounds", "max_slices"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1, not {getattr(args, name)}")
    dataset = SliceDataset(args.dataset, "test")
    if not len(dataset):
        raise InputError(f"{args.dataset}: the split test is empty")
    make_folder(Path(args.output).parent)
    args.threads = torch.get_num_threads()
    rows = evenly_spread(len(dataset), args.max_slices)
    images = torch.cat([batch["images"] for batch in batches_of(dataset, rows, 32)])
    facts = {"command": command_line(), "commit": package_commit(), "torch": torch.__version__}
    facts |= {"device": args.device, "dtype": args.dtype, "threads": args.threads, "n_slices": len(images)}
    result = facts | {"ways": in_turn(args, images)}
    write_result(result, Path(args.output))
    if args.patient:
        result["patient"] = {way: whole_patient(args, way) for way in ("ours", "authors")}
        write_result(result, Path(args.output))
    report(result)


def report(result: dict) -> None:
    """Prints the figures."""
    for way, row in result["ways"].items():
        seconds, times = statistics.median(row["seconds_per_slice"]), row["times_ours"]
        spread = f"{times['median']:.1f} [{times['least']:.1f}, {times['most']:.1f}] times ours"
        print(
            f"{way:8} {row['passes_per_slice']:6.1f} passes {seconds:8.3f} s a slice, {spread},"
            f" {row['peak_memory_mib']:.0f} MiB"
        )
    for way, seconds in result.get("patient", {}).items():
        inner = seconds.get("resampling_and_network_seconds")
        print(f"{way:8} {seconds['seconds']:8.1f} s a patient" + (f", network {inner:.1f} s" if inner else ""))


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default=str(SHIPPED_MODEL), help="the shipped one")
    add(
        "--unet_size", choices=("small", "paper"), help="an untrained network of this size in the place of the model's"
    )
    add("--dataset", required=True, help="slices; those of the test split are used")
    add("--patient", type=Path, metavar="FOLDER", help="scans to segment whole, too")
    add("--output", required=True, metavar="RESULT.json")
    add("--max_slices", type=int, default=32)
    add("--rounds", type=int, default=3)
    add_device_arguments(parser, batch_size=16)
    add_compile_argument(parser)
    arguments = parser.parse_args()
    raise SystemExit(run_command(lambda: main(arguments)))
