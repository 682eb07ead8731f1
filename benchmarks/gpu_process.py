"""Steps that may raise, hang or kill their process without taking the run with them.

A process of its own takes a list of steps one by one and appends a line of JSON for whatever it finds. The step during
which it dies or falls silent is marked as such, and a new process goes on behind it. Who kills the parent keeps the
lines, and the processes end with it.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Record = dict[str, Any]
PROCESSES: Any = multiprocessing.get_context("forkserver")
POLL = 0.05  # seconds between looks at a process


def start_afresh() -> None:
    """Every process imports for itself from now on."""
    global PROCESSES
    PROCESSES = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Step:
    """One thing to find out: a function of some module, which yields what it finds as it finds it."""

    phase: str
    name: str
    function: Callable[..., Iterable[Record]]
    arguments: tuple[Any, ...] = ()
    ours: bool = True  # what somebody else's code raises is no failure of the run
    silence: float = 60.0  # seconds without a word after which it hangs

    @property
    def key(self) -> tuple[str, str]:
        return self.phase, self.name


class Lines:
    """The file of everything found, one JSON object a line; several processes append to it."""

    def __init__(self, path: Path):
        self.path, self.offset = path, 0
        self.last: dict[tuple[str, str], tuple[str, float]] = {}  # of each step: its last event, and when it was

    def add(self, event: str, step: Step | None = None, **found: Any) -> None:
        where = {} if step is None else {"phase": step.phase, "step": step.name, "ours": step.ours}
        line = json.dumps({"event": event, "time": time.monotonic(), **where, **finite(found)}, allow_nan=False)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(descriptor, line.encode() + b"\n")  # at once: a line is there whole or not at all
        os.close(descriptor)

    def read(self) -> None:
        """Take note of the lines that are new."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            for line in file:
                if line.endswith(b"\n"):
                    self.offset += len(line)
                    found = json.loads(line)
                    if "step" in found:
                        self.last[found["phase"], found["step"]] = found["event"], found["time"]


def finite(found: Any) -> Any:
    """The same without NaN and infinities, which JSON does not have: they become null."""
    if isinstance(found, dict):
        return {key: finite(value) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [finite(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


@dataclass
class Child:
    """A process in a session of its own, whose children die with it, and what it printed."""

    target: Callable[..., None]
    arguments: tuple[Any, ...]
    log: Path
    process: Any = field(init=False)

    def __post_init__(self) -> None:
        self.process = PROCESSES.Process(target=_begin, args=(self.log, self.target, self.arguments))
        self.process.start()

    @property
    def ended(self) -> bool:
        return self.process.exitcode is not None

    def kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has ended, or has no session of its own yet
            self.process.kill()
        self.process.join()

    def last_words(self, count: int) -> list[str]:
        return self.log.read_text(errors="replace").strip().splitlines()[-count:] if self.log.exists() else []

    @property
    def obituary(self) -> str:
        return f"ended with {self.process.exitcode}: {(self.last_words(1) or ['nothing said'])[0]}"


def _begin(log: Path, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.setsid()
    with open(log, "wb", buffering=0) as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    target(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a library that failed may never let its process end by itself


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def take_steps(path: Path, steps: Sequence[Step], deadline: float) -> None:
    """What a child does: the steps one by one, none that would begin after the deadline."""
    lines = Lines(path)
    for step in steps:
        if time.monotonic() > deadline:
            return
        lines.add("begin", step)
        status, reason = "ok", None
        try:
            for found in step.function(*step.arguments):
                lines.add("found", step, **found)
                status = found.get("status", status)
        except Exception as error:  # whatever a step raises is a result
            traceback.print_exc()
            message = next(iter(str(error).strip().splitlines()), "")
            reason = f"{type(error).__name__}: {message}"[:300]
            status = "failed" if step.ours else "skipped"
            if type(error).__name__ == "OutOfMemoryError":
                status = "out of memory"
        if reason is not None and not _is_usable():
            lines.add("end", step, status="died", reason=f"broke the CUDA context; {reason}")
            return
        lines.add("end", step, **({"status": status, "reason": reason} if status == "ok" or reason else {}))


def _is_usable() -> bool:
    """Whether the device still answers; after an illegal access it does not in this process."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
    return True


def attend(
    lines: Lines, jobs: Iterable[Sequence[Step]], *, parallel: int, deadline: float, end: float
) -> Iterator[None]:
    """Take all steps of all jobs, so many jobs at a time; nothing begins after the deadline or goes on after the end.

    Yields after every process. Times are those of time.monotonic().
    """
    waiting, running = deque(tuple(job) for job in jobs if job), []
    with tempfile.TemporaryDirectory() as scratch:
        number = 0
        while waiting or running:
            while waiting and len(running) < parallel and time.monotonic() < deadline:
                steps, number = waiting.popleft(), number + 1
                child = Child(take_steps, (lines.path, steps, deadline), Path(scratch) / f"{number}.log")
                running.append((child, steps, time.monotonic()))
            if not running:
                break
            time.sleep(POLL)
            for entry in list(running):
                child, steps, started = entry
                ended, over = child.ended, time.monotonic() > end  # before the lines are read, not after
                lines.read()
                left = [step for step in steps if lines.last.get(step.key, ("", 0))[0] != "end"]
                silent = time.monotonic() - max(started, *(lines.last.get(step.key, ("", 0.0))[1] for step in steps))
                hung = bool(left) and silent > left[0].silence
                if not (ended or over or hung):
                    continue
                if not ended:
                    child.kill()
                running.remove(entry)
                stopped = left and (not ended or left[0].key in lines.last or child.process.exitcode != 0)
                if stopped:
                    step, left = left[0], left[1:]
                    if over and not hung:
                        lines.add("end", step, status="left out", reason="stopped at the end of --minutes")
                    else:
                        reason = child.obituary if ended else f"stopped after {silent:.0f} s of silence"
                        status = "died" if ended else "hung"
                        lines.add("end", step, status=status, reason=reason, log=child.last_words(15))
                if left:
                    waiting.appendleft(tuple(left))
                yield
    for step in (step for steps in waiting for step in steps):
        lines.add("end", step, status="left out", reason="would not fit into --minutes")
