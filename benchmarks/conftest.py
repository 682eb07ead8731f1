"""The command line's environment, the import path of this folder, and the lines printed under the benchmark table."""

from __future__ import annotations

from fdpg_fast.cli import prepare_environment

prepare_environment()  # before torch is imported

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
