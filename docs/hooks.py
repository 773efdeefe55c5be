"""Write the options of every command into the page of commands, from their parsers."""

import sys
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffusers_cf.cli import COMMANDS, build_parser  # noqa: E402
from train_counterfactual import parse_args  # noqa: E402


def on_page_markdown(markdown: str, page, **_) -> str:
    """Replace the mark in reference/commands.md by a section for each command."""
    if page.file.src_uri != "reference/commands.md":
        return markdown
    parses = {"accelerate launch train_counterfactual.py": parse_args}
    parses |= {
        f"diffusers-cf {name}": lambda words, name=name: build_parser(name).parse_args([name, *words])
        for name in COMMANDS
    }
    sections = []
    for name, parse in parses.items():
        with redirect_stdout(StringIO()) as text, suppress(SystemExit):
            parse(["--help"])
        sections.append(f"## {name}\n\n```text\n{text.getvalue()}```")
    return markdown.replace("<!-- commands -->", "\n\n".join(sections))
