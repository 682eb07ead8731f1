"""Means of a metric over runs, and differences of it between runs, with 95 % intervals.

Runs are compared in pairs that differ only in the labels in question and share everything else, the seed included.
Labels are fixed, seeds are chance: the mean difference is averaged over the other labels, its error comes from the
spread between seeds inside each combination of them, pooled, with a t interval of 95 %. With one seed there is no such
spread; the errors of the measurements stand in for it, and the evidence says so.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .rows import Row, settings_of

Labels = dict[str, str]
Setting = tuple[tuple[str, str], ...]
Measured = tuple[float, float]  # a value and its own error
Strata = dict[Setting, list[Measured]]  # by the other labels, one a seed
Verdicts = Literal["shown", "not shown", "inconclusive"]
# for 1, 2, … degrees of freedom
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t; beyond 30 degrees of freedom by Cornish and Fisher's expansion."""
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

    def verdict(self, low: float, high: float) -> Verdicts:
        """What is to be thought of the claim that the mean lies in [low, high]."""
        if low <= self.low and self.high <= high:
            return "shown"
        return "not shown" if self.high < low or self.low > high else "inconclusive"

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return self.note
        return f"{self.mean:.4g} ± {self.half_width:.2g} ({self.note})"


def difference(rows: Sequence[Row], metric: str, of: Labels, minus: Labels) -> Interval:
    """How much higher a metric is in runs that have the labels `of` than in runs that have `minus`."""
    differences = paired_differences(rows, metric, of, minus)
    return mean_interval(differences, differences)


def average(rows: Sequence[Row], metric: str, of: Labels) -> Interval:
    """The mean of a metric over runs that have some labels."""
    strata: Strata = {}
    for (setting, _), measured in _by_setting(rows, metric, of, of).items():
        strata.setdefault(setting, []).append(measured)
    return mean_interval(strata, strata)


def within_seeds(rows: Sequence[Row], metric: str) -> list[Interval]:
    """The mean of a metric in each setting of the rows, to see settings side by side.

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
        squares += sum((value - shift - interval.mean) ** 2 for value, interval in zip(here, means, strict=True))
    half_width = t_quantile(degrees) * math.sqrt(squares / degrees / len(seeds))
    return [replace(interval, half_width=half_width) for interval in means]


def paired_differences(rows: Sequence[Row], metric: str, of: Labels, minus: Labels) -> Strata:
    """Differences of a metric between runs that are alike but for the labels `of` and `minus`."""
    first, second = (_by_setting(rows, metric, labels, {*of, *minus}) for labels in (of, minus))
    strata: Strata = {}
    for key, (value, error) in first.items():
        if key in second:
            other, error_of_other = second[key]
            strata.setdefault(key[0], []).append((value - other, math.hypot(error, error_of_other)))
    return strata


def _by_setting(
    rows: Sequence[Row], metric: str, labels: Labels, axes: Collection[str]
) -> dict[tuple[Setting, int], Measured]:
    """What the runs with these labels have measured, by their labels on all but some axes, and their seed."""
    measured = {}
    for row in rows:
        if row.matches(labels) and metric in row.metrics and math.isfinite(row.metrics[metric].value):
            setting = tuple(sorted(item for item in row.labels.items() if item[0] not in axes))
            measured[setting, row.seed] = (row.metrics[metric].value, row.metrics[metric].standard_error)
    return measured


def mean_interval(strata: Strata, pooled: Strata) -> Interval:
    """The mean over strata, with the spread between seeds pooled over all strata of `pooled`.

    Without a spread, from one seed or of a number that all seeds share, as that of the base, the errors of the
    measurements stand in for it.
    """
    count = sum(map(len, strata.values()))
    if not count:
        return Interval(math.nan, math.nan, "no such runs")
    mean = sum(sum(value for value, _ in stratum) / len(stratum) for stratum in strata.values()) / len(strata)
    degrees = sum(len(stratum) - 1 for stratum in pooled.values())
    if degrees and any(value != stratum[0][0] for stratum in pooled.values() for value, _ in stratum):
        squares = 0.0
        for stratum in pooled.values():
            centre = sum(value for value, _ in stratum) / len(stratum)
            squares += sum((value - centre) ** 2 for value, _ in stratum)
        error = math.sqrt(squares / degrees * sum(1 / len(stratum) for stratum in strata.values())) / len(strata)
        return Interval(mean, t_quantile(degrees) * error, f"spread between seeds of {count} runs or pairs")
    error = math.sqrt(sum(stratum[0][1] ** 2 for stratum in strata.values())) / len(strata)
    return Interval(
        mean, 1.96 * error, f"{'shared by all seeds' if degrees else 'one seed'}, error of measurement only"
    )
