"""Write the options of every command into the page of commands, from their parsers."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffusers_cf.cli import COMMANDS, build_parser  # noqa: E402
from train_counterfactual import build_parser as build_training_parser  # noqa: E402


def on_page_markdown(markdown: str, page, **_) -> str:
    """Replace the mark in reference/commands.md by a section for each command."""
    if page.file.src_uri != "reference/commands.md":
        return markdown
    parsers = {"train_counterfactual.py": build_training_parser()}
    for command in COMMANDS:
        subparsers = build_parser(command)._subparsers._group_actions[0].choices
        parsers[f"diffusers-cf {command}"] = subparsers[command]
    sections = [f"## {name}\n\n```text\n{parser.format_help()}```" for name, parser in parsers.items()]
    return markdown.replace("<!-- commands -->", "\n\n".join(sections))
