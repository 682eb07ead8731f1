"""The divergence of a round: one for the whole run, α on its way from coverage to exploitation, or a user's own."""

from __future__ import annotations

import functools
import os

from fdpg_kernels import Divergence, divergences

from .errors import UserError
from .imports import import_object


def divergence_at(name: str, round_index: int, rounds: int) -> Divergence:
    """The divergence of a round, counted from 0.

    Args:
        name: one of `divergences.NAMES`, "alpha:a", the path "alpha:a..b" with α = a in the first round and b in the
            last, linear between, or "file.py:name" or "package.module:name" of a `Divergence`.

    Raises:
        ValueError: there is no such divergence, or the path is not written as two numbers in (0, 1).
    """
    family, _, parameter = name.rpartition(":")
    if family and family != "alpha":
        return _imported(name, os.getcwd())
    first, dots, last = parameter.partition("..")
    if not (family and dots):
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
    """The divergence of the last round: what a run is to reach."""
    return divergence_at(name, 0, 1)


@functools.cache  # one object for all rounds, for a file's name in one folder
def _imported(path: str, folder: str) -> Divergence:
    try:
        imported = import_object(path)
    except UserError as error:
        raise ValueError(str(error)) from None
    if not isinstance(imported, Divergence):
        raise ValueError(f"{path!r} is a {type(imported).__name__}, not a fdpg_kernels.Divergence")
    return imported
