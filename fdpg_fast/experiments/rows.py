"""What one run of an experiment leaves: a line of results.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..estimators import Estimate
from ..run_folder import to_json


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        labels: its place on every axis of its study, and under "study" the study's name.
        seed: of the run; runs of equal seed and different labels draw equal random numbers as far as they can.
        metrics: what was measured of the final policy, by the names of `evaluate.Evaluation`.
        curve: a few rounds' metrics, each with "round".
        seconds: that the run and its evaluation took.
    """

    labels: dict[str, str]
    seed: int
    metrics: dict[str, Estimate]
    curve: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    def matches(self, where: dict[str, str]) -> bool:
        """Whether the row has all these labels."""
        return where.items() <= self.labels.items()


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """As JSON lines."""
    path.write_text("".join(to_json(_plain(row)) + "\n" for row in rows), encoding="utf-8")


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
            rows.append(Row(data["labels"], data["seed"], metrics, curve, data["seconds"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: not a row of results ({error}); remove the damaged line") from None
    return rows


def _plain(row: Row) -> dict[str, Any]:
    metrics = {name: [e.value, e.standard_error, e.ess] for name, e in row.metrics.items()}
    return {
        "labels": row.labels,
        "seed": row.seed,
        "seconds": round(row.seconds, 2),
        "metrics": metrics,
        "curve": row.curve,
    }


def _number(value: Any) -> float:
    """to_json writes NaN as null and infinities as strings."""
    return float("nan") if value is None else float(value)
