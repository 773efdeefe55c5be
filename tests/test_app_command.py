"""`diffusers-cf app` without a browser: what it refuses, what a slider's position means, and the Space in examples/."""

import importlib.metadata
import logging
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from diffusers_cf.app.command import _quiet_log
from diffusers_cf.app.uploads import Limits
from diffusers_cf.cli import build_parser, main
from diffusers_cf.errors import InputError


ROOT = Path(__file__).resolve().parents[1]
SPACE = ROOT / "examples" / "space"
RECOMMENDED = {
    "guidance_scale": 12.0, "strength": 0.75, "num_inference_steps": 20, "map": "signed", "threshold": 0.07109887152910233
}  # fmt: skip


def test_it_listens_to_this_machine_alone_unless_told_otherwise():
    args = build_parser("app").parse_args(["app"])
    assert args.host == "127.0.0.1" and args.port is None and args.model.endswith("phantom_small")


def test_without_gradio_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app"]) == 2
    assert capsys.readouterr().err == 'error: app needs gradio: pip install "diffusers_cf[app]"\n'


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "missing"], "missing"),
        (["--max-upload-mb", "0"], "--max_upload_mb and --max_patient_mb must be 1 or more"),
        (["--max-patient-mb", "0"], "--max_upload_mb and --max_patient_mb must be 1 or more"),
        (["--port", "70000"], "--port from 1 to 65535"),
        (["--device", "nowhere"], "--device nowhere can't be used"),
    ],
)
def test_bad_options_are_one_line(options, message, capsys):
    assert main(["app", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.slow
def test_an_address_that_is_taken_is_one_line(tmp_path):
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "diffusers_cf.cli", "app", "--port", str(port)]
        done = subprocess.run(command, env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert f"error: --host 127.0.0.1, --port {port}: can't listen there" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_slider_left_where_it_was_is_exactly_what_the_model_recommends():
    pytest.importorskip("gradio")
    from diffusers_cf.app.page import Controls

    controls = Controls(RECOMMENDED, 1000)
    assert controls.settings(12, 0.75, 20, 0.071) == RECOMMENDED
    assert controls.settings(3, 0.5, 33, 0.072) == {
        "guidance_scale": 3, "strength": 0.5, "num_inference_steps": 40, "map": "signed", "threshold": 0.072
    }  # fmt: skip
    sliders = controls.sliders()
    assert [slider.value for slider in sliders] == [12, 0.75, 20, 0.071]
    assert all(slider.minimum <= slider.value <= slider.maximum for slider in sliders)
    assert Controls(RECOMMENDED | {"threshold": None}, 1000).settings(12, 0.75, 20, 0)["threshold"] is None


def test_a_fault_of_ours_names_no_file(caplog):
    pytest.importorskip("gradio")
    from diffusers_cf.app.page import guarded

    name = "-".join(["Surname", "Firstname_t1.nii.gz"])  # a traceback quotes the source

    @guarded("other", "outputs")
    def fail():
        raise OSError(name)

    with caplog.at_level(logging.ERROR):
        line, *rest = fail()
    assert "a fault of this program (OSError)" in line and rest == ["other", "outputs"]
    assert name not in line + caplog.text and "OSError in fail" in caplog.text

    @guarded("other")
    def refuse():
        raise InputError("<b>.nii: damaged")

    assert "&lt;b&gt;.nii: damaged" in refuse()[0] and "cf-error" in refuse()[0]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        np.zeros,
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: 9 bytes"
        ),
    ],
)
def test_too_little_memory_is_no_fault_of_ours(error, caplog):
    pytest.importorskip("gradio")
    from diffusers_cf.app.page import guarded

    @guarded("other")
    def fail():
        if callable(error):
            error(1 << 62, np.uint8)
        raise error

    line, *rest = fail()
    assert "out of memory: try again" in line and "fault" not in line and rest == ["other"] and not caplog.records


def test_every_limit_stands_in_the_page():
    pytest.importorskip("gradio")
    from diffusers_cf.app.page import refuse_large

    script = refuse_large(Limits(file_mb=3, patient_mb=7, all_mb=56))
    assert all(text in script for text in ("file.size > 3 * 2", "limit of 3 MB", "limit of 7 MB", "limit of 16 at a"))
    assert not re.search("MAX_FILES|FILE_MB|PATIENT_MB", script)


def test_warnings_about_files_are_not_logged(caplog, capfd):
    with _quiet_log():
        logging.getLogger("diffusers_cf.segmentation.volumes").warning(
            "Surname-Firstname_t1.nii.gz: not skull-stripped"
        )
    assert not caplog.records and "Surname" not in capfd.readouterr().err


def dependencies(extra):
    """Names of the packages that diffusers_cf needs, always or with an extra."""
    for requirement in importlib.metadata.requires("diffusers_cf"):
        name, _, marker = requirement.partition(";")
        if (f'"{extra}"' in marker.replace("'", '"')) if extra else "extra" not in marker:
            yield re.match(r"[\w.-]+", name).group().lower()


@pytest.mark.slow
def test_the_space_runs_on_the_copy_of_the_package_beside_it(tmp_path):
    shutil.copytree(SPACE, tmp_path / "space")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "diffusers_cf", tmp_path / "space" / "diffusers_cf", ignore=ignored)
    code = (
        "import runpy, diffusers_cf, diffusers_cf.cli\n"
        "diffusers_cf.cli.main = lambda arguments: print(diffusers_cf.__file__, *arguments) or 0\n"
        "runpy.run_path('app.py', run_name='__main__')"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MODEL")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path / "space", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        f"{tmp_path}/space/diffusers_cf/__init__.py",
        *"app --host 0.0.0.0 --port 7860".split(),
    ]


def test_the_space_is_what_the_tests_ran_with(monkeypatch):
    text = (SPACE / "README.md").read_text(encoding="utf-8")
    facts = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL).group(1))
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#")
    assert facts["sdk"] == "gradio" and facts["sdk_version"] == pins["gradio"] and facts["python_version"] == "3.11"
    assert facts["license"] == "apache-2.0" and len(facts["short_description"]) <= 60 and "medical" in facts["tags"]
    assert (SPACE / facts["app_file"]).exists() and facts["models"] == []
    lines = (SPACE / "requirements.txt").read_text().splitlines()
    asked_for = {re.match(r"[\w.-]+", line).group().lower() for line in lines if line[0] not in "#-"}
    assert asked_for == set(dependencies("")) | set(dependencies("phantom"))
    asked = []
    monkeypatch.setattr("diffusers_cf.cli.main", lambda arguments: asked.append(arguments) or 0)
    monkeypatch.setenv("MODEL", "user/name")
    with pytest.raises(SystemExit):
        runpy.run_path(str(SPACE / facts["app_file"]), run_name="__main__")
    assert vars(build_parser("app").parse_args(asked[0])) | {
        "model": "user/name",
        "host": "0.0.0.0",
        "port": 7860,
    } == vars(build_parser("app").parse_args(asked[0]))
