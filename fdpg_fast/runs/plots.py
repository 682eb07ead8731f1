"""Figures of a report: curves and scatters as SVG inside HTML, in the colours of the page they stand on."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable
from html import escape
from itertools import cycle
from typing import Any

from .tables import UNKNOWN, Estimate, Run, label_of, number

PALETTE = ("#3b82c4", "#dd7a2f", "#2f9e77", "#b8578f", "#8370c9", "#a88a1f", "#5f8f9e", "#c2504b")
INK = "#010203"  # stands for currentColor, which matplotlib does not know
MAX_POINTS = 500


def curve(title: str, lines: list[tuple[Run, str, str]], colours: dict[str, str] | None = None) -> str:
    """Metrics over the rounds, with ±1.96·se bands where an error is known; "" without any data.

    Args:
        lines: run, key of the metric and colour of each.
        colours: by name, for the legend; one alone is not worth one.
    """
    figure, axes = _axes("round")
    drawn: list[float] = []
    for run, key, colour in lines:
        rows = run.metrics[:: len(run.metrics) // MAX_POINTS + 1]
        x = [row.get("round", place) for place, row in enumerate(rows)]
        y, error = ([finite(number(row, k)) for row in rows] for k in (key, f"{key}_se"))
        low, high = ([v + side * e for v, e in zip(y, error, strict=True)] for side in (-1.96, 1.96))
        axes.plot(x, y, color=colour, linewidth=1.4, marker="o" if len(rows) < 3 else None, markersize=4)
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        drawn += [value for value in y if math.isfinite(value)]
    if not drawn:
        return ""
    # the wide bands of the first rounds must not flatten the rest
    (low, high), room = axes.get_ylim(), 0.6 * (max(drawn) - min(drawn)) or math.inf
    axes.set_ylim(max(low, min(drawn) - room), min(high, max(drawn) + room))
    return _figure(figure, title, colours if colours and len(colours) > 1 else {})


def scatter(ends: list[tuple[str, str, dict[str, Estimate]]], x_key: str, y_key: str) -> str:
    """Where runs of some name and colour end, with error bars; runs of one name share their label."""
    figure, axes = _axes(label_of(x_key))
    labels: dict[tuple[str, str], tuple[float, float]] = {}
    for name, colour, estimates in ends:
        x, y = estimates.get(x_key, UNKNOWN), estimates.get(y_key, UNKNOWN)
        if math.isfinite(x.value) and math.isfinite(y.value):
            bars = {"xerr": finite(x.error, 0.0), "yerr": finite(y.error, 0.0)}
            axes.errorbar(x.value, y.value, **bars, fmt="o", color=colour, markersize=5, linewidth=1)
            point = (x.value, y.value)
            labels[name, colour] = max(labels.get((name, colour), point), point)  # at the rightmost
    axes.margins(x=0.2, y=0.15)
    style = {"textcoords": "offset points", "fontsize": 8, "parse_math": False}
    lowest = -math.inf
    for (name, colour), point in sorted(labels.items(), key=lambda item: item[1][1]):
        height = axes.transData.transform(point)[1] * 72 / figure.dpi  # in points
        lowest = max(height + 6, lowest + 10)  # labels of neighbours are stacked
        axes.annotate(name, point, (6, lowest - height), color=colour, **style)
    return _figure(figure, f"{label_of(y_key)} against {label_of(x_key)}", {}) if labels else ""


def coloured(names: Iterable[str]) -> dict[str, str]:
    return dict(zip(dict.fromkeys(names), cycle(PALETTE), strict=False))


def legend(colours: dict[str, str]) -> str:
    return " ".join(f'<i style="background:{colour}"></i>{escape(name)}' for name, colour in colours.items())


def finite(value: float, otherwise: float = math.nan) -> float:
    """What matplotlib takes instead of an infinity."""
    return value if math.isfinite(value) else otherwise


def _axes(x_label: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.8, 2.5), layout="constrained", facecolor="none")
    axes = figure.subplots()
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=INK, alpha=0.4)
    axes.tick_params(colors=INK, labelsize=9, length=3)
    axes.grid(color=INK, alpha=0.1, linewidth=0.6)
    axes.ticklabel_format(useOffset=False)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=x_label == "round", steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel(x_label, color=INK, fontsize=9)
    return figure, axes


def _figure(figure: Any, title: str, colours: dict[str, str]) -> str:
    import matplotlib

    buffer = io.StringIO()
    # text stays text, and ids differ between the figures of a page
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| id="[\w.]+_\d+"', "", svg[svg.index("<svg") :])
    svg = svg.replace("xlink:href", "href").replace(INK, "currentColor")
    return f"<figure><figcaption>{escape(title)}{legend(colours)}</figcaption>{svg}</figure>"
