"""Threads that do not spin, the import path of this folder, and the lines printed under the benchmark table."""

from __future__ import annotations

import os

# before torch: idle OpenMP threads that spin on a busy machine time nothing but themselves
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

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
