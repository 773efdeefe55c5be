"""Every heavy run, in order of what it is worth, on a machine that is rented by the minute and has no network.

PYTHONPATH=. python benchmarks/rented.py --work WORK --output OUT --minutes 9 [--input msd_flair.npz --split_file SPLITS.json]

Each call ends in time and the next one goes on where it was, as long as WORK stays. OUT gets what is to be taken home:
scores.tar.gz, and one finished model a call in half precision as a tar in parts.
"""

import json
import math
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from diffusers_cf import CounterfactualDDIMPipeline
from diffusers_cf.arguments import ArgumentParser, make_folder, run_command
from diffusers_cf.demo import SHIPPED_MODEL
from diffusers_cf.errors import InputError


ROOT = Path(__file__).parent.parent
PART_BYTES = 15 * 2**20  # of what is taken home
GRACE_SECONDS = 20  # at the end of a call, for packing
SPLITS = ("split_1", "split_2", "split_3")
KEPT = (".json", ".md", ".png")  # of the scores
# rows of the benchmark: the model's ablation and its nearest rivals first
ROWS = {
    "diffusion": ("ours", "forward-map", "ours-clipped", "ours-unclipped", "cdpm-adagn", "cdpm-adagn-guided")
    + ("cdpm-healthy", "cdpm-classifier"),
    "others": ("threshold", "threshold-flair", "dae", "vae", "vae-restoration", "fanogan", "cam"),
}


@dataclass(frozen=True)
class Size:
    """How large the runs are.

    Attributes:
        data: options of `prepare` for phantoms.
        arrays: the same for real slices.
        train: options of the training script.
        batch_size: images a step.
        seconds: of each training of the model alone.
        limit: most steps of it.
        small: options of the training script for the shipped model, trained on from what it is.
        rate: options of `benchmarks/training_speed.py`.
        sweep: options of `sweep`.
        benchmark: options of `benchmark`.
        rows: of the benchmark, a command for each group.
        speed: options of `benchmarks/speed.py`.
        patient: whether it segments a whole scan, too, which takes a CPU half an hour.
    """

    data: tuple[str, ...]
    arrays: tuple[str, ...]
    train: tuple[str, ...]
    batch_size: int
    seconds: int
    limit: int
    small: tuple[str, ...]
    rate: tuple[str, ...]
    sweep: tuple[str, ...]
    benchmark: tuple[str, ...]
    rows: dict[str, tuple[str, ...]]
    speed: tuple[str, ...]
    patient: bool


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SIZES = {
    "smoke": Size(
        data=_words("--size 32 --patients 12"),
        arrays=_words("--size 32"),
        train=_words("--resolution 16 --unet_size small --checkpointing_steps 2 --num_validation_slices 4"),
        batch_size=4,
        seconds=1,
        limit=4,
        small=_words("--train_batch_size 4 --max_train_steps 2 --crop_background 0.7 --validation_steps 0"),
        rate=_words("--unet_size small --resolution 16 --batch_size 4 --steps 1 --rounds 1"),
        sweep=_words(
            "--guidance_scales 3 --strengths 0.5 --maps counterfactual --num_inference_steps 4 --max_slices 4"
        ),
        benchmark=_words("--preset smoke"),
        rows={"diffusion": ("ours",), "others": ("threshold-flair", "cam")},
        speed=_words("--unet_size small --max_slices 1 --rounds 1"),
        patient=False,
    ),
    # a rate four times that of batch 32 for eight times its images: what Adam bears
    "paper": Size(
        data=(*_words("--size 128 --num_workers"), str(os.cpu_count())),
        arrays=(),
        train=_words(
            "--resolution 64 --unet_size paper --learning_rate 4e-4 --lr_scheduler cosine --lr_warmup_steps 200 --snr_gamma 5"
            " --first_timesteps 0.2 --mixed_precision bf16 --compile --dataloader_num_workers 12 --checkpointing_steps 500"
            " --checkpoints_total_limit 1 --num_validation_slices 128"
        ),
        batch_size=256,
        seconds=270,
        limit=50_000,
        small=_words(
            "--train_batch_size 512 --max_train_steps 1000 --crop_background 0.7 --learning_rate 2e-3 --lr_scheduler cosine"
            " --lr_warmup_steps 200 --snr_gamma 5 --mixed_precision bf16 --random_flip --dataloader_num_workers 12"
            " --checkpointing_steps 500 --checkpoints_total_limit 1 --validation_steps 500"
        ),
        rate=_words("--unet_size paper --batch_size 256 --steps 40 --rounds 2 --dataloader_num_workers 12 --compile"),
        sweep=_words(
            "--guidance_scales 3 6 9 --strengths 0.5 0.75 --maps counterfactual reconstruction forward"
            " --num_inference_steps 8 --solver_order 1 2 --max_slices 128"
        ),
        benchmark=_words("--preset paper --train_seconds 240 --dtype bfloat16"),
        rows=ROWS,
        speed=_words("--unet_size paper --batch_size 512 --max_slices 64 --rounds 2 --dtype bfloat16"),
        patient=True,
    ),
}


@dataclass(frozen=True)
class Step:
    """One command; it is done when it has ended well, and may be stopped and called again before that.

    Attributes:
        name: of its mark in WORK/done.
        needs: names of those that must be done before.
        command: made when it is called.
    """

    name: str
    needs: tuple[str, ...]
    command: Callable[[], list[str]]


class Rental:
    """The runs of one machine.

    Args:
        work: folder of data, models and marks.
        size: of the runs.
        arrays, split_file: real slices, where there are any.
        only: names of the steps that are wanted; all of them unless given.

    Raises:
        InputError: there is no step of such a name.
    """

    def __init__(
        self, work: Path, size: Size, arrays: Path | None, split_file: Path | None, only: list[str] | None = None
    ):
        self.work, self.size, self.arrays, self.split_file = work, size, arrays, split_file
        self.scores = work / "scores"
        known = [step.name for step in self._all_steps()]
        if unknown := sorted(set(only or ()) - set(known)):
            raise InputError(f"--steps {unknown[0]}: it must be one of {', '.join(known)}")
        self._wanted = set(only or known)

    @property
    def steps(self) -> list[Step]:
        """Those that are wanted, the most valuable first."""
        return [step for step in self._all_steps() if step.name in self._wanted]

    def _all_steps(self) -> Iterator[Step]:
        splits = SPLITS if self.arrays else ()
        yield Step("phantom", (), self._prepare_phantom)
        yield Step("rate", ("phantom",), self._rate)
        yield from self._model("phantom", ())
        for split in splits:
            yield Step(split, (), partial(self._prepare_arrays, split))
            yield from self._model(split, ("--augment",))
        yield Step("train-small", ("phantom",), self._train_small)
        for group in self.size.rows:
            yield Step(f"{group}-phantom", ("phantom",), partial(self._benchmark, "phantom", ("phantom",), group))
            if splits:
                more = ("--augment", "--no_pictures")
                yield Step(f"{group}-arrays", splits, partial(self._benchmark, "arrays", splits, group, more))
        if self.size.patient:
            yield Step("patient", (), self._patient)
        yield Step("speed", ("phantom", "patient") if self.size.patient else ("phantom",), self._speed)

    def _model(self, data: str, more: tuple[str, ...]) -> Iterator[Step]:
        """Training on a data set, settings by its validation split, scores on its test split."""
        yield Step(f"train-{data}", (data, "rate"), partial(self._train, data, more))
        yield Step(f"settings-{data}", (f"train-{data}",), partial(self._sweep, data))
        yield Step(f"scores-{data}", (f"settings-{data}",), partial(self._evaluate, data))

    def data(self, name: str) -> str:
        return str(self.work / "data" / name)

    def model(self, name: str) -> Path:
        return self.work / "models" / name

    def _prepare_phantom(self) -> list[str]:
        return _cli("prepare", "--source", "phantom", *self.size.data, "--output", self.data("phantom"))

    def _prepare_arrays(self, split: str) -> list[str]:
        given = ["--input", str(self.arrays), "--split_file", f"{self.split_file}:{split}", *self.size.arrays]
        return _cli("prepare", "--source", "arrays", *given, "--output", self.data(split))

    def _rate(self) -> list[str]:
        output = str(self.scores / "training_speed.json")
        return _script(
            "benchmarks/training_speed.py", "--dataset", self.data("phantom"), "--output", output, *self.size.rate
        )

    def training_steps(self) -> int:
        """As many as the machine's measured rate makes in the time for a training."""
        measured = json.loads((self.scores / "training_speed.json").read_text(encoding="utf-8"))
        rate = min(measured["ways"]["ours"]["images_per_second"])
        return min(max(2, math.floor(rate * self.size.seconds / self.size.batch_size)), self.size.limit)

    def _train(self, data: str, more: tuple[str, ...]) -> list[str]:
        steps, output = self.training_steps(), self.model(data)
        given = ["--dataset", self.data(data), "--output_dir", str(output)]
        given += ["--train_batch_size", str(self.size.batch_size)]
        given += ["--max_train_steps", str(steps), "--validation_steps", str(max(1, steps // 6)), "--random_flip"]
        return self._script_of_training(data, *given, *self.size.train, *more)

    def _train_small(self) -> list[str]:
        given = ["--dataset", self.data("phantom"), "--output_dir", str(self.model("small"))]
        return self._script_of_training("small", *given, "--pretrained_model", str(SHIPPED_MODEL), *self.size.small)

    def _script_of_training(self, name: str, *given: str) -> list[str]:
        """The training script; on from its last checkpoint, where there is one."""
        more = ["--resume_from_checkpoint", "latest"] if any(self.model(name).glob("checkpoint-*")) else []
        return _script("train_counterfactual.py", *given, *more)

    def _with_model(self, command: str, data: str, output: Path) -> list[str]:
        given = ["--model", str(self.model(data)), "--dataset", self.data(data), "--output", str(output)]
        return _cli(command, *given)

    def _sweep(self, data: str) -> list[str]:
        return [*self._with_model("sweep", data, self.scores / data), *self.size.sweep, "--store"]

    def _evaluate(self, data: str) -> list[str]:
        return self._with_model("evaluate", data, self.scores / data / "model.json")

    def _benchmark(self, name: str, data: tuple[str, ...], group: str, more: tuple[str, ...] = ()) -> list[str]:
        seeds = () if len(data) > 1 else ("--seeds", "1")  # several data sets stand in the place of seeds
        given = ["--output", str(self.scores / f"benchmark-{name}"), "--models", str(self.work / f"benchmark-{name}")]
        given += ["--methods", *self.size.rows[group]]
        return _cli("benchmark", "--dataset", *map(self.data, data), *given, *self.size.benchmark, *seeds, *more)

    def _patient(self) -> list[str]:
        return _cli("demo", "--output", str(self.work / "demo"))

    def _speed(self) -> list[str]:
        given = ["--dataset", self.data("phantom"), "--output", str(self.scores / "speed.json")]
        if self.size.patient:
            given += ["--patient", str(next((self.work / "demo" / "scan").iterdir()))]
        return _script("benchmarks/speed.py", *given, *self.size.speed)


def _cli(*words: str) -> list[str]:
    return [sys.executable, "-m", "diffusers_cf.cli", *words]


def _script(name: str, *words: str) -> list[str]:
    return [sys.executable, str(ROOT / name), *words]


def run_steps(rental: Rental, deadline: float) -> list[str]:
    """Calls what is not done yet until the deadline; of a failure only those suffer that need it.

    Returns:
        Names of the steps that failed.
    """
    done, failed = rental.work / "done", []
    done.mkdir(parents=True, exist_ok=True)
    for step in rental.steps:
        if (done / step.name).exists() or not all((done / need).exists() for need in step.needs):
            continue
        seconds = deadline - time.monotonic()
        if seconds < 1:
            break
        print(f"{step.name}: {seconds:.0f} s left", flush=True)
        code = _call(step.command(), seconds)
        if code is None:
            break
        if code:
            failed.append(step.name)
        else:
            (done / step.name).touch()
    return failed


def _call(command: list[str], seconds: float) -> int | None:
    """Exit code of a command; None where it had to be stopped."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
    try:
        process.wait(GRACE_SECONDS / 2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return None


def take_home(rental: Rental, output: Path) -> None:
    """Packs all scores, and one trained model that has changed since it was packed: the files of several are too many."""
    make_folder(output)
    with tarfile.open(output / "scores.tar.gz", "w:gz") as tar:
        for path in sorted(rental.scores.rglob("*")):
            name = path.relative_to(rental.scores)
            if path.suffix in KEPT and ".parts" not in str(name):  # those of a command that was stopped
                tar.add(path, Path("scores") / name)
        for curve in rental.work.glob("models/*/validation/scores.json"):
            tar.add(curve, f"scores/{curve.parent.parent.name}/learning_curve.json")
    for trained in sorted((rental.work / "done").glob("train-*")):
        name = trained.name.removeprefix("train-")
        state = str((rental.model(name) / "preprocessing.json").stat().st_mtime_ns)
        packed = rental.work / "done" / f"packed-{name}"
        if not packed.exists() or packed.read_text(encoding="utf-8") != state:
            _pack_model(rental.model(name), rental.work / "half" / name, output)
            packed.write_text(state, encoding="utf-8")
            return


def _pack_model(model: Path, half: Path, output: Path) -> None:
    """A model in half precision as NAME.tar.0, NAME.tar.1, ..: `cat NAME.tar.* | tar x`."""
    pipe = CounterfactualDDIMPipeline.from_pretrained(model, dtype=torch.float16)
    pipe.save_pretrained(half, max_shard_size=PART_BYTES)
    tar = half.with_suffix(".tar")
    with tarfile.open(tar, "w") as packed:
        packed.add(half, half.name)
    with tar.open("rb") as whole:
        for number, part in enumerate(iter(lambda: whole.read(PART_BYTES), b"")):
            (output / f"{half.name}.tar.{number}").write_bytes(part)
    tar.unlink()


def main(args) -> int:
    """Runs what fits into the time, packs, and says what failed."""
    deadline = time.monotonic() + 60 * args.minutes - GRACE_SECONDS
    if args.minutes * 60 <= GRACE_SECONDS:
        raise InputError(f"--minutes must be more than {GRACE_SECONDS / 60:.1f}, not {args.minutes}")
    if bool(args.input) != bool(args.split_file):
        raise InputError("--input and --split_file belong together")
    for path in filter(None, (args.input, args.split_file)):
        if not path.is_file():
            raise InputError(f"{path}: is missing")
    make_folder(args.work)
    absolute = [path and path.resolve() for path in (args.work, args.input, args.split_file)]
    rental = Rental(absolute[0], SIZES[args.preset], *absolute[1:], args.steps)
    failed = run_steps(rental, deadline)
    take_home(rental, args.output)
    left = [step.name for step in rental.steps if not (rental.work / "done" / step.name).exists()]
    print(f"left: {', '.join(left) or 'nothing'}")
    if failed:
        raise InputError(f"failed: {', '.join(failed)}")
    return 0


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder of data, models and checkpoints on the machine")
    add("--output", type=Path, required=True, help="folder of what is taken home")
    add("--minutes", type=float, required=True, help="after which a call has ended")
    add("--input", type=Path, metavar="FILE.npz", help="real slices, for prepare --source arrays")
    add("--split_file", type=Path, metavar="FILE.json", help=f"their splits: {', '.join(SPLITS)}")
    add("--steps", nargs="+", metavar="STEP", help="these alone, default: all, the most valuable first")
    add("--preset", choices=sorted(SIZES), default="paper")
    arguments = parser.parse_args()
    raise SystemExit(run_command(lambda: main(arguments)))
