"""The documentation builds without a warning, and what README and docs/ tell a user to type is accepted."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from diffusers_cf.cli import build_parser
from train_counterfactual import parse_args


ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = re.compile(r"^```(?:bash|text)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def commands_of(page):
    """Lists of words of every command of the package in a page's blocks of code."""
    for block in CODE.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for name in ("diffusers-cf", "train_counterfactual.py"):
                if name in words:
                    yield words[words.index(name) :]


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "reference" / "commands" / "index.html").read_text(encoding="utf-8")
    assert "--channel_dropout" in page and "--median_size" in page  # of the training script and of a command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_of_a_page_are_accepted(page):
    for name, *words in commands_of(page):
        if name == "diffusers-cf":
            assert build_parser(words[0]).parse_args(words).command == words[0]
        else:
            parse_args(words)


def test_files_that_the_readme_links_to_exist():
    links = re.findall(r"\]\(((?!https?:)[^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(links) > 10 and all((ROOT / link).exists() for link in links)
