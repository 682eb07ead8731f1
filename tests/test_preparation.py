"""λ of simulated features on 1 to 10,000 prompts: as far from the true one as it says, checked, or refused."""

import logging
import math
import re

import pytest
import torch

from fdpg_fast.errors import UserError
from fdpg_fast.preparation import fit_moments
from fdpg_fast.targets import distributional
from support import runs
from support.small_samples import F64, FIT_SAMPLES, Prompts, fits, named, rates


@pytest.mark.parametrize("prompts", [1, 3, 12, 32, 512, 1024, 10_000])
@pytest.mark.parametrize(("mean", "spread"), [(0.3, 0.0), (0.3, 1.5), (0.03, 0.0)])
def test_lambda_is_right_within_its_stated_error(prompts, mean, spread):
    """80 fits: the mean of (λ − true λ)/error is 0 ± 1/√80, its root mean square 1 (a χ² of 80 degrees: ± 0.08).

    With 8 prompts of 256 samples, as the rare feature needs, the error itself is uncertain by a quarter.
    """
    simulated = Prompts(rates(prompts, mean, spread))
    difference, stated = fits(simulated, 0.5, 80)
    errors = difference / stated
    assert len(errors) == 80
    assert abs(float(errors.mean())) < 3.5 / math.sqrt(80) + 0.1
    assert 0.7 < float(errors.square().mean().sqrt()) < 1.45
    assert simulated.drawn / 80 <= 3 * FIT_SAMPLES


@pytest.mark.parametrize("hard", [0.5, 0.25])
def test_lambda_of_a_hybrid_holds_under_its_hard_term(hard):
    """A prompt's samples that meet the hard term are what counts; some prompts never do."""
    hopeless = torch.arange(1000) % 5 == 0
    simulated = Prompts(rates(1000, 0.3), torch.full((1000,), hard, dtype=F64).masked_fill(hopeless, 1e-3))
    difference, stated = fits(simulated, 0.5, 60)
    errors = difference / stated
    assert len(errors) >= 58  # where nearly all prompts of a sample are hopeless the fit is refused
    assert abs(float(errors.mean())) < 3.5 / math.sqrt(60) + 0.1
    assert 0.7 < float(errors.square().mean().sqrt()) < 1.45


@pytest.mark.parametrize(
    ("prompts", "mean", "hard", "budget", "message"),
    [
        (1000, 0.3, None, 100, "8 or more in 8 of 8 contexts|effective samples out of 96, 1.* a context"),
        (1000, 0.3, 0.05, FIT_SAMPLES, "effective samples out of 2048, .* 16 a context, are needed"),
        (1000, 0.001, None, FIT_SAMPLES, "no λ gives|effective samples"),
        (1, 0.001, None, FIT_SAMPLES, "effective samples out of 2048|lies in"),
        (10_000, 0.3, 0.001, FIT_SAMPLES, "are of use"),
    ],
)
def test_what_cannot_be_fitted_is_refused_with_a_remedy(prompts, mean, hard, budget, message):
    simulated = Prompts(rates(prompts, mean), None if hard is None else torch.full((prompts,), hard, dtype=F64))
    with pytest.raises(UserError, match=f"^target: .*({message}).*raise target_fit_samples") as refused:
        simulated.fit(0.5, budget)
    assert "\n" not in str(refused.value)


def test_more_samples_are_the_remedy():
    simulated = Prompts(rates(1000, 0.3), torch.full((1000,), 0.05, dtype=F64))
    with pytest.raises(UserError, match="target_fit_samples"):
        simulated.fit(0.5)
    fitted = simulated.fit(0.5, 8 * FIT_SAMPLES)
    assert abs(fitted.exponents[0] - math.log(7 / 3)) < 4 * fitted.exponent_errors[0]


def test_a_second_sample_says_what_lambda_does(caplog):
    caplog.set_level(logging.INFO, "fdpg_fast")
    Prompts(rates(1000, 0.3)).fit(0.5)
    (line,) = (record.getMessage() for record in caplog.records)
    number = r"(-?[\d.]+ ± [\d.]+)"
    found = re.fullmatch(
        rf"target: λ of f = {number}, from 2,048 samples of the base in 64 of 1,000 contexts; "
        rf"on a second sample E_p\[f\] = {number} \(wanted 0.5\)",
        line,
    )
    for text, true in zip(found.groups(), (math.log(7 / 3), 0.5), strict=True):
        value, error = map(float, text.split(" ± "))
        assert abs(value - true) < 2 * error


def test_a_lambda_that_does_not_hold_on_the_second_sample_is_complained_about(caplog):
    """As where the tail of a feature is not in the first one."""
    simulated = Prompts(rates(1000, 0.3))

    def shifting(indices, each, purpose):
        if purpose == "checking λ":
            simulated.rates = rates(1000, 0.6)
        return simulated.draw(indices, each, purpose)

    fit_moments(distributional([named("f")], [0.5]), shifting, range(1000), FIT_SAMPLES)
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert warning.startswith("target: λ of f does not hold on the second sample; raise target_fit_samples")


LETTERS = {"kind": "distributional", "features": [runs.LETTERS["feature"]], "moments": [0.9]}


def test_run_fits_lambda_on_many_prompts_and_says_so(tiny_model, tmp_path, capsys):
    contexts = runs.write_contexts(tmp_path, *(f"def f{i}(" for i in range(1000)))
    trained = runs.train(
        tiny_model, tmp_path, target=[LETTERS], contexts={"train": str(contexts)}, target_fit_samples=512
    )
    said = capsys.readouterr().err
    assert all("?" in line for line in said.splitlines() if line.startswith("round"))  # 4 samples of a prompt, for Z
    assert "from 512 samples of the base in 16 of 1,000 contexts; on a second sample E_p[letters] = 0." in said
    exponent = runs.rows(trained / "evaluation.jsonl")[-1]["metrics"]["exponent/letters"]
    assert 0 < exponent["standard_error"] < abs(exponent["value"]) + 1


def soft(beta, pattern):
    return {"kind": "rlhf", "beta": beta, "feature": {"kind": "regex", "name": "f", "pattern": pattern}}


@pytest.mark.parametrize(
    ("target", "log_z", "warnings"),
    [
        (soft(2.0, "[a-zA-Z]"), r"[\d.]+ ± [\d.]+", []),
        (soft(0.1, "q"), r"[-\d.]+ ± [\d.]+\?", [r"log Z: \?: fewer than"]),
        ({**runs.LETTERS, "feature": {"kind": "regex", "pattern": "(?!)"}}, "-∞", ["in 3 of 3 contexts none of these"]),
    ],
)
def test_the_oracle_says_how_well_it_knows_z(target, log_z, warnings, tiny_model, tmp_path, capsys):
    runs.train(tiny_model, tmp_path, target=[target], partition={"kind": "oracle"})
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("oracle: ")]
    patterns = [rf"log Z = {log_z} on average, from 64 samples of the base for each context$", *warnings]
    assert len(lines) == len(patterns)
    assert all(re.match(f"oracle: {pattern}", line) for pattern, line in zip(patterns, lines, strict=True))
