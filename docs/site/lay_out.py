"""Lays out what mkdocs reads: the repository's pages and what they link to, and the reference made from the code.

python docs/site/lay_out.py build/site
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fdpg_fast.config.load import config_keys

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = ("AGENTS.md", ".github/", "kernels/hub/")
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
REFERENCE = "docs/reference"
FDPG_FAST = {
    "Running": (
        *("trainer.Trainer", "trainer.RunResult", "config.load.load_config", "measure.evaluate.Evaluation"),
        "measure.estimators.Estimate",
    ),
    "Targets": tuple(
        f"targets.{name}"
        for name in ("pointwise", "rlhf", "distributional", "base_power", "Target", "Term", "MomentTerm")
    ),
    "Features": (
        *("features.feature.feature", "features.feature.Feature", "features.text.word", "features.text.regex"),
        *("features.text.sentiment", "features.text.classifier", "features.code.python_parses", "features.code.pep8"),
        *("features.entities.entities", "features.remote.http", "features.remote.retried"),
    ),
    "Engines": (
        *("engines.engine.Engine", "engines.embedded.TransformersEngine", "engines.vllm.VLLMEngine"),
        "engines.replicas.VLLMServerEngine",
    ),
    "What a round is made of": ("contexts.Context", "rollouts.Rollouts", "scoring.Scores"),
}
FDPG_KERNELS = {
    "Log-probs": ("linear_logprob", "LinearLogprob", "sharded_linear_logprob"),
    "Weights and loss": ("sequence_weights", "SequenceWeights", "fdpg_loss", "FDPGLoss", "sum_by_sequence"),
    "Divergences": ("divergences.get", "Divergence"),
}


def lay_out(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    pages = [ROOT / name for name in listed.stdout.split() if not name.startswith(LEFT_OUT)]
    for page in pages:
        text = LINK.sub(functools.partial(shown, page=page, folder=folder), page.read_text(encoding="utf-8"))
        write(folder / page.relative_to(ROOT), text)
    write(folder / REFERENCE / "config.md", config_page())
    write(folder / REFERENCE / "fdpg_fast.md", python_page("fdpg_fast", FDPG_FAST))
    write(folder / REFERENCE / "fdpg_kernels.md", python_page("fdpg_kernels", FDPG_KERNELS))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def shown(link: re.Match[str], page: Path, folder: Path) -> str:
    """A link as the site has it: a folder is its README, other files than pages are copied."""
    path = link[2].partition("#")[0]
    target = (page.parent / path).resolve()
    if "://" in link[2] or not path or target.suffix == ".md":
        return link[0]
    if target.is_dir():
        return f"[{link[1]}]({path.rstrip('/')}/README.md)" if (target / "README.md").exists() else link[1]
    copy = folder / target.relative_to(ROOT)
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(target, copy)
    return link[0]


def config_page() -> str:
    """Every key with its documentation, a section a table."""
    sections: dict[str, list[str]] = {}
    for key, text in config_keys().items():
        section = key.partition(".")[0] if "." in key else "a run"
        sections.setdefault(section, []).append(f"| `{key}` | {text.replace('|', chr(92) + '|')} |")
    lines = ["# Every key", "", "As `fdpg-fast train --keys` prints them. N stands for a place in a list."]
    for section, rows in sections.items():
        lines += ["", f"## {section}", "", "| key | what it is |", "|---|---|", *rows]
    return "\n".join(lines)


def python_page(package: str, groups: Mapping[str, Sequence[str]]) -> str:
    lines = [f"# {package}"]
    for group, names in groups.items():
        lines += [f"\n## {group}", *(f"\n::: {package}.{name}" for name in names)]
    return "\n".join(lines)


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]))
