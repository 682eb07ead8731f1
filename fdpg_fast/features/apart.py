"""The asking of `checkers.py`: a few processes for each of its functions, kept as long as they live."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .remote import retried

PROCESSES = min(4, os.cpu_count() or 1)
_COMMAND = [sys.executable, "-P", str(Path(__file__).with_name("checkers.py"))]  # -P: code.py beside it is not `code`


class Apart:
    """A function of `checkers.py`, called in processes of its own."""

    def __init__(self, function: str):
        self._function = function
        self._idle: list[subprocess.Popen[str]] = []

    async def each(
        self, texts: Sequence[str], of_prompts: Sequence[Sequence[Any] | None], otherwise: Any = None
    ) -> list[Any]:
        """What it finds for each of some texts, with the arguments that belong to their prompts.

        None where there are none of these, and `otherwise` where a text reached the limit of time or memory, or broke
        the library that judges it.

        Raises:
            ValueError: what belongs to a prompt is of no use.
        """
        rows = [(text, *given) for text, given in zip(texts, of_prompts, strict=True) if given is not None]
        limits: dict[str, Any] = {"concurrency": PROCESSES, "attempts": 1, "timeout": 1e6, "passing": ()}
        found = iter(otherwise if value is None else value for value in await retried(self._ask, rows, **limits))
        return [None if given is None else next(found) for given in of_prompts]

    def _ask(self, row: tuple[Any, ...]) -> Any:
        """In a thread: what waits here for a process is not interrupted, but the process ends by itself."""
        try:
            process = self._idle.pop()
        except IndexError:
            process = self._start()
        if process.poll() is not None:  # the system was short of memory, and took it for one to end
            process = self._start()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(row) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            if (status := process.wait()) > 0:  # no signal: it could not begin
                raise RuntimeError(f"{' '.join([*_COMMAND, self._function])} ended with status {status}")
            return None
        self._idle.append(process)
        kind, answer = json.loads(line)
        if kind == "failed":
            raise ValueError(answer)
        return answer

    def _start(self) -> subprocess.Popen[str]:
        few = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        # in a session of its own: a Ctrl-C is for the run, which ends its round first
        return subprocess.Popen([*_COMMAND, self._function], env=few, text=True, start_new_session=True, **pipes)
