"""The command `diffusers-cf app` without a browser: what it refuses, and the Space in examples/."""

import importlib.metadata
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from diffusers_cf.cli import build_parser, main


ROOT = Path(__file__).resolve().parents[1]
SPACE = ROOT / "examples" / "space"


def test_without_gradio_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR", "no_proxy"):  # restored afterwards
        monkeypatch.setenv(name, "")
    assert main(["app"]) == 2
    assert capsys.readouterr().err == 'error: app needs gradio: pip install "gradio>=6.31"\n'


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-upload-mb", "0"], "--max_upload_mb must be 1 or more"),
        (["--port", "70000"], "--port from 1 to 65535"),
    ],
)
def test_bad_options_are_one_line(options, message, capsys):
    assert main(["app", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.slow
def test_a_port_that_is_taken_is_one_line(tmp_path):
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "diffusers_cf.cli", "app", "--port", port]
        done = subprocess.run(command, env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 2 and not list(tmp_path.iterdir()) and "Traceback" not in done.stderr
    assert re.match(f"error: .*{port}", done.stderr.splitlines()[-1])


@pytest.mark.slow
def test_the_space_runs_on_the_copy_of_the_package_beside_it(tmp_path):
    space = shutil.copytree(SPACE, tmp_path / "space")
    shutil.copytree(ROOT / "diffusers_cf", space / "diffusers_cf", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import runpy, diffusers_cf, diffusers_cf.cli\n"
        "diffusers_cf.cli.main = lambda arguments: print(diffusers_cf.__file__, *arguments) or 0\n"
        "runpy.run_path('app.py', run_name='__main__')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"MODEL": "user/name"}
    options = {"cwd": space, "env": environment, "capture_output": True, "text": True, "check": True}
    package, *arguments = subprocess.run([sys.executable, "-c", code], **options).stdout.split()
    args = build_parser("app").parse_args(arguments)
    assert package == f"{space}/diffusers_cf/__init__.py"
    assert (args.model, args.host, args.port) == ("user/name", "0.0.0.0", 7860)


def test_the_space_is_what_the_tests_ran_with():
    text = (SPACE / "README.md").read_text(encoding="utf-8")
    facts = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL).group(1))
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#")
    assert facts["sdk"] == "gradio" and facts["sdk_version"] == pins["gradio"] and facts["python_version"] == "3.11"
    assert facts["license"] == "apache-2.0" and len(facts["short_description"]) <= 60 and "medical" in facts["tags"]
    assert (SPACE / facts["app_file"]).exists() and facts["models"] == []
    asked_for = [line for line in (SPACE / "requirements.txt").read_text().splitlines() if line[0] not in "#-"]
    requirements = importlib.metadata.requires("diffusers_cf")
    needed = [line for line in requirements if not re.search("extra == .(?!phantom)", line)]
    asked_for, needed = ({re.match(r"[\w.-]+", line).group().lower() for line in part} for part in (asked_for, needed))
    assert asked_for == needed
