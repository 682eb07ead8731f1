"""Claims about an experiment's runs, and verdicts on them that follow from the numbers alone.

Runs are compared in pairs that differ only in the labels in question and share everything else, the seed included.
Labels are fixed, seeds are chance: the mean difference is averaged over the other labels, its error comes from the
spread between seeds inside each combination of them, pooled, with a t interval of 95 %. With one seed there is no such
spread; the errors of the measurements stand in for it, and the evidence says so.

A claim is *shown* where the interval lies inside what it says, *not shown* where it lies outside, *inconclusive* else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..measure.estimators import Estimate
from .rows import Row, settings_of

Labels = dict[str, str]
VERDICTS = Literal["shown", "not shown", "inconclusive"]
# 97.5 % quantiles of Student's t for 1, 2, … degrees of freedom
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def t_quantile(degrees: int) -> float:
    """Beyond 30 degrees of freedom by the first terms of Cornish and Fisher's expansion."""
    if degrees <= len(T_QUANTILES):
        return T_QUANTILES[degrees - 1]
    return 1.95996 + 2.3722 / degrees + 2.8225 / degrees**2


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval; the half-width is NaN where nothing tells the error."""

    mean: float
    half_width: float
    note: str

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width

    def verdict(self, low: float, high: float) -> VERDICTS:
        """Of the claim that the mean lies in [low, high]."""
        if low <= self.low and self.high <= high:
            return "shown"
        return "not shown" if self.high < low or self.low > high else "inconclusive"

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return self.note
        return f"{self.mean:.4g} ± {self.half_width:.2g} ({self.note})"


@dataclass(frozen=True)
class Verdict:
    """What became of a claim, and the numbers behind it."""

    claim: str
    verdict: VERDICTS
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

    def _judge(self, rows: list[Row]) -> tuple[VERDICTS, str]:
        raise NotImplementedError


class MoreFinding(_Finding):
    """A metric is higher with some labels than with others."""

    metric: str
    more: Labels
    less: Labels
    margin: float = 0.0
    """By more than that."""

    def _judge(self, rows: list[Row]) -> tuple[VERDICTS, str]:
        found = difference(rows, self.metric, self.more, self.less)
        least = math.nextafter(self.margin, math.inf)  # equal, as where nothing was trained, is not more
        return found.verdict(least, math.inf), f"difference of {self.metric}: {found}"


class EqualFinding(_Finding):
    """A metric differs by less than a margin."""

    metric: str
    equal: Annotated[list[Labels], Field(min_length=2, max_length=2)]
    within: float

    def _judge(self, rows: list[Row]) -> tuple[VERDICTS, str]:
        found = difference(rows, self.metric, *self.equal)
        return found.verdict(-self.within, self.within), f"difference of {self.metric}: {found}"


class BetweenFinding(_Finding):
    """A metric, or its distance from another, lies between two values."""

    metric: str
    minus: str | None = None
    """Another metric of the same run."""
    of: Labels
    between: tuple[float, float]

    def _judge(self, rows: list[Row]) -> tuple[VERDICTS, str]:
        metric = self.metric
        if self.minus is not None:
            metric = f"{self.metric} − {self.minus}"
            rows = [_with_difference(row, metric, self.metric, self.minus) for row in rows]
        found = average(rows, metric, self.of)
        return found.verdict(*self.between), f"{metric}: {found}"


class UndominatedFinding(_Finding):
    """In no setting are other labels better in one of two metrics and not worse in the other; higher is better."""

    metrics: Annotated[list[str], Field(min_length=2, max_length=2)]
    undominated: Labels
    by: Labels

    def _judge(self, rows: list[Row]) -> tuple[VERDICTS, str]:
        strata = [_strata(rows, metric, self.undominated, self.by) for metric in self.metrics]
        dominated, better = [], []
        settings = sorted(set(strata[0]) & set(strata[1]))
        for setting in settings:
            pair = [_interval({setting: stratum[setting]}, stratum) for stratum in strata]
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

    def _judge(self, rows: list[Row]) -> tuple[VERDICTS, str]:
        places = [(axis, label) for axis, labels in self.across.items() for label in labels]
        names = sorted({row.labels["divergence"] for row in rows if "divergence" in row.labels})
        reversed_, agreeing, clear = [], 0, 0
        for metric, (a, b) in itertools.product(self.same_order, itertools.combinations(names, 2)):
            strata = _strata(rows, metric, {"divergence": a}, {"divergence": b})
            signs = []
            for place in places:
                here = {setting: found for setting, found in strata.items() if place in setting}
                studies = {dict(setting).get("study") for setting in here}  # seeds of another study spread otherwise
                alike = {setting: found for setting, found in strata.items() if dict(setting).get("study") in studies}
                interval = _interval(here, alike)
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

Setting = tuple[tuple[str, str], ...]
Strata = dict[Setting, list[tuple[float, float]]]  # by the other labels: value and its own error, one a seed


def _with_difference(row: Row, name: str, metric: str, minus: str) -> Row:
    if metric not in row.metrics or minus not in row.metrics:
        return row
    a, b = row.metrics[metric], row.metrics[minus]
    error = math.hypot(a.standard_error, b.standard_error)
    return replace(row, metrics={name: Estimate(a.value - b.value, error, min(a.ess, b.ess))})


def difference(rows: Sequence[Row], metric: str, of: Labels, minus: Labels) -> Interval:
    """Of a metric, between runs that have some labels and runs that have others."""
    return _interval(strata := _strata(rows, metric, of, minus), strata)


def average(rows: Sequence[Row], metric: str, of: Labels) -> Interval:
    """Of a metric, over runs that have some labels."""
    strata: Strata = {}
    for row in rows:
        if row.matches(of) and metric in row.metrics and math.isfinite(row.metrics[metric].value):
            estimate = row.metrics[metric]
            setting = tuple(sorted(item for item in row.labels.items() if item[0] not in of))
            strata.setdefault(setting, []).append((estimate.value, estimate.standard_error))
    return _interval(strata, strata)


def within_seeds(rows: Sequence[Row], metric: str) -> list[Interval]:
    """Of a metric, for each setting of the rows, to see settings side by side.

    What seeds differ in alike for all settings is left out: the error is that of the residuals after the means of
    settings and of seeds, pooled (Loftus & Masson 1994). With one seed, or a run missing, it is `average`'s.
    """
    settings, seeds = settings_of(rows), sorted({row.seed for row in rows})
    values = {(tuple(row.labels.items()), row.seed): row.metrics[metric].value for row in rows if metric in row.metrics}
    means = [average(rows, metric, labels) for labels in settings]
    degrees = (len(settings) - 1) * (len(seeds) - 1)
    if degrees == 0 or len(values) < len(settings) * len(seeds):
        return means
    whole = sum(values.values()) / len(values)
    squares = 0.0
    for seed in seeds:
        here = [values[tuple(labels.items()), seed] for labels in settings]
        shift = sum(here) / len(here) - whole
        squares += sum((value - shift - found.mean) ** 2 for value, found in zip(here, means, strict=True))
    half_width = t_quantile(degrees) * math.sqrt(squares / degrees / len(seeds))
    return [replace(found, half_width=half_width) for found in means]


def _strata(rows: Sequence[Row], metric: str, of: Labels, minus: Labels) -> Strata:
    axes = {*of, *minus}
    sides: list[dict[tuple[Setting, int], tuple[float, float]]] = []
    for labels in (of, minus):
        side = {}
        for row in rows:
            if row.matches(labels) and metric in row.metrics and math.isfinite(row.metrics[metric].value):
                setting = tuple(sorted(item for item in row.labels.items() if item[0] not in axes))
                estimate = row.metrics[metric]
                side[setting, row.seed] = (estimate.value, estimate.standard_error)
        sides.append(side)
    strata: Strata = {}
    for key in sides[0].keys() & sides[1].keys():
        (a, error_a), (b, error_b) = sides[0][key], sides[1][key]
        strata.setdefault(key[0], []).append((a - b, math.hypot(error_a, error_b)))
    return strata


def _interval(strata: Strata, pooled: Strata) -> Interval:
    """The mean over strata, with the spread between seeds pooled over all strata of `pooled`.

    Without a spread, from one seed or of a number that all seeds share, as that of the base, the errors of the
    measurements stand in for it.
    """
    count = sum(map(len, strata.values()))
    if not count:
        return Interval(math.nan, math.nan, "no such runs")
    mean = sum(sum(value for value, _ in found) / len(found) for found in strata.values()) / len(strata)
    degrees = sum(len(found) - 1 for found in pooled.values())
    if degrees and any(value != found[0][0] for found in pooled.values() for value, _ in found):
        squares = 0.0
        for found in pooled.values():
            centre = sum(value for value, _ in found) / len(found)
            squares += sum((value - centre) ** 2 for value, _ in found)
        error = math.sqrt(squares / degrees * sum(1 / len(found) for found in strata.values())) / len(strata)
        return Interval(mean, t_quantile(degrees) * error, f"spread between seeds of {count} runs or pairs")
    error = math.sqrt(sum(found[0][1] ** 2 for found in strata.values())) / len(strata)
    return Interval(
        mean, 1.96 * error, f"{'shared by all seeds' if degrees else 'one seed'}, error of measurement only"
    )
