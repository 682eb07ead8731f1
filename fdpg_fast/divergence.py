"""The divergence of a round: one for the whole run, or α on its way from coverage to exploitation."""

from __future__ import annotations

from fdpg_kernels import Divergence, divergences


def divergence_at(name: str, round_index: int, rounds: int) -> Divergence:
    """Of a round, counted from 0: "alpha:a..b" is α = a in the first and b in the last, linear between.

    Raises:
        ValueError: there is no such divergence, or the path is not written as two numbers in (0, 1).
    """
    first, dots, last = name.removeprefix("alpha:").partition("..")
    if not (name.startswith("alpha:") and dots):
        return divergences.get(name)
    try:
        start, end = float(first), float(last)
    except ValueError:
        raise ValueError(f"divergence {name!r}: write alpha:a..b with numbers a and b in (0, 1)") from None
    for a in (start, end):
        divergences.alpha(a)  # the ends are valid, or it says why not
    progress = round_index / (rounds - 1) if rounds > 1 else 1.0
    return divergences.alpha((1 - progress) * start + progress * end)


def last_divergence(name: str) -> Divergence:
    """That of the last round: what a run is to reach."""
    return divergence_at(name, 0, 1)
