"""Training side by side: the training script and a plain float32 diffusers loop, in turn in one run.

python benchmarks/training_speed.py --dataset DATASET --output results/training_speed.json
"""

import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import run_script, spread
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from torch.autograd import DeviceType
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import train_counterfactual as script
from diffusers_cf import class_token_encoder, counterfactual_unet
from diffusers_cf.arguments import ArgumentParser
from diffusers_cf.data.slices import SliceDataset
from diffusers_cf.inference import computes_in_bfloat16
from diffusers_cf.models import UNET_SIZES, ConditionalNoisePredictor
from train_counterfactual import parse_args


WAYS = ("ours", "plain")
TOP = 5  # number of operations in a profile
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRECISION = torch.bfloat16 if computes_in_bfloat16(DEVICE) else torch.float32  # that of `--mixed_precision auto`
MATRIX = {"cpu": 2048, "cuda": 8192}  # side of the matrices for measuring the machine


def ours(args) -> Iterator[None]:
    """Yield after each step of `train_counterfactual.py`."""
    options = {
        "dataset": args.dataset, "output_dir": args.folder, "unet_size": args.unet_size, "mixed_precision": "auto",
        "resolution": args.resolution, "train_batch_size": args.batch_size, "max_train_steps": 10**6,
        "dataloader_num_workers": args.dataloader_num_workers,
    }  # fmt: skip
    given = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    parsed = parse_args(given + ["--random_flip"] + ["--compile"] * args.compile)
    folder = Path(args.folder)
    training, _ = script.set_up(parsed, script.start_accelerator(parsed, folder), folder)
    for _ in training.steps():
        yield


def plain(args) -> Iterator[None]:
    """Yield after each step of a loop as a user of diffusers would write it."""
    dataset = SliceDataset(args.dataset, "train")
    unet = counterfactual_unet(args.unet_size, "attention", args.resolution, dataset.preprocessing["channels"])
    model = ConditionalNoisePredictor(unet, class_token_encoder(args.unet_size)).train().to(DEVICE)
    optimizer, scheduler = torch.optim.AdamW(model.parameters(), 1e-4), DDPMScheduler()
    ema = EMAModel(model.parameters(), 0.9999, use_ema_warmup=True)
    ema.to(DEVICE)

    def collate(rows):
        batch = dataset.collate(rows)
        images = functional.interpolate(batch["images"].clamp(max=1), (args.resolution,) * 2, mode="bilinear")
        return images * 2 - 1, batch["labels"]

    workers = args.dataloader_num_workers
    loader = DataLoader(dataset, args.batch_size, shuffle=True, collate_fn=collate, num_workers=workers)
    while True:
        for images, labels in loader:
            images, labels = images.to(DEVICE), labels.to(DEVICE)
            noise, timesteps = torch.randn_like(images), torch.randint(0, 1000, labels.shape, device=DEVICE)
            labels[torch.rand(labels.shape, device=DEVICE) < 0.35] = model.class_encoder.null_id
            noisy = scheduler.add_noise(images, noise, timesteps)
            functional.mse_loss(model(noisy, timesteps, labels), noise).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.step(model.parameters())
            yield


def seconds_of(steps: Iterator[None], count: int) -> float:
    """Return the seconds that `count` steps take, with the work of a GPU."""
    start = time.perf_counter()
    for _ in range(count):
        next(steps)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def largest_costs(steps: Iterator[None]) -> list[dict]:
    """Return the operations that take most of the time of two steps, with their shares."""
    with profile() as profiler:
        seconds_of(steps, 2)
    spent, events = "self_cpu_time_total", profiler.key_averages()
    if DEVICE == "cuda":  # kernels only: their time is counted again in the operations that called them
        spent = "self_device_time_total"
        events = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    events = sorted(events, key=lambda event: -getattr(event, spent))
    total = sum(getattr(event, spent) for event in events)
    return [{"operation": event.key, "share": getattr(event, spent) / total} for event in events[:TOP]]


def flops_an_image(args) -> float:
    """Return the floating point operations of one training image, forward and backward."""
    counter = FlopCounterMode(display=False)
    channels = SliceDataset(args.dataset, "train").preprocessing["channels"]
    unet = counterfactual_unet(args.unet_size, "attention", args.resolution, channels)
    model = ConditionalNoisePredictor(unet, class_token_encoder(args.unet_size))
    with sdpa_kernel(SDPBackend.MATH), counter:  # the counter does not know the fused attention of CPUs
        sample = torch.randn(1, channels, args.resolution, args.resolution)
        model(sample, torch.tensor([500]), torch.tensor([0])).sum().backward()
    return float(counter.get_total_flops())


def matrix_rate() -> float:
    """Return the floating point operations per second of matrix products in `PRECISION`, the best of ten."""
    side = MATRIX[DEVICE]
    one = torch.randn(side, side, device=DEVICE, dtype=PRECISION)
    products = (one @ one for _ in itertools.count())
    return 5 * 2 * side**3 / min(seconds_of(products, 5) for _ in range(10))


def main(args) -> dict:
    """Run both loops in turn, after a warm-up, then profile them."""
    rows, images = {}, args.steps * args.batch_size
    with TemporaryDirectory() as args.folder:
        work = {"ours": ours(args), "plain": plain(args)}
        for way in WAYS:
            rows[way] = {"warm_up_seconds": seconds_of(work[way], 3), "images_per_second": []}
        for _ in range(args.rounds):
            for way in WAYS:
                rows[way]["images_per_second"].append(images / seconds_of(work[way], args.steps))
        for way in WAYS:
            rows[way]["largest_costs"] = largest_costs(work[way])
    rates = {way: rows[way]["images_per_second"] for way in WAYS}
    ratios = [one / other for one, other in zip(rates["ours"], rates["plain"], strict=True)]
    flops, rate = flops_an_image(args), matrix_rate()
    result = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "precision": str(PRECISION).removeprefix("torch."),
        "threads": torch.get_num_threads(), "ways": rows,
        "times_plain": spread(ratios),
        "flops_an_image": flops, "matrix_flops_per_second": rate,
        "share_of_matrix_rate": flops * statistics.median(rates["ours"]) / rate,
    }  # fmt: skip
    report(result)
    return result


def report(result: dict) -> None:
    """Print the result."""
    for way, row in result["ways"].items():
        costs = ", ".join(f"{cost['operation']} {cost['share']:.0%}" for cost in row["largest_costs"])
        print(f"{way:6} {statistics.median(row['images_per_second']):8.1f} images a second; most in {costs}")
        print(f"{'':6} first three steps {row['warm_up_seconds']:.1f} s")
    times, rate = result["times_plain"], result["matrix_flops_per_second"] / 1e12
    share = f"{result['share_of_matrix_rate']:.1%} of {rate:.2f} TFLOP/s in {result['precision']}"
    print(f"ours is {times['median']:.2f} [{times['least']:.2f}, {times['most']:.2f}] times the plain loop; {share}")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dataset", required=True, help="slice data set; its training split is used")
    add("--output", required=True, metavar="RESULT.json")
    add("--unet_size", choices=sorted(UNET_SIZES), default="small")
    add("--resolution", type=int, default=64)
    add("--batch_size", type=int, default=32)
    add("--steps", type=int, default=5, help="steps of each loop per round, default: %(default)s")
    add("--rounds", type=int, default=5)
    add("--dataloader_num_workers", type=int, default=0)
    add("--compile", action="store_true", help="torch.compile our network")
    raise SystemExit(run_script(main, parser.parse_args(), counts=("rounds", "steps", "batch_size")))
