"""A run of gpu.py as bars: time over that of the bare products, one panel a mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TALLEST = 6.0  # times the bare products; taller bars are cut and carry their number


def plot(result: dict[str, Any], path: Path) -> str:
    """Write the figure; returns what to tell the user."""
    try:
        import matplotlib
    except ImportError:
        return "PNG SKIPPED: matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [s for s in result["steps"] if s["phase"] == "shapes" and "over_bare" in s and "method" in s]
    shapes, modes, methods = (list(dict.fromkeys(s[key] for s in steps)) for key in ("shape", "mode", "method"))
    if not steps:
        return "PNG SKIPPED: nothing was measured"
    figure, panels = pyplot.subplots(len(modes), figsize=(4 + 2 * len(shapes), 3 * len(modes)), squeeze=False)
    width, colors = 0.85 / len(methods), pyplot.get_cmap("tab20").colors
    for mode, panel in zip(modes, panels[:, 0], strict=True):
        for index, method in enumerate(methods):
            here = [s for s in steps if (s["mode"], s["method"]) == (mode, method)]
            places = [shapes.index(s["shape"]) + (index - (len(methods) - 1) / 2) * width for s in here]
            heights = [min(s["over_bare"], TALLEST) for s in here]
            panel.bar(places, heights, width, label=method, color=colors[index % len(colors)])
            for place, step in zip(places, here, strict=True):
                notes = [step["status"]] * (step["status"] != "ok")
                notes += [f"{step['over_bare']:.1f}"] * (step["over_bare"] > TALLEST)
                panel.text(place, 0.1, " ".join(notes), rotation=90, ha="center", va="bottom", fontsize=6)
        panel.axhline(1, color="black", linewidth=0.6)
        panel.set(ylabel="× bare products", title=mode, xticks=range(len(shapes)), xticklabels=shapes)
        panel.tick_params(axis="x", labelsize=6)
    panels[-1, 0].legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.suptitle(f"{result['machine']['chip']}, {result['machine']['date'][:10]}")
    figure.tight_layout()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
    return f"wrote {path}"
