"""Pareto k against laws of known tail, and the sentences that say when a target is out of reach."""

import math

import pytest
import torch

from fdpg_fast.measure.diagnostics import Watch, complaints, fit_generalised_pareto, pareto_k
from support import runs

FINE = {"target/in_support": 0.5, "target/ess": 40.0, "target/pareto_k": 0.3, "z/log_z_se": 0.05, "z/ess": 20.0}


def quantiles(k, n):
    """Of a generalised Pareto law with σ = 1, ascending: the sample without chance."""
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.expm1(-k * torch.log1p(-u)) / k


@pytest.mark.parametrize("k", [-0.4, 0.3, 0.7, 1.2])
def test_fit_finds_the_shape_of_a_sample_without_chance_whatever_its_scale(k):
    found = [fit_generalised_pareto(scale * quantiles(k, 4000)) for scale in (1.0, 1e-6, 1e6)]
    assert found == pytest.approx([k] * 3, abs=0.03)
    assert found[1:] == pytest.approx(found[:1] * 2, abs=1e-6)


@pytest.mark.parametrize("k", [0.3, 0.7, 1.2])
def test_fit_of_random_samples_is_right_on_average(k):
    """The maximum likelihood estimate of k has variance (1 + k)²/n."""
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(200, 500, generator=generator, dtype=torch.float64)
    excess = (torch.expm1(-k * torch.log1p(-u)) / k).sort(1).values
    found = torch.tensor([fit_generalised_pareto(row) for row in excess])
    spread = (1 + k) / math.sqrt(500)
    assert float(found.mean()) == pytest.approx(k, abs=4 * spread / math.sqrt(200) + 0.01)
    assert float(found.std()) == pytest.approx(spread, rel=0.25)


@pytest.mark.parametrize("shape", [0.25, 0.5, 1.0])
def test_weights_of_a_known_tail_index(shape):
    """p/q for exponential p and q: x ~ q of rate 1, w = exp((1 − rate)·x), P(w > t) = t^(−1/k) with k = 1 − rate."""
    generator = torch.Generator().manual_seed(1)
    x = torch.empty(20_000, dtype=torch.float64).exponential_(generator=generator)
    log_weights = shape * x
    assert pareto_k(log_weights) == pytest.approx(shape, abs=4 * (1 + shape) / math.sqrt(3 * math.sqrt(20_000)))
    assert pareto_k(log_weights - 5000) == pytest.approx(pareto_k(log_weights), abs=1e-6)
    with_zeros = torch.cat([log_weights, torch.full((100,), -math.inf)])
    assert pareto_k(with_zeros) == pytest.approx(pareto_k(log_weights), abs=0.05)


@pytest.mark.parametrize(
    "log_weights", [[], [0.0], [0.0] * 500, [0.0] * 40 + [-math.inf] * 460, [-math.inf] * 50, [math.nan] * 50]
)
def test_weights_without_a_tail_have_no_k(log_weights):
    assert math.isnan(pareto_k(torch.tensor(log_weights, dtype=torch.float64)))


def test_a_round_that_goes_well_is_not_complained_about():
    assert complaints(FINE) == {}
    assert complaints(FINE | {"target/pareto_k": math.nan, "z/log_z_se": math.nan}) == {}
    assert complaints(FINE | {"target/judge_se": 0.4, "target/judge_se_se": 0.1}) == {}  # of a feature called judge_se


@pytest.mark.parametrize(
    ("changed", "kind", "advice"),
    [
        ({"target/in_support": 0.0, "target/ess": 0.0, "z/log_z_se": math.nan}, "support", "easier constraint"),
        ({"target/ess": 1.4}, "ess", "1.4 effective completions"),
        ({"target/pareto_k": 0.95}, "pareto_k", "k 0.95"),
        ({"z/log_z_se": 1.0}, "log_z", "± 2.0"),
        ({"z/ess": 2.1}, "log_z", "2.1 effective samples of a context"),
        ({"target/judge": math.nan, "target/judge_se": math.nan}, "idle", "judge: None for every completion"),
    ],
)
def test_each_complaint_says_what_to_change(changed, kind, advice):
    (found,) = complaints(FINE | changed).items()
    assert found[0] == kind and advice in found[1] and "\n" not in found[1]


def test_each_kind_is_said_once_and_only_when_it_lasts():
    watch, few, wide = Watch(), FINE | {"target/ess": 1.0}, FINE | {"z/log_z_se": 2.0}
    assert [len(watch(row)) for row in (few, few, FINE, few, few, few, few, wide, wide, wide)] == [0] * 5 + [1] + [
        *(0, 0, 0, 1)
    ]
    assert [len(watch(few | {"z/log_z_se": 2.0})) for _ in range(5)] == [0] * 5


def test_run_says_once_that_nothing_satisfies_its_target_and_so_does_its_report(tiny_model, tmp_path, capsys):
    never = {"kind": "pointwise", "feature": {"kind": "regex", "name": "never", "pattern": "(?!)"}}
    run_dir = runs.train(tiny_model, tmp_path, target=[never], trainer={"rounds": 5})
    assert capsys.readouterr().err.count("no completion satisfies the target") == 1
    assert "no completion satisfies the target" in (run_dir / "report.html").read_text()
    assert all("target/pareto_k" in row for row in runs.rows(run_dir / "metrics.jsonl"))


def test_run_and_report_are_silent_where_all_is_well(tiny_model, tmp_path, capsys):
    soft = {"kind": "rlhf", "beta": 1.0, "feature": runs.LETTERS["feature"]}
    trainer = {"samples_per_context": 64}
    run_dir = runs.train(tiny_model, tmp_path, target=[soft], trainer=trainer)
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == ["engine:", "round", "round"]
    assert "class=warning" not in (run_dir / "report.html").read_text()
