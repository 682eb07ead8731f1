"""What one run of an experiment leaves: a line of results.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import disk_errors
from ..measure.estimators import Estimate
from ..runs.folder import Json, read_jsonl, to_float, to_json, write_whole


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
    metrics = {name: list(vars(e).values()) for name, e in row.metrics.items()}
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
    return read_jsonl(path, _parse)


def _parse(data: Json) -> Row:
    metrics = {name: Estimate(*map(to_float, numbers)) for name, numbers in data["metrics"].items()}
    curve = [{key: to_float(value) for key, value in point.items()} for point in data["curve"]]
    return Row(**{**data, "metrics": metrics, "curve": curve})


def settings_of(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The different labels of rows, in order."""
    return list({tuple(row.labels.items()): row.labels for row in rows}.values())
