"""Curves and scatters of a report, as SVG in the colours of the page they stand on; the style of every picture."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any, NamedTuple

from ..measure.estimators import Estimate
from .folder import Run
from .tables import UNKNOWN, label_of

PALETTE = ("#3b82c4", "#dd7a2f", "#2f9e77", "#b8578f", "#8370c9", "#a88a1f", "#5f8f9e", "#c2504b")
INK = "#010203"  # stands for currentColor, which matplotlib does not know
MAX_POINTS = 500


class Drawing(NamedTuple):
    """A picture for a page: its title, its legend, colours by name, and `svg`, an element of HTML."""

    title: str
    colours: dict[str, str]
    svg: str


def curve(title: str, lines: Iterable[tuple[Run, str, str]], colours: dict[str, str] | None = None) -> Drawing | None:
    """Metrics over the rounds, with ±1.96·se bands where an error is known; None without any data.

    Args:
        lines: run, key of the metric and colour of each.
        colours: by name, for the legend; one alone is not worth one.
    """
    figure, axes = _axes("round")
    drawn: list[float] = []
    for run, key, colour in lines:
        rows = run.metrics[:: len(run.metrics) // MAX_POINTS + 1]
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
    return Drawing(title, colours if colours and len(colours) > 1 else {}, _svg(figure, title))


def scatter(ends: Iterable[tuple[str, str, dict[str, Estimate]]], x_key: str, y_key: str) -> Drawing | None:
    """Where runs of some name and colour end, with error bars; runs of one name share their label."""
    figure, axes = _axes(label_of(x_key))
    labels: dict[tuple[str, str], tuple[float, float]] = {}
    for name, colour, estimates in ends:
        x, y = (estimates.get(key, UNKNOWN) for key in (x_key, y_key))
        if draw_point(axes, (x.value, 1.96 * x.standard_error), (y.value, 1.96 * y.standard_error), colour):
            point = (x.value, y.value)
            labels[name, colour] = max(labels.get((name, colour), point), point)  # at the rightmost
    axes.margins(x=0.2, y=0.15)
    style = {"textcoords": "offset points", "fontsize": 8, "parse_math": False}
    lowest = -math.inf
    for (name, colour), point in sorted(labels.items(), key=lambda item: item[1][1]):
        height = axes.transData.transform(point)[1] * 72 / figure.dpi  # in points
        lowest = max(height + 6, lowest + 10)  # labels of neighbours are stacked
        axes.annotate(name, point, (6, lowest - height), color=colour, **style)
    title = f"{label_of(y_key)} against {label_of(x_key)}"
    return Drawing(title, {}, _svg(figure, title)) if labels else None


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


def draw_point(axes: Any, x: tuple[float, float], y: tuple[float, float], colour: str, marker: str = "o") -> bool:
    """Two numbers, each with its error, as a point with bars; whether both are finite."""
    if not (math.isfinite(x[0]) and math.isfinite(y[0])):
        return False
    bars = {"xerr": finite(x[1], 0.0), "yerr": finite(y[1], 0.0)}
    axes.errorbar(x[0], y[0], **bars, fmt=marker, color=colour, markersize=5, linewidth=1)
    return True


def style_axes(axes: Any, size: int, ink: str = "black") -> None:
    """Two faint axes with a fainter grid, and text of `size` points."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=ink, alpha=0.4)
    axes.tick_params(colors=ink, labelsize=size, length=3)
    axes.grid(color=ink, alpha=0.1, linewidth=0.6)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=ink, fontsize=size)


def _axes(x_label: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.8, 2.5), layout="constrained", facecolor="none")
    axes = figure.subplots()
    style_axes(axes, 9, INK)
    axes.set(xlabel=x_label, facecolor="none")
    axes.ticklabel_format(useOffset=False)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=x_label == "round", steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    return figure, axes


def _svg(figure: Any, salt: str) -> str:
    import matplotlib

    buffer = io.StringIO()
    # text stays text, and ids differ between the figures of a page
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| id="[\w.]+_\d+"', "", svg[svg.index("<svg") :])
    return svg.replace("xlink:href", "href").replace(INK, "currentColor")
