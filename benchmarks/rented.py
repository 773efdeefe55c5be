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
from rented_sizes import SIZES, Size

from diffusers_cf import CounterfactualDDIMPipeline
from diffusers_cf.arguments import ArgumentParser, run_command
from diffusers_cf.commands.demo import SHIPPED_MODEL
from diffusers_cf.errors import InputError
from diffusers_cf.files import make_folder
from diffusers_cf.training.loop import finished_checkpoints


ROOT = Path(__file__).parent.parent
PART_BYTES = 15 * 2**20  # of what is taken home
GRACE_SECONDS = 20  # at the end of a call, for packing
SPLITS = ("split_1", "split_2", "split_3")
KEPT = (".json", ".md", ".png")  # of the scores


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
        self.scores, self.deadline = work / "scores", math.inf
        self.taken: str | None = None  # the model that goes home after this call
        known = [step.name for step in self._all_steps()]
        if unknown := sorted(set(only or ()) - set(known)):
            raise InputError(f"--steps {unknown[0]}: it must be one of {', '.join(known)}")
        self._wanted = set(only or known)
        for step in self.steps:
            if missing := [need for need in step.needs if need not in self._wanted and not self.is_done(need)]:
                raise InputError(f"--steps {step.name}: needs {missing[0]}, which is neither done nor asked for")

    def is_done(self, name: str) -> bool:
        return (self.work / "done" / name).exists()

    @property
    def steps(self) -> list[Step]:
        """Those that are wanted, the most valuable first."""
        return [step for step in self._all_steps() if step.name in self._wanted]

    def _all_steps(self) -> Iterator[Step]:
        splits = SPLITS if self.arrays else ()
        yield Step("phantom", (), self._prepare_phantom)
        yield Step("rate", ("phantom",), self._rate)
        yield from self._model("phantom", ("phantom",), self._train)
        for split in splits:
            yield Step(split, (), partial(self._prepare_arrays, split))
            yield from self._model(split, (split, "train-phantom"), partial(self._tune, split))
        yield Step("train-small", ("phantom",), self._train_small)
        for group in self.size.rows:
            yield Step(f"{group}-phantom", ("phantom",), partial(self._benchmark, "phantom", ("phantom",), group))
            if splits:
                more = ("--augment", "--no_pictures")
                yield Step(f"{group}-arrays", splits, partial(self._benchmark, "arrays", splits, group, more))
        if self.size.patient:
            yield Step("patient", (), self._patient)
        yield Step("speed", ("phantom", "patient") if self.size.patient else ("phantom",), self._speed)

    def _model(self, data: str, needs: tuple[str, ...], train: Callable[[], list[str]]) -> Iterator[Step]:
        """Training on a data set, settings by its validation split, scores on its test split."""
        yield Step(f"train-{data}", needs, train)
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
        given = ["--dataset", self.data("phantom"), "--output", str(self.scores / "training_speed.json")]
        return _script("benchmarks/training_speed.py", *given, *self.size.speed_of_training)

    def rate(self) -> float:
        """Images a second that this machine trains on: as measured, or what came first of a measurement that was stopped."""
        whole, first = (self.scores / f"training_speed{kind}.json" for kind in ("", ".first"))
        if whole.exists():
            return min(json.loads(whole.read_text(encoding="utf-8"))["ways"]["ours"]["images_per_second"])
        return json.loads(first.read_text(encoding="utf-8"))["images_per_second"] if first.exists() else self.size.rate

    def training_steps(self) -> int:
        """As many as there is time for when it begins; kept, since a training that goes on must have the same schedule."""
        kept = self.work / "training_steps"
        if not kept.exists():
            seconds = min(self.size.seconds, self.deadline - time.monotonic() - self.size.after)
            steps = math.floor(self.rate() * seconds / self.size.batch_size)
            kept.write_text(str(min(max(2, steps), self.size.limit)), encoding="utf-8")
        return int(kept.read_text(encoding="utf-8"))

    @property
    def _batch(self) -> tuple[str, str]:
        return "--train_batch_size", str(self.size.batch_size)

    def _train(self) -> list[str]:
        steps = self.training_steps()
        given = ["--max_train_steps", str(steps), "--validation_steps", str(math.ceil(steps / 3)), "--random_flip"]
        return self._script_of_training("phantom", "phantom", *given, *self._batch, *self.size.train)

    def _tune(self, split: str) -> list[str]:
        given = [
            "--pretrained_model",
            str(self.model("phantom")),
            "--renormalize",
            "--random_flip",
            *self._batch,
            *self.size.tune,
        ]
        return self._script_of_training(split, split, *given)

    def _train_small(self) -> list[str]:
        return self._script_of_training("small", "phantom", "--pretrained_model", str(SHIPPED_MODEL), *self.size.small)

    def _script_of_training(self, name: str, data: str, *given: str) -> list[str]:
        """The training script; on from its last checkpoint, where there is one."""
        more = ["--resume_from_checkpoint", "latest"] if any(self.model(name).glob("checkpoint-*")) else []
        given = ("--dataset", self.data(data), "--output_dir", str(self.model(name)), *given)
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


def run_steps(rental: Rental, deadline: float, take: Callable[[], None] = lambda: None) -> list[str]:
    """Calls what is not done yet until the deadline; of a failure only those suffer that need it.

    Args:
        rental: the runs.
        deadline: by `time.monotonic`.
        take: called after each step that ended well.

    Returns:
        Names of the steps that failed.
    """
    failed, rental.deadline = [], deadline
    (rental.work / "done").mkdir(parents=True, exist_ok=True)
    for step in rental.steps:
        if rental.is_done(step.name) or not all(rental.is_done(need) for need in step.needs):
            continue
        seconds = deadline - time.monotonic()
        if seconds < 1:
            break
        print(f"{step.name}: {seconds:.0f} s left", flush=True)
        code = _call(step.command(), seconds, rental.work)
        if code is None:
            break
        if code:
            failed.append(step.name)
        else:
            (rental.work / "done" / step.name).touch()
            take()
    return failed


def _call(command: list[str], seconds: float, work: Path) -> int | None:
    """Exit code of a command; None where it had to be stopped."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(work / "inductor")}  # compiled once for all commands
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
    """Packs all scores, and one trained model of a call as it is now: the files of several are too many."""
    make_folder(output)
    with tarfile.open(output / "scores.tar.gz", "w:gz") as tar:
        for path in sorted(rental.scores.rglob("*")):
            name = path.relative_to(rental.scores)
            if path.suffix in KEPT and ".parts" not in str(name):  # those of a command that was stopped
                tar.add(path, Path("scores") / name)
        for curve in rental.work.glob("models/*/validation/scores.json"):
            tar.add(curve, f"scores/{curve.parent.parent.name}/learning_curve.json")
    trained = sorted(path.name.removeprefix("train-") for path in (rental.work / "done").glob("train-*"))
    for name in [rental.taken] if rental.taken else trained:
        state = str((rental.model(name) / "preprocessing.json").stat().st_mtime_ns)
        packed = rental.work / "done" / f"packed-{name}"
        if not packed.exists() or packed.read_text(encoding="utf-8") != state:
            _pack_model(rental.model(name), rental.work / "half" / name, output)
            packed.write_text(state, encoding="utf-8")
            rental.taken = name
            return


def take_unfinished(rental: Rental, output: Path) -> None:
    """Packs the last checkpoint of a training that was stopped, as NAME-unfinished, where no other model goes home."""
    unfinished = [path for path in rental.work.glob("models/*") if not rental.is_done(f"train-{path.name}")]
    for model in [] if rental.taken else sorted(unfinished):
        if checkpoints := finished_checkpoints(model):
            _pack_model(checkpoints[-1] / "pipeline", rental.work / "half" / f"{model.name}-unfinished", output)
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
    failed = run_steps(rental, deadline, partial(take_home, rental, args.output))
    take_home(rental, args.output)
    take_unfinished(rental, args.output)
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
