"""What is going on, for a person who waits: a live line on a terminal, plain lines elsewhere.

Whoever does something that takes a while says so with `activity`, and whoever does a part of it with `advance`; neither
knows who shows it. As a library, that is outside `lines_for_a_person`, it goes to the log alone.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .errors import printable

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

    def show(self, **fields: Any) -> None:
        if self.task is not None and _display is not None:
            _display.update(self.task, **fields)


@contextlib.contextmanager
def activity(what: str, total: int = 0) -> Iterator[None]:
    """Something that takes a while, as a person reads it ("loading models/smollm2"); `advance` counts `total` items."""
    current, ended = _Activity(printable(what), total), threading.Event()
    for outer in _activities[-1:]:
        outer.show(visible=False)
    _activities.append(current)
    if _display is not None:
        current.task = _display.add_task(current.what, total=total or None, counted="")
    else:
        threading.Thread(target=_say, args=(current, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        _activities.remove(current)
        if current.task is not None and _display is not None:
            _display.remove_task(current.task)
        for outer in _activities[-1:]:
            outer.show(visible=True)


def advance(count: int) -> None:
    """Say that so many items of the innermost activity are done; where none are counted it says nothing."""
    if _activities and _activities[-1].total:
        current = _activities[-1]
        current.done += count
        current.show(advance=count, counted=f"{current.done:,} of {current.total:,}")


@functools.cache
def say_once(line: str) -> None:
    """A warning about something that a process meets more than once."""
    log.warning("%s", line)


def _say(current: _Activity, ended: threading.Event) -> None:
    pause, said = AFTER, -1
    while not ended.wait(pause):
        if current.done > said:
            counted = f": {current.done:,} of {current.total:,}" if current.done else ""
            log.info("%s%s", current.what, counted)
        pause, said = EVERY, current.done


@contextlib.contextmanager
def lines_for_a_person() -> Iterator[None]:
    """Our log goes to stderr as plain lines; on a terminal a live line below them says what is going on."""
    logger, handler = logging.getLogger("fdpg_fast"), _Lines()
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        with _live(handler) if sys.stderr.isatty() else contextlib.nullcontext():
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


class _Lines(logging.Handler):
    console: Any = None  # of rich, where the live line must stay the last one

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # a terminal that has gone away, or a pipe, ends no run
            line = printable(record.getMessage())  # names, and what servers and libraries say, may hold anything
            if self.console is None:
                print(line, file=sys.stderr, flush=True)
            else:
                self.console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _live(handler: _Lines) -> Iterator[None]:
    global _display
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    handler.console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(20),
        TextColumn("{task.fields[counted]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=handler.console, transient=True) as _display:
        try:
            with activity("working"):
                yield
        finally:
            _display = None
