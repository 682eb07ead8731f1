"""A divergence that nobody but its author knows, through everything that takes one; one row says all there is."""

import math

import pytest
import torch

from fdpg_fast.measure.estimators import LogPartition, divergence_matrix
from fdpg_kernels import Divergence, divergences, fdpg_loss, sequence_weights
from support.kernel_cases import NAMES, batch, head_batch

GRID = torch.arange(-240, 241, dtype=torch.float64) / 3 + 0.003  # log t up to 80 nats


def triangular(t):
    return (t - 1) ** 2 / (t + 1)


def jeffreys(t):
    return t * t.log() - t.log()


def renamed(name):
    """A divergence of the table as a user would write it down: f and its limit at infinity."""
    known = divergences.get(name)
    return Divergence(f"my {name}", known.f, known.f_prime_at_infinity)


IMPLEMENTATIONS = ["chunked", "triton"]
TRIANGULAR = Divergence("triangular", triangular, 1.0)
JEFFREYS = Divergence("jeffreys", jeffreys, math.inf)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("mine", [TRIANGULAR, JEFFREYS], ids=lambda x: x.name)
def test_ops(mine, impl):
    zeros, dtype = mine.allows_zeros, torch.float32 if impl == "triton" else torch.float64
    both = [sequence_weights(**batch([3, 0, 5], zeros=zeros), divergence=mine, impl=x) for x in (impl, "reference")]
    torch.testing.assert_close(*both, rtol=1e-10, atol=1e-10)
    arguments = {
        k: x.detach().to(dtype) if x.is_floating_point() else x for k, x in head_batch([3, 0, 5], zeros=zeros).items()
    }
    found = []
    for name in (impl, "reference"):
        hidden = arguments["hidden"].clone().requires_grad_()
        out = fdpg_loss(**arguments | {"hidden": hidden}, divergence=mine, baseline=0.2, impl=name)
        out.loss.backward()
        found.append((out.loss.detach().double(), out.weights.weight.double(), hidden.grad))
    for mine_found, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine_found, expected, rtol=1e-4, atol=1e-5)


def test_table_of_divergences():
    policy = torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=torch.float64)
    target = torch.tensor([0.125, 0.375, 0.25, 0.25], dtype=torch.float64)
    drawn = torch.tensor([0, 0, 1, 2])  # in proportion to π
    exact = LogPartition(*(torch.tensor([x], dtype=torch.float64) for x in (0.0, 0.0, math.inf)))
    index = torch.zeros(4, dtype=torch.int64)
    matrix = divergence_matrix(policy.log()[drawn], target.log()[drawn], index, exact, [TRIANGULAR, "forward_kl"])
    assert [*matrix.estimates] == ["triangular", "forward_kl", "jensen_shannon", "jensen_shannon_half"]
    assert matrix.estimates["triangular"].ess == 4  # f(0) is finite, so the part that π never samples is counted
    estimated = divergence_matrix(policy.log()[drawn], target.log()[drawn], index, names=[TRIANGULAR])
    z = (target[drawn] / policy[drawn]).mean()  # of the sample itself
    t = policy[drawn] * z / target[drawn]
    assert estimated.estimates["triangular"].value == pytest.approx(float((triangular(t) / t).mean()), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_what_follows_from_f_is_what_the_table_says(name):
    known, mine = divergences.get(name), renamed(name)
    assert mine.f_at_zero == pytest.approx(known.f_at_zero, rel=1e-9)
    assert mine.f_prime_at_infinity == pytest.approx(known.f_prime_at_infinity, rel=1e-12)
    far = GRID[GRID.abs() > 1e-3]
    torch.testing.assert_close(mine.f_over_t(far), known.f_over_t(far), rtol=1e-6, atol=1e-12)
    off_support = torch.tensor([math.inf], dtype=torch.float64)
    assert mine.f_over_t(off_support).item() == pytest.approx(known.f_prime_at_infinity)
    assert (mine.label, mine.kernel_family) == (mine.name, None) and known.kernel_family


def test_f_over_t_where_t_leaves_float64():
    log_t = torch.tensor([-700.0, -400.0, 400.0, 700.0, 800.0], dtype=torch.float64)
    found = TRIANGULAR.f_over_t(log_t)
    torch.testing.assert_close(found, torch.cat([(-log_t[:2]).exp(), torch.ones(3).double()]), rtol=1e-12, atol=0)
    found = JEFFREYS.f_over_t(log_t)
    torch.testing.assert_close(found[:4], log_t[:4] * (1 - (-log_t[:4]).exp()), rtol=1e-12, atol=0)
    assert found[4] == math.inf


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (dict(f_over_t_from_log=lambda log_t: log_t), r"f_over_t_from_log is not f\(t\)/t"),
        (dict(f_at_zero=0.5), r"exceeds f_at_zero=0.5"),
    ],
    ids=["f/t", "f(0)"],
)
def test_what_does_not_belong_to_f_is_refused(given, reason):
    with pytest.raises(ValueError, match=reason):
        Divergence("mine", triangular, 1.0, **given)
