"""What gpu.py and gpu_round.py are called with, and where their results go."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch


def make_parser(module: str, description: str, *, minutes: float, repeats: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the JSON, table and figure")
    add("--minutes", type=float, default=minutes, help=f"nothing starts that would end after this; {minutes:g}")
    add("--repeats", type=int, choices=range(1, 101), metavar="N", default=repeats, help=f"of each timing; {repeats}")
    add("--smoke", action="store_true", help="tiny, and nothing to learn from but whether it runs")
    add("--device", choices=["cuda", "cpu"], default="cuda")
    return parser


def why_not(options: argparse.Namespace) -> str | None:
    """What keeps a benchmark from running with these options here."""
    if options.device == "cpu" and not options.smoke:
        return "--device cpu is for trying it out: add --smoke"
    if options.device == "cuda" and not torch.cuda.is_available():
        return "this benchmark needs an NVIDIA GPU; --device cpu --smoke only shows that it runs"
    return None


def result_path(folder: Path, machine: dict[str, Any], prefix: str = "") -> Path:
    """Of the JSON, in a folder that exists from now on."""
    folder.mkdir(parents=True, exist_ok=True)
    chip = re.sub(r"[^a-z0-9]+", "-", machine["chip"].lower()).strip("-")
    return folder / f"{prefix}{chip}-{machine['date'][:19].replace(':', '')}.json"


def write(result: dict[str, Any], markdown: Iterable[str], path: Path) -> None:
    """The JSON, whole or not at all, and the Markdown beside it."""
    unfinished = path.with_suffix(".json.part")
    unfinished.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    unfinished.replace(path)
    path.with_suffix(".md").write_text("\n".join(markdown) + "\n")
