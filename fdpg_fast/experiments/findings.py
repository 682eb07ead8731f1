"""Claims about an experiment's runs, and verdicts on them that follow from the numbers alone.

A claim is *shown* where the interval of a number lies inside what it says, *not shown* where it lies outside,
*inconclusive* else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from ..measure.estimators import Estimate
from .intervals import Labels, Verdicts, average, difference, mean_interval, paired_differences
from .rows import Row


@dataclass(frozen=True)
class Verdict:
    """What became of a claim, and the numbers behind it."""

    claim: str
    verdict: Verdicts
    evidence: str


class _Finding(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    claim: str
    """In words."""
    study: str | None = None
    """Only its runs; left out: all."""
    where: Labels = {}
    """Only runs with these labels."""

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """The verdict on the rows of an experiment."""
        where = self.where | ({"study": self.study} if self.study else {})
        return Verdict(self.claim, *self._judge([row for row in rows if row.matches(where)]))

    def _judge(self, rows: list[Row]) -> tuple[Verdicts, str]:
        raise NotImplementedError


class MoreFinding(_Finding):
    """A metric is higher with some labels than with others."""

    metric: str
    more: Labels
    less: Labels
    margin: float = 0.0
    """By more than that."""

    def _judge(self, rows: list[Row]) -> tuple[Verdicts, str]:
        interval = difference(rows, self.metric, self.more, self.less)
        least = math.nextafter(self.margin, math.inf)  # equal, as where nothing was trained, is not more
        return interval.verdict(least, math.inf), f"difference of {self.metric}: {interval}"


class EqualFinding(_Finding):
    """A metric differs by less than a margin."""

    metric: str
    equal: Annotated[list[Labels], Field(min_length=2, max_length=2)]
    within: float

    def _judge(self, rows: list[Row]) -> tuple[Verdicts, str]:
        interval = difference(rows, self.metric, *self.equal)
        return interval.verdict(-self.within, self.within), f"difference of {self.metric}: {interval}"


class BetweenFinding(_Finding):
    """A metric, or its distance from another, lies between two values."""

    metric: str
    minus: str | None = None
    """Another metric of the same run."""
    of: Labels
    between: tuple[float, float]

    def _judge(self, rows: list[Row]) -> tuple[Verdicts, str]:
        metric = self.metric
        if self.minus is not None:
            metric = f"{self.metric} − {self.minus}"
            rows = [_with_difference(row, metric, self.metric, self.minus) for row in rows]
        interval = average(rows, metric, self.of)
        return interval.verdict(*self.between), f"{metric}: {interval}"


class UndominatedFinding(_Finding):
    """In no setting are other labels better in one of two metrics and not worse in the other; higher is better."""

    metrics: Annotated[list[str], Field(min_length=2, max_length=2)]
    undominated: Labels
    by: Labels

    def _judge(self, rows: list[Row]) -> tuple[Verdicts, str]:
        differences = [paired_differences(rows, metric, self.undominated, self.by) for metric in self.metrics]
        dominated, better = [], []
        settings = sorted(set(differences[0]) & set(differences[1]))
        for setting in settings:
            pair = [mean_interval({setting: strata[setting]}, strata) for strata in differences]
            worse = all(interval.mean <= 0 for interval in pair) and any(interval.high < 0 for interval in pair)
            dominated.append(worse)
            better.append(any(interval.low > 0 for interval in pair))
        evidence = (
            f"{len(settings)} settings: dominated in {sum(dominated)}, better in at least one of "
            f"{' and '.join(self.metrics)} in {sum(better)}"
        )
        if any(dominated):
            return "not shown", evidence
        return ("shown" if settings and all(better) else "inconclusive"), evidence


class SameOrderFinding(_Finding):
    """The divergences come in the same order by each metric, for each of several labels of an axis."""

    same_order: list[str]
    across: dict[str, Annotated[list[str], Field(min_length=2)]]
    """Axis: labels. Without runs of one of them nothing is shown."""

    def _judge(self, rows: list[Row]) -> tuple[Verdicts, str]:
        places = [(axis, label) for axis, labels in self.across.items() for label in labels]
        names = sorted({row.labels["divergence"] for row in rows if "divergence" in row.labels})
        reversed_, agreeing, clear = [], 0, 0
        for metric, (a, b) in itertools.product(self.same_order, itertools.combinations(names, 2)):
            differences = paired_differences(rows, metric, {"divergence": a}, {"divergence": b})
            signs = []
            for place in places:
                here = {setting: seeds for setting, seeds in differences.items() if place in setting}
                studies = {dict(setting).get("study") for setting in here}  # seeds of another study spread otherwise
                alike = {s: seeds for s, seeds in differences.items() if dict(s).get("study") in studies}
                interval = mean_interval(here, alike)
                signs.append(1 if interval.low > 0 else -1 if interval.high < 0 else 0)
            if 1 in signs and -1 in signs:
                reversed_.append(f"{a} against {b} by {metric}")
            clear += any(signs)
            agreeing += abs(sum(signs)) == len(places)
        missing = [label for axis, label in places if all(row.labels.get(axis) != label for row in rows)]
        evidence = (
            f"{len(places)} labels of {', '.join(self.across)}; of {clear} pairs that differ clearly at one of them "
            f"{agreeing} do so at all, reversed: {', '.join(reversed_) or 'none'}"
            + (f"; no runs of {', '.join(missing)}" if missing else "")
        )
        if reversed_:
            return "not shown", evidence
        return ("shown" if agreeing and agreeing == clear else "inconclusive"), evidence


Finding = MoreFinding | EqualFinding | BetweenFinding | UndominatedFinding | SameOrderFinding


def _with_difference(row: Row, name: str, metric: str, minus: str) -> Row:
    if metric not in row.metrics or minus not in row.metrics:
        return row
    a, b = row.metrics[metric], row.metrics[minus]
    error = math.hypot(a.standard_error, b.standard_error)
    return replace(row, metrics={name: Estimate(a.value - b.value, error, min(a.ess, b.ess))})
