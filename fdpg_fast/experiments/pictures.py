"""Trade-offs and learning curves of an experiment's studies, divergences in the same colours everywhere."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runs.plots import PALETTE, draw_line, finite, scale_by_k, style_axes
from ..runs.tables import curves_by_k, label_of
from .intervals import average, within_seeds
from .rows import Row, settings_of

CURVES = ("policy/kl_to_base", "policy/entropy_per_token", "policy/pseudo_reward_std", "policy/ratio_ess")
MARKERS = "osD^vP*X<>hp"
NAMED = (
    *("forward_kl", "reverse_kl", "total_variation", "jensen_shannon"),
    *("squared_hellinger", "pearson_chi2", "neyman_chi2"),
)
COLOURS = dict(zip(NAMED, PALETTE, strict=False))
ENDS = ("forward_kl", "reverse_kl")  # of α, 0 and 1


def draw_trade_offs(studies: dict[str, list[Row]], path: Path) -> bool:
    """Alignment against entropy and against KL to the base, a line of panels a study; whether there is any."""
    shown = {study: rows for study, rows in studies.items() if _differ(rows, _alignment(rows))}
    if not shown:
        return False
    figure, panels = _figure(len(shown), 2)
    for (study, rows), (left, right) in zip(shown.items(), panels, strict=True):
        axis, colours = _colours(rows)
        others = list(dict.fromkeys(_rest(labels, axis) for labels in settings_of(rows)))
        alignment = str(_alignment(rows))
        for axes, across in ((left, "entropy_per_token"), (right, "kl_to_base")):
            across = across if across in rows[0].metrics else "entropy_per_sequence"
            for rest, marker in zip(others, itertools.cycle(MARKERS), strict=False):
                here = [row for row in rows if _rest(row.labels, axis) == rest]
                places = zip(settings_of(here), within_seeds(here, across), within_seeds(here, alignment), strict=True)
                for labels, x, y in places:
                    at = ((x.mean, x.half_width), (y.mean, y.half_width))
                    draw_point(axes, *at, colours[labels[axis]], marker)
            axes.set(xlabel=label_of(across), ylabel=label_of(alignment))
            axes.set_title(study, fontsize=9)
        handles = [_handle(colour, "s", label) for label, colour in colours.items()]
        if len(others) > 1:
            handles += [_handle("grey", *pair) for pair in zip(itertools.cycle(MARKERS), others, strict=False)]
        right.legend(handles=handles, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    _save(figure, path)
    return True


def draw_curves(studies: dict[str, list[Row]], path: Path) -> bool:
    """Metrics by round, a line of panels for each setting besides what colours tell apart; whether there is any."""
    lines = []
    for study, rows in studies.items():
        axis, colours = _colours(rows)
        for rest in dict.fromkeys(_rest(labels, axis) for labels in settings_of(rows)):
            here = [row for row in rows if _rest(row.labels, axis) == rest and len(row.curve) > 1]
            if here:
                lines.append((f"{study}, {rest}" if rest else study, here, axis, colours))
    if not lines:
        return False
    figure, panels = _figure(len(lines), max(len(_curve_keys(rows)) for _, rows, _, _ in lines))
    for (title, rows, axis, colours), panels_here in zip(lines, panels, strict=True):
        keys = _curve_keys(rows)
        for axes, key in zip(panels_here, keys, strict=False):
            for label, colour in colours.items():
                _draw_curve(axes, key, [row.curve for row in rows if row.labels[axis] == label], colour)
            positive = any(point.get(key, 0) > 0 for row in rows for point in row.curve)
            axes.set(xlabel="round", yscale="log" if key == "policy/pseudo_reward_std" and positive else "linear")
            axes.set_title(f"{title}: {key.partition('/')[2] or key}", fontsize=9)
        for axes in panels_here[len(keys) :]:
            axes.set_axis_off()
        labels = {row.labels[axis] for row in rows}
        handles = [_handle(colour, "s", label) for label, colour in colours.items() if label in labels]
        panels_here[0].legend(handles=handles, fontsize=7, frameon=False)
    _save(figure, path)
    return True


def draw_by_k(studies: dict[str, list[Row]], path: Path) -> bool:
    """pass@k and majority@k against log2 k, a panel for each setting besides what colours tell apart; whether any."""
    shown = []
    for study, rows in studies.items():
        axis, colours = _colours(rows)
        curves = curves_by_k(dict.fromkeys(key for row in rows for key in row.metrics))
        for rest, title in itertools.product(dict.fromkeys(_rest(x, axis) for x in settings_of(rows)), curves):
            here = [row for row in rows if _rest(row.labels, axis) == rest]
            shown.append((", ".join(filter(None, [study, rest, title])), here, curves[title], axis, colours))
    if not shown:
        return False
    figure, panels = _figure(len(shown), 1)
    for (title, rows, keys, axis, colours), (axes,) in zip(shown, panels, strict=True):
        by_k = [within_seeds(rows, key) for key in keys.values()]
        for labels, means in zip(settings_of(rows), zip(*by_k, strict=True), strict=True):
            band = [
                [finite(end) for end in ends] for ends in zip(*((mean.low, mean.high) for mean in means), strict=True)
            ]
            draw_line(axes, [*keys], [finite(mean.mean) for mean in means], band, colours[labels[axis]])
        scale_by_k(axes, keys)
        axes.set_title(title, fontsize=9)
        handles = [_handle(colour, "s", label) for label, colour in colours.items()]
        axes.legend(handles=handles, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    _save(figure, path)
    return True


def draw_point(axes: Any, x: tuple[float, float], y: tuple[float, float], colour: str, marker: str = "o") -> bool:
    """Two numbers, each with its error, as a point with bars; whether both are finite."""
    if not (math.isfinite(x[0]) and math.isfinite(y[0])):
        return False
    bars = {"xerr": finite(x[1], 0.0), "yerr": finite(y[1], 0.0)}
    axes.errorbar(x[0], y[0], **bars, fmt=marker, color=colour, markersize=5, linewidth=1)
    return True


def _draw_curve(axes: Any, key: str, curves: Sequence[list[dict[str, float]]], colour: str) -> None:
    points = list(zip(*curves, strict=False))  # of all seeds, by round
    values = [[at_seed.get(key, math.nan) for at_seed in point] for point in points]
    means, band = [sum(column) / len(column) for column in values], [[*map(min, values)], [*map(max, values)]]
    draw_line(axes, [point[0]["round"] for point in points], means, band, colour)


def _alignment(rows: Sequence[Row]) -> str | None:
    """The metric that says how far the preference is met."""
    return next((key for row in rows for key in row.metrics if key.startswith("feature/")), None)


def _differ(rows: Sequence[Row], key: str | None) -> bool:
    """Whether a metric is not the same for all settings, as it is where nothing was trained."""
    if key is None:
        return False
    means = [average(rows, key, labels).mean for labels in settings_of(rows)]
    return max(means) - min(means) > 1e-9 * max(map(abs, means))


def _colours(rows: Sequence[Row]) -> tuple[str, dict[str, str]]:
    """The axis that is told apart by colour, and the colour of each of its labels."""
    axes = [axis for axis in rows[0].labels if axis != "study"]
    axis = "divergence" if "divergence" in axes else axes[0] if axes else "study"
    known = {row.labels[axis]: colour_of(row.labels[axis]) for row in rows}
    taken = {*known.values(), *(COLOURS[name] for name in ENDS if any(x.startswith("alpha:") for x in known))}
    others = itertools.cycle([colour for colour in PALETTE if colour not in taken] or PALETTE)
    return axis, {label: colour or next(others) for label, colour in known.items()}


def colour_of(label: str, otherwise: str = "") -> str:
    """Of a divergence: α lies between forward KL (0) and reverse KL (1), so does its colour; a path is a darker end."""
    if not label.startswith("alpha:"):
        return COLOURS.get(label, otherwise)
    share = float(label.rpartition("..")[2].removeprefix("alpha:"))
    light = 0.6 if ".." in label else 1.0
    ends = [[int(COLOURS[name][i : i + 2], 16) for i in (1, 3, 5)] for name in ENDS]
    mixed = [round(light * ((1 - share) * a + share * b)) for a, b in zip(*ends, strict=True)]
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _curve_keys(rows: Sequence[Row]) -> list[str]:
    recorded = dict.fromkeys(key for row in rows for point in row.curve[:1] for key in point if key != "round")
    aligned = [f"target/{str(_alignment(rows)).removeprefix('feature/')}"]
    usual = [key for key in (*aligned, *CURVES) if key in recorded]
    if all(point.get("policy/ratio_ess", 1) > 0.99 for row in rows for point in row.curve):  # nothing is off-policy
        usual = [key for key in usual if key != "policy/ratio_ess"]
    return usual or [key for key in recorded if not key.endswith("_se")][:5]


def _rest(labels: dict[str, str], axis: str) -> str:
    return ", ".join(label for name, label in labels.items() if name not in ("study", axis))


def _figure(rows: int, columns: int) -> tuple[Any, list[list[Any]]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * columns + 1.5, 2.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        style_axes(axes, 8)
    return figure, panels.tolist()


def _save(figure: Any, path: Path) -> None:
    """With 128 colours, a third of the bytes: pictures are committed beside their numbers."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=90, format="png")
    Image.open(drawn).convert("RGB").quantize(128).save(path, optimize=True)


def _handle(colour: str, marker: str, label: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, marker=marker, linestyle="", label=label, markersize=5)
