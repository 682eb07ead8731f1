"""Sums by context against plain arithmetic, and the edges of float64."""

import math

import pytest
import torch

from fdpg_fast import by_context

F64 = torch.float64
INF = math.inf
OWN = torch.tensor([2, 0, 2, 0, 2])  # of four contexts; 1 and 3 have no samples


def tensor(*values):
    return torch.tensor(values, dtype=F64)


def test_sums_and_means_of_rows_and_columns():
    values = tensor(1, 2, 3, 4, 5)
    assert by_context.sums(values, OWN, 4).tolist() == [6, 0, 9, 0]
    table = torch.stack([values, -values], dim=1)
    assert by_context.sums(table, OWN, 4).tolist() == [[6, -6], [0, 0], [9, -9], [0, 0]]
    renumbered, counts = by_context.renumber(OWN * 10 - 3)
    assert renumbered.tolist() == [1, 0, 1, 0, 1] and counts.tolist() == [2, 3]
    assert by_context.means(values, renumbered, counts).tolist() == [3, 3]


@pytest.mark.parametrize("level", [0.0, -5000.0, 5000.0])
def test_log_sums_at_any_level(level):
    values = tensor(0.5, -INF, 1.5, -INF, -INF) + level
    expected = [-INF, -INF, math.log(math.exp(0.5) + math.exp(1.5)) + level, -INF]
    assert by_context.log_sum_exp(values, OWN, 4).tolist() == pytest.approx(expected)
    halves = by_context.log_sum_exp(values, OWN, 4, factors=tensor(0.5, 0.5, 0.5, 0.5, 0.5))
    assert halves.tolist() == pytest.approx([x - math.log(2) for x in expected])
    before = tensor(-INF, 3, level, level)
    added = by_context.log_add(before, values, OWN).tolist()
    both = math.log(1 + math.exp(0.5) + math.exp(1.5)) + level
    assert added == pytest.approx([-INF, 3, both, level])


def test_scaled_exponentials_are_at_most_one_and_zero_stays_zero():
    scaled, log_scale = by_context.scaled_exp(tensor(800, -INF, 801, -INF, -INF), OWN, 3)
    assert scaled.tolist() == pytest.approx([math.exp(-1), 0, 1, 0, 0])
    assert log_scale.tolist() == [0, 0, 801]


def test_effective_samples():
    ess = by_context.effective_samples(tensor(1, 0, 1, 0, 2), OWN, 4).tolist()
    assert ess[2] == pytest.approx(16 / 6) and all(math.isnan(x) for x in (ess[0], ess[1], ess[3]))
