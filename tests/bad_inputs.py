"""Every bad input that we know of, given to segment, report, publish and the app's upload code: one Markdown table.

    python tests/bad_inputs.py [TABLE.md]

Each cell is the exit code and the line that was said; 1 would be a traceback. Not a test: the tests of each module hold
what is promised, this shows it side by side.
"""

import contextlib
import gzip
import io
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from data_files import ras_affine, save
from filelock import FileLock
from segmentation_files import MODALITIES, make_pipe
from test_data_nifti import BAD_FILES, DATA, SOUND_FILES, nifti_bytes

from diffusers_cf.app.explorer import Explorer
from diffusers_cf.cli import main
from diffusers_cf.errors import InputError
from diffusers_cf.loading import sha256_of
from diffusers_cf.segmentation.patient import segmentation_facts


COLUMNS = ("segment", "report: scan", "report: result", "publish", "app")
SAID = 150  # characters of a line that a cell shows
GOOD = DATA + 1  # no empty slice
PNG = b"\x89PNG\r\n\x1a\n"
UNET = "unet/diffusion_pytorch_model.safetensors"


@contextlib.contextmanager
def warnings_of_the_package():
    """The warnings that the package logs meanwhile."""
    found, handler, logger = [], logging.Handler(logging.WARNING), logging.getLogger("diffusers_cf")
    handler.emit = lambda record: found.append(record.getMessage())
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


class Place:
    """A model, a sound patient, what segment makes of it, and the commands, all in one folder."""

    def __init__(self, root: Path):
        self.root, self.count = root, 0
        self.pipe = make_pipe()
        self.pipe.preprocessing |= {"class_names": ["healthy", "unhealthy"], "source": "phantom"}
        self.pipe.save_pretrained(root / "model")
        self.sound = self.patient({"flair": nifti_bytes(GOOD), "t1": nifti_bytes(GOOD)})
        assert self.segment(self.sound, root / "out")[0] == 0

    def new(self) -> Path:
        self.count += 1
        (self.root / str(self.count)).mkdir()
        return self.root / str(self.count)

    def patient(self, files: dict[str, bytes | np.ndarray], suffix: dict[str, str] | None = None) -> Path:
        """A folder `P` of scans; a name that is no modality keeps its own ending."""
        folder = self.new() / "P"
        folder.mkdir()
        for name, content in files.items():
            packed = isinstance(content, bytes) and content[:2] == b"\x1f\x8b"
            ending = (suffix or {}).get(name, ".nii.gz" if packed else ".nii")
            if isinstance(content, bytes):
                (folder / f"P_{name}{ending}").write_bytes(content)
            else:
                save(folder / f"P_{name}.nii", content)
        return folder

    def run(self, *arguments) -> tuple[int, str]:
        """Exit code of a command and what it said at the end: the error, or else a warning, or else its last line."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings_of_the_package() as warnings:
            try:
                code = main([str(argument) for argument in arguments])
            except SystemExit as error:  # of argparse
                code = error.code
            except Exception as error:
                return 1, f"TRACEBACK {type(error).__name__}: {error}"
        errors = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
        if len(errors) > 1:
            return code, f"{len(errors)} LINES: {errors}"
        said = errors or [f"warns: {line}" for line in warnings if "skull" not in line]
        return code, (said or ["taken"])[0]

    def segment(self, folder: Path, out: Path | None = None, *options, model: Path | None = None) -> tuple[int, str]:
        out = out or self.new() / "out"
        return self.run("segment", folder, "--model", model or self.root / "model", "--output", out, *options)

    def report(self, out: Path, *options) -> tuple[int, str]:
        return self.run("report", out, "--output", self.new() / "report.html", *options)

    def result(self, damage: Callable[[Path], object]) -> tuple[int, str]:
        """`report` of a result that was damaged."""
        folder = shutil.copytree(self.root / "out" / "P", self.new() / "P")
        damage(folder)
        return self.report(folder)

    def scan(self, folder: Path) -> tuple[int, str]:
        """`report --scans` of a result that claims to be of just this scan."""
        path = next(iter(sorted(folder.glob("*flair*"))), None)
        if path is None or not path.is_file():
            return self.report(self.root / "out" / "P", "--scans", folder)
        out = shutil.copytree(self.root / "out" / "P", self.new() / "P")
        edit(out / "report.json", inputs={"flair": sha256_of(path), "t1": "0" * 64})
        return self.report(out, "--scans", folder)

    def publish(self, *options, damage: Callable[[Path], object] = lambda folder: None) -> tuple[int, str]:
        model = shutil.copytree(self.root / "model", self.new() / "model")
        damage(model)
        return self.run("publish", model, "--repo_id", "user/name", *options)

    def app(self, folder: Path) -> tuple[int, str]:
        """What the page says to these files; 2 where it says an error."""
        root = self.new()
        place = tempfile.TemporaryDirectory(dir=root)
        scans = shutil.copytree(folder, Path(place.name, "patient"))
        facts = segmentation_facts(self.pipe, model="tiny")
        try:
            explorer = Explorer(self.pipe, facts, place, scans, root, max_bytes=256 << 20)
            explorer.view(explorer.first_slice, facts["settings"])
        except InputError as error:
            return 2, str(error).replace(f"{scans}/", "").replace(f"{scans}: ", "")
        except Exception as error:
            return 1, f"TRACEBACK {type(error).__name__}: {error}"
        return 0, "taken"

    def row(self, folder: Path, *options) -> dict[str, tuple[int, str]]:
        return {
            "segment": self.segment(folder, None, *options),
            "report: scan": self.scan(folder),
            "app": self.app(folder),
        }

    def file(self, content: bytes, suffix: str | None = None) -> dict[str, tuple[int, str]]:
        """A file in the place of a scan, and of a result's heatmap."""
        suffixes = {} if suffix is None else {"flair": suffix}
        cells = self.row(self.patient({"flair": content, "t1": nifti_bytes(GOOD)}, suffixes))
        return cells | {"report: result": self.result(lambda out: (out / "heatmap.nii.gz").write_bytes(content))}


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def volume(data: np.ndarray, axes: str = "RAS", affine: np.ndarray | None = None) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return save(Path(folder) / "x.nii", data, axes, affine).read_bytes()


def bomb(size: int) -> bytes:
    """A sound file, and zeros behind it."""
    part = gzip.compress(bytes(64 << 20))
    return gzip.compress(nifti_bytes(GOOD)) + part * (size // (64 << 20) + 1)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def scan_rows(place: Place):
    """Section by section as in the list of known failures: first the files."""
    for name, (content, _) in BAD_FILES.items():
        yield name, place.file(content)
    yield "PNG named .nii.gz", place.file(PNG + bytes(600), ".nii.gz")
    yield "plain .nii named .nii.gz", place.file(nifti_bytes(GOOD), ".nii.gz")
    yield "gzip bomb, 2.1 GB", place.file(bomb(2100 << 20))
    yield "slope 0.5, intercept -100", place.file(nifti_bytes(GOOD + 300, scl_slope=0.5, scl_inter=-100))
    for name in ("slope 0", "slope NaN", "slope infinite", "singleton axis", "big-endian", "NIfTI-2"):
        yield name, place.file(SOUND_FILES[name][0])
    flat = {name: nifti_bytes(GOOD[..., 0]) for name in MODALITIES}
    yield "2-D", place.row(place.patient(flat))
    yield "permuted axes (PSR)", place.file(volume(GOOD, "PSR"))
    sheared = ras_affine(None)
    sheared[0, 1] = 1
    yield "sheared affine", place.row(place.patient({name: volume(GOOD, affine=sheared) for name in MODALITIES}))
    yield "modality all zero", place.file(nifti_bytes(0 * GOOD))
    yield "modality mostly negative", place.file(nifti_bytes(-GOOD))
    yield "empty slices", place.file(nifti_bytes(np.where(np.arange(4) == 1, 0, GOOD).astype(np.int16)))


def patient_rows(place: Place):
    """What is wrong between files."""
    good = nifti_bytes(GOOD)
    yield "modality missing", place.row(place.patient({"flair": good}))
    two = place.patient({"flair": good, "t1": good})
    shutil.copy(two / "P_t1.nii", two / "Q_t1n.nii")
    yield "two files of a modality", place.row(two)
    yield "shapes differ", place.row(place.patient({"flair": good, "t1": nifti_bytes(GOOD[:, :, :3])}))
    moved = ras_affine(None)
    moved[0, 3] += 1
    yield "affines differ", place.row(place.patient({"flair": good, "t1": volume(GOOD, affine=moved)}))
    for name, seg in (("labels unknown", 9), ("labels with fractions", 0.5), ("labels negative", -1)):
        files = {"flair": good, "t1": good, "seg": nifti_bytes(np.full(GOOD.shape, seg, np.float32))}
        yield name, place.row(place.patient(files))
    stack = place.patient({f"{name}_{i}": PNG for name in MODALITIES for i in range(3)}, {
        f"{name}_{i}": ".png" for name in MODALITIES for i in range(3)
    })  # fmt: skip
    yield "8-bit PNG stack", place.row(stack)
    spread = np.full(GOOD.shape, 1e-40, np.float32)
    spread[0, 0, 0] = 3e38
    yield "intensities that overflow", place.row(place.patient({"flair": nifti_bytes(spread), "t1": good}))
    linked = place.patient({"t1": good})
    (linked / "P_flair.nii").symlink_to(place.sound / "P_flair.nii")
    yield "scan is a symlink", place.row(linked)
    odd = place.new() / "a patient"
    shutil.copytree(place.sound, odd)
    yield "folder's name with a blank", {"segment": place.segment(odd)}
    yield "empty folder", place.row(place.new()) | {"report: result": place.report(place.new())}
    yield "a file for a folder", {
        "segment": place.segment(place.sound / "P_t1.nii"), "report: result": place.report(place.sound / "P_t1.nii"),
    }  # fmt: skip


def setting_rows(place: Place):
    """Options out of range."""
    for options in (
        ("--strength", "2"), ("--strength", "nan"), ("--num_inference_steps", "7"), ("--guidance_scale", "nan"),
        ("--guidance_scale", "-1"), ("--guidance_scale", "1"), ("--threshold", "inf"), ("--batch_size", "0"),
    ):  # fmt: skip
        yield " ".join(options), {"segment": place.segment(place.sound, None, *options)}
    for value in (0, 120, "99"):
        yield (
            f"model's percentile {value!r}",
            model_row(place, lambda m, v=value: edit(m / "preprocessing.json", percentile=v)),
        )


def model_row(place: Place, damage: Callable[[Path], object]) -> dict:
    model = shutil.copytree(place.root / "model", place.new() / "model")
    damage(model)
    return {"segment": place.segment(place.sound, model=model), "publish": place.publish(damage=damage)}


def model_rows(place: Place):
    """Model folders, pictures and results to publish."""
    cut = lambda m: (m / UNET).write_bytes((m / UNET).read_bytes()[:-1000])  # noqa: E731
    yield "weights truncated", model_row(place, cut)
    yield "weights, a byte flipped", model_row(place, lambda m: flip(m / UNET))
    yield (
        "weights as a pickle only",
        model_row(place, lambda m: (m / UNET).rename(m / "unet/diffusion_pytorch_model.bin")),
    )
    yield (
        "model_index.json names os.system",
        model_row(place, lambda m: edit(m / "model_index.json", unet=["os", "system"])),
    )
    yield "preprocessing.json damaged", model_row(place, lambda m: (m / "preprocessing.json").write_text("{"))
    yield "modality ../../x", model_row(place, lambda m: edit(m / "preprocessing.json", modalities=["../../x", "t1"]))
    for name, content in (("picture is text", b"text"), ("picture of 0 bytes", b"")):
        path = place.new() / "picture.png"
        path.write_bytes(content)
        yield name, {"publish": place.publish("--pictures", path)}
    for name, text in (
        ("RESULT.json cut off", "{"), ("RESULT.json a list", "[]"), ("RESULT.json 100,000 deep", "[" * 10**5),
        ("RESULT.json empty", "{}"),
    ):  # fmt: skip
        path = place.new() / "RESULT.json"
        path.write_text(text)
        yield name, {"publish": place.publish("--scores", path)}


def result_rows(place: Place):
    """What `segment` has written, damaged or foreign; and as what is finished already."""
    report = "report.json"
    deep = '{"a":' * 10**5 + "1" + "}" * 10**5
    damages = {
        "report.json cut off": lambda out: (out / report).write_text("{"),
        "report.json a list": lambda out: (out / report).write_text("[]"),
        "report.json 100,000 deep": lambda out: (out / report).write_text(deep),
        "report.json of 17 MB": lambda out: (out / report).write_text(" " * (17 << 20)),
        "a string for a number": lambda out: edit(out / report, lesion_volume_ml="much"),
        "threshold NaN": lambda out: edit(out / report, threshold=float("nan")),
        "inputs {}": lambda out: edit(out / report, inputs={}),
        "inputs ../../x": lambda out: edit(out / report, inputs={"../../x": "0" * 64}),
        "patient <script>": lambda out: edit(out / report, patient="<script>alert(1)</script>"),
        "dice x": lambda out: edit(out / report, dice="x"),
        "mask missing": lambda out: (out / "mask.nii.gz").unlink(),
        "preview.png is text": lambda out: (out / "preview.png").write_text("text"),
        "mask.nii.gz is a symlink": lambda out: link(out / "mask.nii.gz"),
        "preview.png is a symlink": lambda out: link(out / "preview.png"),
    }
    for name, damage in damages.items():
        finished = shutil.copytree(place.root / "out", place.new() / "out")
        damage(finished / "P")
        yield name, {"segment": place.segment(place.sound, finished), "report: result": place.result(damage)}


def link(path: Path) -> None:
    target = path.parent.parent / f"elsewhere-{path.name}"
    path.rename(target)
    path.symlink_to(target)


def disk_rows(place: Place):
    """Places to write to."""
    import resource

    out = shutil.copytree(place.root / "out", place.new() / "out")
    (out / "P").rename(out / "Q")
    with FileLock(out / ".P.lock"):
        yield "another process at the patient", {"segment": place.segment(place.sound, out)}
    (place.new() / "file").touch()
    blocked = place.root / str(place.count) / "file"
    yield (
        "output is a file",
        {
            "segment": place.segment(place.sound, blocked),
            "report: result": place.run("report", place.root / "out", "--output", blocked / "report.html"),
        },
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:  # Python ignores the signal, so that writing fails as on a full disk
        cells = {"segment": place.segment(place.sound), "report: result": place.report(place.root / "out")}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    yield "disk full", cells


def cell(outcome: tuple[int, str] | None, root: Path) -> str:
    if outcome is None:
        return "-"
    code, said = outcome
    said = re.sub(rf"{re.escape(str(root))}/(\d+/)?", "", said.removeprefix("error: ")).replace("|", r"\|")
    said = said if len(said) <= SAID else said[:SAID] + " .."
    return f"**{code}** {said}"


def table(root: Path):
    place = Place(root)
    yield f"| input | {' | '.join(COLUMNS)} |"
    yield "|---" * (len(COLUMNS) + 1) + "|"
    for rows in (scan_rows, patient_rows, setting_rows, model_rows, result_rows, disk_rows):
        for name, cells in rows(place):
            yield f"| {name} | {' | '.join(cell(cells.get(column), root) for column in COLUMNS)} |"


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody listens: what is not refused before fails there
    with tempfile.TemporaryDirectory() as folder:
        lines = []
        for line in table(Path(folder)):
            print(line, flush=True)
            lines.append(line)
        if sys.argv[1:]:
            Path(sys.argv[1]).write_text("\n".join(lines) + "\n", encoding="utf-8")
