"""Signals that end a run: they raise in the main thread, at once or, while weights move, when the round is done.

Whoever moves weights asks with `check` before, for a function of the user may have swallowed what was raised in it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from . import ranks

# what a process does about them if nobody has said anything else: nohup ignores SIGHUP, job managers bring handlers
_DEFAULTS: dict[int, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
    signal.SIGUSR1: signal.SIG_DFL,  # what job managers send a while before the end of a job
}
_received: list[int] = []


class Stopped(SystemExit):
    """SIGTERM, SIGHUP or SIGUSR1 has ended a run; the exit status is the one of a process that dies of it."""


@contextlib.contextmanager
def stoppable(at_rest: Callable[[], bool]) -> Iterator[None]:
    """In this block a first signal stops the run, a second one the process; at_rest: whether no weights move now."""

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, _frame: Any) -> None:
        restore()
        _received.append(number)
        if at_rest() and ranks.count() == 1:  # several stop at the same place
            check()

    here = threading.current_thread() is threading.main_thread()
    before = {number: handler for number, handler in _DEFAULTS.items() if here and signal.getsignal(number) == handler}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        restore()
        _received.clear()


def signalled() -> BaseException | None:
    """What the signal that has come raises, if one has."""
    if not _received:
        return None
    return KeyboardInterrupt() if _received[0] == signal.SIGINT else Stopped(128 + _received[0])


def check() -> None:
    """Raise KeyboardInterrupt or Stopped where a signal has come; all processes of a run ask at once."""
    if ranks.count() > 1:
        _received[:] = [number for numbers in ranks.gathered(_received[:1]) for number in numbers]
    if error := signalled():
        raise error
