"""Curves of a report, as SVG in the colours of the page they stand on; the style of every picture."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..measure.estimators import Estimate
from .tables import curves_by_k

PALETTE = ("#3b82c4", "#dd7a2f", "#2f9e77", "#b8578f", "#8370c9", "#a88a1f", "#5f8f9e", "#c2504b")
INK = "#010203"  # stands for currentColor, which matplotlib does not know
MAX_POINTS = 500
Rows = Sequence[Mapping[str, float]]
Drawing = tuple[str, str]  # a title, and a picture as an element of HTML


def curve(title: str, lines: Iterable[tuple[Rows, str, str]]) -> Drawing | None:
    """Metrics over the rounds, with ±1.96·se bands where an error is known; None without any data.

    lines: rows with a round each, key of the metric and colour of each.
    """
    axes = new_axes("round")
    drawn: list[float] = []
    for rows, key, colour in lines:
        rows = rows[:: len(rows) // MAX_POINTS + 1]
        x = [row.get("round", place) for place, row in enumerate(rows)]
        y, error = ([finite(row.get(k, math.nan)) for row in rows] for k in (key, f"{key}_se"))
        band = [[v + side * e for v, e in zip(y, error, strict=True)] for side in (-1.96, 1.96)]
        draw_line(axes, x, y, band, colour)
        drawn += filter(math.isfinite, y)
    if not drawn:
        return None
    # the wide bands of the first rounds must not flatten the rest
    (low, high), room = axes.get_ylim(), 0.6 * (max(drawn) - min(drawn)) or math.inf
    axes.set_ylim(max(low, min(drawn) - room), min(high, max(drawn) + room))
    return drawing(title, axes)


def draw_by_k(evaluations: Sequence[tuple[dict[str, Estimate], str]]) -> list[Drawing]:
    """pass@k and majority@k of each feature against log2 k, with 95 % intervals; evaluations with their colours."""
    pictures = []
    for title, keys in curves_by_k(dict.fromkeys(key for metrics, _ in evaluations for key in metrics)).items():
        axes = new_axes("k")
        for metrics, colour in evaluations:
            here = [(k, metrics[key]) for k, key in keys.items() if key in metrics]
            band = [[finite(estimate.interval[side]) for _, estimate in here] for side in (0, 1)]
            draw_line(axes, [k for k, _ in here], [finite(estimate.value) for _, estimate in here], band, colour)
        scale_by_k(axes, keys)
        pictures.append(drawing(title, axes))
    return pictures


def scale_by_k(axes: Any, ks: Iterable[int]) -> None:
    """log2 k from left to right."""
    axes.set_xscale("log", base=2)
    axes.set(xlabel="k", xticks=[*ks], xticklabels=[*map(str, ks)])


def coloured(names: Iterable[str]) -> dict[str, str]:
    """A colour for each of the different names, in their order."""
    return dict(zip(dict.fromkeys(names), cycle(PALETTE), strict=False))


def finite(value: float, otherwise: float = math.nan) -> float:
    """What matplotlib takes instead of an infinity."""
    return value if math.isfinite(value) else otherwise


def draw_line(axes: Any, x: Sequence[float], y: Sequence[float], band: Sequence[Sequence[float]], colour: str) -> None:
    """A curve in its band, from a low to a high one; points where there are too few for a curve."""
    axes.plot(x, y, color=colour, linewidth=1.4, marker="o" if len(x) < 3 else None, markersize=4)
    axes.fill_between(x, *band, color=colour, alpha=0.2, linewidth=0)


def style_axes(axes: Any, size: int, ink: str = "black") -> None:
    """Two faint axes with a fainter grid, and text of `size` points."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=ink, alpha=0.4)
    axes.tick_params(colors=ink, labelsize=size, length=3)
    axes.grid(color=ink, alpha=0.1, linewidth=0.6)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=ink, fontsize=size)


def new_axes(x_label: str) -> Any:
    """The axes of a picture for a page."""
    axes = Figure(figsize=(4.8, 2.5), layout="constrained", facecolor="none").subplots()
    style_axes(axes, 9, INK)
    axes.set(xlabel=x_label, facecolor="none")
    axes.ticklabel_format(useOffset=False)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=x_label == "round", steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    return axes


def drawing(title: str, axes: Any) -> Drawing:
    """What `new_axes` has become; text stays text, and ids differ between the figures of a page."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        axes.figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| id="[\w.]+_\d+"', "", svg[svg.index("<svg") :])
    return title, svg.replace("xlink:href", "href").replace(INK, "currentColor")
