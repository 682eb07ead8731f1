"""What an experiment's rows show: results.md with verdicts, tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ..runs.folder import write_whole
from ..runs.tables import DOUBT, LABELS, doubtful, in_short, is_of_feature, label_of, with_error
from .experiment import Experiment
from .intervals import average
from .pictures import draw_by_k, draw_curves, draw_trade_offs
from .rows import Row, settings_of

# of the metrics that every evaluation has, those that tables show
COLUMNS = (
    *("kl_to_base", "kl_of_target_to_base", "entropy_per_token", "entropy_per_sequence"),
    *("distinct_2", "self_bleu_5", "log_z"),
    *("divergence/forward_kl", "divergence/reverse_kl", "divergence/total_variation", "divergence/jensen_shannon"),
)


def write_page(place: Path, name: str, budget: str, experiment: Experiment, rows: Sequence[Row]) -> Path:
    """Make results.md and its pictures in `place`; returns the page."""
    studies = {row.labels["study"]: [r for r in rows if r.labels["study"] == row.labels["study"]] for row in rows}
    pictures = []
    if draw_trade_offs(studies, place / "trade-offs.png"):
        note = "After training; bars are 95 % intervals, without what a seed does to all colours of one marker alike."
        pictures.append(f"![trade-offs](trade-offs.png)\n\n{note}")
    if any("pass@" in str(finding) for finding in experiment.findings) and draw_by_k(studies, place / "pass-at-k.png"):
        pictures.append("![pass@k](pass-at-k.png)\n\nThe same, of at least one of k samples.")
    if draw_curves(studies, place / "curves.png"):
        pictures.append("![curves](curves.png)\n\nMean over seeds; shaded from the lowest to the highest.")
    judged = [finding for finding in experiment.findings if finding.study in (None, *studies)]
    elsewhere = {f"`{finding.study}`": None for finding in experiment.findings if finding not in judged}
    verdicts = [finding.judge(rows) for finding in judged]
    lines = [
        f"# {name}: results ({budget})",
        experiment.claim,
        "## Findings",
        _table(["claim", "verdict", "numbers"], [[v.claim, f"**{v.verdict}**", v.evidence] for v in verdicts]),
        *([f"Not run here, so not judged: the findings on {', '.join(elsewhere)}."] if elsewhere else []),
        *pictures,
    ]
    for study, rows_of_study in studies.items():
        lines += [f"## {study}", _study_table(rows_of_study)]
    hours = sum(row.seconds for row in rows) / 3600
    lines += [
        "## How it was made",
        experiment.fairness,
        f"{len(rows)} runs of {len({row.seed for row in rows})} seeds, {hours:.2f} hours of runs in all, on "
        f"{'; '.join(sorted({row.machine for row in rows}))}. Intervals are 95 %: Student's t over seeds, or the error "
        "of the one measurement where there is one seed. Verdicts and tables are computed from `results.jsonl`.",
        f"    fdpg-fast experiment {name} --budget {budget}",
    ]
    return write_whole(place / "results.md", "\n\n".join(lines) + "\n")


def _study_table(rows: list[Row]) -> str:
    measured = dict.fromkeys(key for row in rows for key in row.metrics)
    keys = [key for key in in_short(measured) if is_of_feature(key) and not _certain(rows, key)]
    keys += [key for key in COLUMNS if key in measured and not _certain(rows, key)]
    keys += [key for key in measured if not (key in LABELS or is_of_feature(key) or key.startswith("divergence/"))]
    # a column of nothing but infinities or unknowns says nothing
    keys = [key for key in keys if any(math.isfinite(row.metrics[key].value) for row in rows if key in row.metrics)]
    axes = [axis for axis in rows[0].labels if axis != "study"]
    body, doubt = [], False
    for labels in settings_of(rows):
        here = [row for row in rows if row.labels == labels]
        cells = []
        for key in keys:
            mean = average(here, key, labels)
            doubt |= (doubted := any(doubtful(row.metrics[key], key) for row in here if key in row.metrics))
            cells.append(with_error(mean.mean, mean.half_width) + "?" * doubted)
        body.append([*(labels[axis] for axis in axes), str(len(here)), *cells])
    table = _table([*axes, "seeds", *(label_of(key) for key in keys)], body)
    return table + (f"\n\n{DOUBT}." if doubt else "")


def _certain(rows: Sequence[Row], key: str) -> bool:
    """Whether it only repeats that the target is a hard constraint: all texts have it, and KL(p‖a) is −log Z."""
    evaluations = [row.metrics for row in rows if key in row.metrics]
    if key == "kl_of_target_to_base":
        return all(abs(metrics[key].value + metrics["log_z"].value) < 1e-6 for metrics in evaluations)
    return key.startswith("feature_of_target/") and all(abs(metrics[key].value - 1) < 1e-9 for metrics in evaluations)


def _table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
