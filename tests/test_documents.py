"""Documents: what they link to is there, and the version that is cited is this one."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path

import pytest
import yaml

import fdpg_fast
import fdpg_kernels
from fdpg_fast.imports import import_object

ROOT = Path(__file__).resolve().parents[1]
LISTED = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True).stdout.split()
DOCUMENTS = [ROOT / name for name in LISTED] or [x for x in ROOT.rglob("*.md") if ".venv" not in x.parts]


def anchors(document: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    prose = re.sub(r"(?ms)^```.*?^```", "", document.read_text())
    headings = re.findall(r"(?m)^#+ +(.*)$", prose)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_links_to_is_there(document):
    prose = re.sub(r"(?ms)^```.*?^```|`[^`\n]*`", "", document.read_text())
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if "://" in link or link.startswith("mailto:"):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_all_that_the_reference_names_is_there(tmp_path):
    """And documented: the site shows docstrings."""
    lay_out = import_object(f"{ROOT / 'docs/site/lay_out.py'}:lay_out")
    lay_out(tmp_path)
    text = "\n".join(page.read_text() for page in tmp_path.glob("docs/reference/*.md"))
    names = [name.rpartition(".")[::2] for name in re.findall(r"(?m)^::: (\S+)", text)]
    undocumented = [name for module, name in names if not getattr(importlib.import_module(module), name).__doc__]
    assert undocumented == [] and len(names) > 30


def test_one_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == fdpg_fast.__version__ == fdpg_kernels.__version__
