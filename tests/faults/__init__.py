"""What is done to the program to see whether it breaks: kills, signals, bad input, bad servers, made-up examples.

`make faults` does all of it and prints the figures; tests/test_faults.py does a part of each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

Case = TypeVar("Case")


@dataclass
class Tally:
    """What was tried of one kind, and what went wrong, a line each."""

    what: str
    tried: int = 0
    wrong: list[str] = field(default_factory=list)


def tried(what: str, cases: Sequence[Case], attempt: Callable[[Case], list[str]]) -> Tally:
    """What `attempt` finds wrong with each case, one case a core."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = zip(cases, pool.map(attempt, cases), strict=True)
        return Tally(what, len(cases), [f"{case}: {fault}" for case, faults in found for fault in faults])
