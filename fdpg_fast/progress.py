"""What is going on, for a person who waits: a live line on a terminal, plain lines elsewhere.

Whoever does something that takes a while says so with `activity`, and whoever does a part of it with `advance`; neither
knows who shows it. Until `show` is called, that is as a library, it goes to the log alone.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)

AFTER, EVERY = 1.0, 10.0  # seconds until the first plain line of an activity, and between it and the next ones

_display: Any = None  # a rich.progress.Progress, on a terminal
_activities: list[_Activity] = []


@dataclass(eq=False)
class _Activity:
    what: str
    total: int
    done: int = 0
    task: Any = None  # of the display


@contextlib.contextmanager
def activity(what: str, total: int = 0) -> Iterator[None]:
    """Something that takes a while.

    Args:
        what: as a person reads it, such as "loading models/smollm2".
        total: items that `advance` will count; 0: not counted.
    """
    current, ended = _Activity(what, total), threading.Event()
    _activities.append(current)
    if _display is not None:
        current.task = _display.add_task(what, total=total or None)
    else:
        threading.Thread(target=_say, args=(current, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        _activities.remove(current)
        if current.task is not None and _display is not None:
            _display.remove_task(current.task)


def advance(count: int) -> None:
    """Say that so many items of the innermost activity are done; without an activity it says nothing."""
    if _activities:
        current = _activities[-1]
        current.done += count
        if current.task is not None:
            _display.advance(current.task, count)


@contextlib.contextmanager
def show(console: Any) -> Iterator[None]:
    """Show activities as live lines on a rich console while the block runs."""
    global _display
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(20), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as _display:
        try:
            yield
        finally:
            _display = None


def _say(current: _Activity, ended: threading.Event) -> None:
    if ended.wait(AFTER):
        return
    log.info("%s", current.what)
    said = 0
    while not ended.wait(EVERY):
        if current.done > said:
            said = current.done
            log.info("%s: %s of %s", current.what, f"{said:,}", f"{current.total:,}")
