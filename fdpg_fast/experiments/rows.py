"""What one run of an experiment leaves: a line of results.jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..measure.estimators import Estimate
from ..runs.folder import disk_errors, to_json, write_whole


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        labels: its place on every axis of its study, and under "study" the study's name.
        seed: of the run; runs of equal seed and different labels draw equal random numbers as far as they can.
        metrics: what was measured of the final policy, by the names of `evaluate.Evaluation`.
        curve: a few rounds' metrics, each with "round".
        seconds: that the run and its evaluation took.
        fingerprint: of the settings that it came from.
        machine: that it ran on.
    """

    labels: dict[str, str]
    seed: int
    metrics: dict[str, Estimate]
    curve: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    fingerprint: str = ""
    machine: str = ""

    def matches(self, where: dict[str, str]) -> bool:
        """Whether the row has all these labels."""
        return where.items() <= self.labels.items()


def append_row(path: Path, row: Row) -> None:
    """Add a line."""
    metrics = {name: [e.value, e.standard_error, e.ess] for name, e in row.metrics.items()}
    with disk_errors(f"writing {path}"), open(path, "a", encoding="utf-8") as file:
        file.write(to_json({**vars(row), "seconds": round(row.seconds, 2), "metrics": metrics}) + "\n")


def forget_torn_line(path: Path) -> None:
    """Drop the end of a file that a killed process left without its newline."""
    if path.exists():
        text = path.read_text(encoding="utf-8", errors="replace")
        if text and not text.endswith("\n"):
            write_whole(path, text[: text.rfind("\n") + 1])


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file.

    Raises:
        UserError: a line is damaged; names file and line.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], start=1):
        try:
            data = json.loads(line)
            metrics = {name: Estimate(*map(_number, found)) for name, found in data["metrics"].items()}
            curve = [{key: _number(value) for key, value in point.items()} for point in data["curve"]]
            rows.append(Row(**{**data, "metrics": metrics, "curve": curve}))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: not a row of results ({error}); remove the damaged line") from None
    return rows


def _number(value: Any) -> float:
    """to_json writes NaN as null and infinities as strings."""
    return float("nan") if value is None else float(value)


def settings_of(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The different labels of rows, in order."""
    return list({tuple(row.labels.items()): row.labels for row in rows}.values())
