"""Threads that spin as little as the command line's, the import path of this folder, and the lines printed under the benchmark table."""

from __future__ import annotations

import os

# before torch: threads that spin for long time nothing but themselves on a busy machine
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import pytest

_COMPARISONS: list[str] = []


@pytest.fixture(scope="session")
def comparisons() -> list[str]:
    """Lines to print at the end: ours beside the others."""
    return _COMPARISONS


def pytest_terminal_summary(terminalreporter) -> None:
    if _COMPARISONS:
        terminalreporter.section("ours / others")
        for line in _COMPARISONS:
            terminalreporter.write_line(line)
