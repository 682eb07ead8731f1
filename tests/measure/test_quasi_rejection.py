"""Quasi-rejection sampling: estimates against exact sums, what is kept against p_β, and the command line."""

import math
import re

import pytest
import torch

from fdpg_fast.errors import UserError
from fdpg_fast.measure.quasi_rejection import acceptance_probability, estimate, sample
from support import runs

# target Poisson(11), proposal Poisson(10): acceptance, TV, KL as published with the method
PUBLISHED = {0.5: (0.999, 0.12, 0.046), 1.0: (0.877, 0.075, 0.021), 2.0: (0.500, 0.0041, 0.000)}
COUNTS = torch.arange(120, dtype=torch.float64)  # beyond it either has less than e^-150


def log_poisson(mean):
    return COUNTS * math.log(mean) - mean - torch.lgamma(COUNTS + 1)


def exact(log_p, log_q, beta):
    p, q = log_p.exp(), log_q.exp()
    kept = torch.minimum(p, beta * q)
    p_beta = kept / kept.sum()
    return float(kept.sum() / beta), float((p - p_beta).abs().sum() / 2), float((p * (p / p_beta).log()).nansum())


@pytest.fixture(scope="module")
def draws():
    generator = torch.Generator().manual_seed(0)
    return torch.multinomial(log_poisson(10).exp(), 40_000, replacement=True, generator=generator)


@pytest.mark.parametrize(("beta", "published"), PUBLISHED.items())
def test_exact_values_are_the_published_ones(beta, published):
    """These are themselves estimates from samples: known to about 0.003."""
    found = exact(log_poisson(11), log_poisson(10), beta)
    assert found == pytest.approx(published, abs=3e-3)


@pytest.mark.parametrize("log_scale", [0.0, -700.0], ids=["normalised", "Z = exp(-700)"])
def test_estimates_hold_the_exact_values_in_their_intervals(log_scale, draws):
    log_weights = (log_poisson(11) - log_poisson(10))[draws] + log_scale
    for quality in estimate(log_weights, torch.zeros_like(draws), list(PUBLISHED)):
        found = (quality.acceptance, quality.total_variation, quality.forward_kl)
        for measured, true in zip(found, exact(log_poisson(11), log_poisson(10), quality.beta), strict=True):
            assert abs(measured.value - true) < 3 * measured.standard_error + 1e-12
            assert measured.standard_error < 0.01


def test_a_larger_beta_accepts_less_and_comes_nearer(draws):
    log_weights = (log_poisson(11) - log_poisson(10))[draws]
    found = estimate(log_weights, torch.zeros_like(draws))
    columns = [[getattr(q, name).value for q in found] for name in ("acceptance", "total_variation", "forward_kl")]
    assert all(column == sorted(column, reverse=True) for column in columns)
    assert columns[1][-1] == pytest.approx(0, abs=1e-9) and columns[2][-1] == pytest.approx(0, abs=1e-9)


def test_standard_errors_are_the_spread_of_repeated_estimates(draws):
    log_weights = (log_poisson(11) - log_poisson(10))[draws].view(100, 400)
    repeats = [estimate(row, torch.zeros(400, dtype=torch.long), [1.0])[0] for row in log_weights]
    for name in ("acceptance", "total_variation", "forward_kl"):
        estimates = [getattr(quality, name) for quality in repeats]
        spread = float(torch.tensor([e.value for e in estimates]).std())
        claimed = sum(e.standard_error for e in estimates) / len(estimates)
        assert claimed == pytest.approx(spread, rel=0.25)  # the spread of 100 is known to 7 %


def test_contexts_weigh_alike_and_those_without_support_are_left_out():
    half = torch.tensor([0.0, -math.inf])
    log_weights = torch.cat([half.repeat(4), torch.zeros(2) + 5, torch.full((3,), -math.inf)])  # p/q of context 0 is 2
    owner = torch.tensor([0] * 8 + [1] * 2 + [2] * 3)
    (quality,) = estimate(log_weights, owner, [1.0])
    # of context 0 the half in the support is kept, of context 1 all; p_β is p in both
    assert quality.acceptance.value == pytest.approx(0.75)
    assert quality.total_variation.value == quality.forward_kl.value == pytest.approx(0)
    (nothing,) = estimate(log_weights[-3:], owner[-3:], [1.0])
    assert math.isnan(nothing.acceptance.value)


def test_acceptance_probability_is_that_of_the_definition():
    log_weights = torch.tensor([-math.inf, 0.0, 1.0, 5.0], dtype=torch.float64)
    found = acceptance_probability(log_weights, torch.tensor(1.0), 2.0)
    assert found.tolist() == pytest.approx([0, math.exp(-1) / 2, 0.5, 1])


def poisson_draw(contexts, each, generator=torch.Generator().manual_seed(1)):  # noqa: B008
    drawn = torch.multinomial(log_poisson(10).exp(), each * len(contexts), replacement=True, generator=generator)
    owner = torch.tensor(contexts).repeat_interleave(each)
    log_weights = (log_poisson(11) - log_poisson(10))[drawn] - 3.0
    return (
        [(int(c), int(x)) for c, x in zip(owner, drawn, strict=True)],
        log_weights.masked_fill(owner == 2, -math.inf),
        owner,
    )


@pytest.mark.parametrize("beta", [0.5, 1.0, 4.0])
def test_kept_draws_have_the_law_p_beta(beta):
    kept = sample(poisson_draw, contexts=1, count=6000, beta=beta, max_draws=100_000, seed=0)
    minimum = torch.minimum(log_poisson(11).exp(), beta * log_poisson(10).exp())
    p_beta = minimum / minimum.sum()
    mean, variance = (p_beta * COUNTS).sum(), (p_beta * COUNTS**2).sum() - (p_beta * COUNTS).sum() ** 2
    found = torch.tensor([float(x) for _, x in kept.items])
    assert len(found) == 6000 and kept.draws < 100_000
    assert abs(float(found.mean() - mean)) < 3.3 * math.sqrt(variance / 6000) + 0.02  # Z is known to 2 %


def test_contexts_get_equal_parts_and_one_without_support_gets_none():
    kept = sample(poisson_draw, contexts=3, count=11, beta=1.0, max_draws=4000, seed=0)
    assert [c for c, _ in kept.items] == [0, 1] * 5 + [0] and kept.unreachable == [2]
    assert kept.quality[0].beta == 0.25 and kept.draws < 400


def test_budget_bounds_the_draws():
    kept = sample(poisson_draw, contexts=1, count=1000, beta=200.0, max_draws=700, seed=0)
    assert len(kept.items) < 20 and kept.draws == 700
    with pytest.raises(UserError, match="--max-draws: 95 is too small .* at least 16 of each .*give 96 or more"):
        sample(poisson_draw, contexts=3, count=8, beta=1.0, max_draws=95, seed=0)


SOFT = {"kind": "rlhf", "beta": 0.5, "feature": runs.LETTERS["feature"]}


@pytest.fixture(scope="module")
def run_dir(tiny_model, tmp_path_factory):
    return runs.train(tiny_model, tmp_path_factory.mktemp("run"), target=[SOFT])


def test_command_prints_kept_completions_and_the_grid(run_dir, capsys):
    def sampled(*options):
        assert runs.call("sample", run_dir, *options) == 0
        shown = capsys.readouterr()
        return [runs.strict(line) for line in shown.out.splitlines()], shown.err

    lines, said = sampled("--quasi-rejection-beta=2", "--count=5")
    assert len(lines) == 5 and [line["prompt"] for line in lines[:3]] != [lines[0]["prompt"]] * 3
    assert lines[0].keys() == {"prompt", "completion", "finished", "features", "log_q", "log_score"}
    grid = [line for line in said.splitlines()[1:] if line[:1].isdigit()]
    assert [float(line.split()[0]) for line in grid] == [0.25, 0.5, 1, 2, 4, 8, 16, 32]
    assert lines == sampled("--quasi-rejection-beta=2", "--count=5")[0]
    assert lines != sampled("--quasi-rejection-beta=2", "--count=5", f"--seed={10**30}")[0]
    assert re.search(r"^Z, and so β, is known to ± \d+% in a context$", said, re.MULTILINE)
    lines, _ = sampled("--quasi-rejection-beta=4", "--count=40", "--prompt=tea ")
    plain, _ = sampled("--count=400", "--prompt=tea ")
    with_letters, plain_letters = (
        sum(x["features"]["letters"] for x in group) / len(group) for group in (lines, plain)
    )
    assert {line["prompt"] for line in lines} == {"tea "} and with_letters > plain_letters


def test_command_says_what_would_do_when_the_draws_are_spent(run_dir, tiny_model, tmp_path, capsys):
    assert runs.call("sample", run_dir, "--quasi-rejection-beta=1000", "--max-draws=100", "--count=5") == 1
    shown = capsys.readouterr()
    last = shown.err.splitlines()[-1]
    assert last.startswith("fdpg-fast: kept ") and "of 5 completions in 100 draws, acceptance rate 0.00" in last
    assert "; β 8 would accept " in last or "; β 4 would accept " in last
    never = {"kind": "pointwise", "feature": {"kind": "regex", "name": "never", "pattern": "(?!)"}}
    other = runs.train(tiny_model, tmp_path, target=[never])
    assert runs.call("sample", other, "--quasi-rejection-beta=1", "--max-draws=100") == 1
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith("fdpg-fast: kept 0 of 8 completions in 48 draws: no draw satisfies the target")
    )


@pytest.mark.parametrize("option", ["--quasi-rejection-beta=0", "--quasi-rejection-beta=x", "--max-draws=5"])
def test_command_refuses_options_that_make_no_sense(option, run_dir, capsys):
    assert runs.call("sample", run_dir, option) == 2
    assert option.split("=")[0] in capsys.readouterr().err
