"""What an experiment's rows show: results.md with verdicts and tables, and its pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..report import PALETTE
from ..results import DOUBT, FEATURE_LABELS, LABELS, Estimate, doubtful, label_of
from ..run_folder import write_whole
from .experiment import Experiment
from .findings import average
from .rows import Row

# of the metrics that every evaluation has, those that tables show
COLUMNS = (
    *("kl_to_base", "entropy_per_token", "entropy_per_sequence", "distinct_2", "self_bleu_5", "log_z"),
    *("divergence/forward_kl", "divergence/reverse_kl", "divergence/total_variation", "divergence/jensen_shannon"),
)
KNOWN = {*LABELS}
NOT_FURTHER = tuple(f"{kind}/" for kind in ("divergence", *FEATURE_LABELS))
CURVES = ("policy/kl_to_base", "policy/entropy_per_token", "policy/pseudo_reward_std", "policy/ratio_ess")
MARKERS = "osD^vP*X<>hp"


def write_page(place: Path, name: str, budget: str, experiment: Experiment, rows: Sequence[Row]) -> Path:
    """Make results.md, trade-offs.png and curves.png in `place`; returns the page."""
    studies = {row.labels["study"]: [r for r in rows if r.labels["study"] == row.labels["study"]] for row in rows}
    trade_offs = {study: found for study, found in studies.items() if _alignment(found) and len(settings_of(found)) > 1}
    pictures = []
    if trade_offs:
        _trade_offs(trade_offs, place / "trade-offs.png")
        pictures.append("![trade-offs](trade-offs.png)\n\nAfter training; bars are 95 % intervals.")
    curves = {study: found for study, found in studies.items() if any(row.curve for row in found)}
    if curves:
        _curves(curves, place / "curves.png")
        pictures.append("![curves](curves.png)\n\nMean over seeds; shaded from the lowest to the highest.")
    verdicts = [finding.judge(rows) for finding in experiment.findings]
    lines = [
        f"# {name}: results ({budget})",
        experiment.claim,
        "## Findings",
        _table(["claim", "verdict", "numbers"], [[v.claim, f"**{v.verdict}**", v.evidence] for v in verdicts]),
        *pictures,
    ]
    for study, found in studies.items():
        lines += [f"## {study}", _study_table(found)]
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


def settings_of(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The different labels of a study's rows, in order."""
    return list({tuple(row.labels.items()): row.labels for row in rows}.values())


def _alignment(rows: Sequence[Row]) -> str | None:
    """The metric that says how far the preference is met."""
    return next((key for row in rows for key in row.metrics if key.startswith("feature/")), None)


def _study_table(rows: list[Row]) -> str:
    found = dict.fromkeys(key for row in rows for key in row.metrics)
    keys = [key for key in found if key.partition("/")[0] in FEATURE_LABELS and not _certain(rows, key)]
    keys += [key for key in COLUMNS if key in found]
    keys += [key for key in found if key not in KNOWN and not key.startswith(NOT_FURTHER)]
    # a column of nothing but infinities or unknowns says nothing
    keys = [key for key in keys if any(math.isfinite(row.metrics[key].value) for row in rows if key in row.metrics)]
    axes = [axis for axis in rows[0].labels if axis != "study"]
    body, doubt = [], False
    for labels in settings_of(rows):
        here = [row for row in rows if row.labels == labels]
        cells = []
        for key in keys:
            found_here = average(here, key, labels)
            cell = Estimate(found_here.mean, found_here.half_width, _least_ess(here, key))
            doubt |= (doubted := doubtful(key, cell))
            cells.append(str(cell) + "?" * doubted)
        body.append([*(labels[axis] for axis in axes), str(len(here)), *cells])
    table = _table([*axes, "seeds", *(label_of(key) for key in keys)], body)
    return table + (f"\n\n{DOUBT}." if doubt else "")


def _certain(rows: Sequence[Row], key: str) -> bool:
    """Whether a feature is what the target demands of every text, which no number need say."""
    values = {row.metrics[key].value for row in rows if key in row.metrics}
    return key.startswith("feature_of_target/") and values == {1}


def _least_ess(rows: Sequence[Row], key: str) -> float:
    return min((row.metrics[key].ess for row in rows if key in row.metrics), default=math.nan)


def _table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _colours(rows: Sequence[Row]) -> tuple[str, dict[str, str]]:
    """The axis that is told apart by colour, and the colour of each of its labels."""
    axes = [axis for axis in rows[0].labels if axis != "study"]
    axis = "divergence" if "divergence" in axes else axes[0] if axes else "study"
    return axis, dict(zip(dict.fromkeys(row.labels[axis] for row in rows), PALETTE * 3, strict=False))


def _trade_offs(studies: dict[str, list[Row]], path: Path) -> None:
    figure, panels = _figure(len(studies), 2)
    for (study, rows), (left, right) in zip(studies.items(), panels, strict=True):
        axis, colours = _colours(rows)
        others = list(dict.fromkeys(_rest(labels, axis) for labels in settings_of(rows)))
        alignment = str(_alignment(rows))
        for axes, across in ((left, "entropy_per_token"), (right, "kl_to_base")):
            across = across if across in rows[0].metrics else "entropy_per_sequence"
            for labels in settings_of(rows):
                x, y = (average(rows, key, labels) for key in (across, alignment))
                if not (math.isfinite(x.mean) and math.isfinite(y.mean)):
                    continue
                bars = {"xerr": _finite(x.half_width), "yerr": _finite(y.half_width)}
                marker = MARKERS[others.index(_rest(labels, axis)) % len(MARKERS)]
                axes.errorbar(
                    x.mean, y.mean, **bars, fmt=marker, color=colours[labels[axis]], markersize=5, linewidth=0.8
                )
            axes.set(xlabel=label_of(across), ylabel=label_of(alignment), title=study)
        handles = [_handle(colour, "s", label) for label, colour in colours.items()]
        if len(others) > 1:
            handles += [_handle("grey", MARKERS[i % len(MARKERS)], label) for i, label in enumerate(others)]
        right.legend(handles=handles, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=90)


def _curves(studies: dict[str, list[Row]], path: Path) -> None:
    shown = {study: _curve_keys(rows) for study, rows in studies.items()}
    figure, panels = _figure(len(studies), max(map(len, shown.values())))
    for (study, rows), line in zip(studies.items(), panels, strict=True):
        axis, colours = _colours(rows)
        for axes, key in zip(line, shown[study], strict=False):
            for labels in settings_of(rows):
                curves = [row.curve for row in rows if row.labels == labels and row.curve]
                length = min(map(len, curves), default=0)
                values = [[curve[i].get(key, math.nan) for curve in curves] for i in range(length)]
                x = [point["round"] for point in curves[0][:length]] if curves else []
                middle = [sum(column) / len(column) for column in values]
                axes.plot(x, middle, color=colours[labels[axis]], linewidth=1.2)
                axes.fill_between(x, [*map(min, values)], [*map(max, values)], color=colours[labels[axis]], alpha=0.15)
            axes.set(xlabel="round", title=f"{study}: {key.partition('/')[2] or key}")
        for axes in line[len(shown[study]) :]:
            axes.set_axis_off()
        handles = [_handle(colour, "s", label) for label, colour in colours.items()]
        line[0].legend(handles=handles, fontsize=7, frameon=False)
    figure.savefig(path, dpi=90)


def _curve_keys(rows: Sequence[Row]) -> list[str]:
    found = dict.fromkeys(key for row in rows for point in row.curve[:1] for key in point if key != "round")
    aligned = [f"target/{str(_alignment(rows)).removeprefix('feature/')}"]
    usual = [key for key in (*aligned, *CURVES) if key in found]
    return usual or [key for key in found if not key.endswith("_se")][:5]


def _rest(labels: dict[str, str], axis: str) -> str:
    return ", ".join(label for name, label in labels.items() if name not in ("study", axis))


def _figure(rows: int, columns: int) -> tuple[Any, list[list[Any]]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * columns + 1.5, 2.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2, linewidth=0.6)
        axes.tick_params(labelsize=8)
        axes.title.set_fontsize(9)
        axes.xaxis.label.set_fontsize(8)
        axes.yaxis.label.set_fontsize(8)
    return figure, panels.tolist()


def _handle(colour: str, marker: str, label: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, marker=marker, linestyle="", label=label, markersize=5)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0
