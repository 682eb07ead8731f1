"""Targets a^κ·φ, and samples of another model than the base: λ, Z, what is measured, and the optimum of training."""

import math

import pytest
import torch

from fdpg_fast.contexts import Context
from fdpg_fast.experiments.enumerable import D_F, ExactTarget, Tabular, make_bed
from fdpg_fast.features import Completions, Feature
from fdpg_fast.measure import quasi_rejection
from fdpg_fast.measure.evaluate import evaluate
from fdpg_fast.partition import PartitionFunction
from fdpg_fast.rollouts import Rollouts
from fdpg_fast.scoring import Scores
from fdpg_fast.targets import Target, Term, base_power, distributional, pointwise
from support.exact_bed import exact_divergence, train

BED = make_bed()
LOG_A = Tabular(BED, 0).logprob(BED)[1].detach()
LOG_Q = Tabular(BED, 7).logprob(BED)[1].detach()
MEETS = BED.contains(2).double()
WORD, LONG = (Feature(name, lambda completions: [0.0] * len(completions)) for name in ("word", "long"))
SAMPLES = 4096


def draws(log_q, seed, count=SAMPLES):
    return torch.multinomial(log_q.exp(), count, replacement=True, generator=torch.Generator().manual_seed(seed))


def hard_power(kappa):
    return pointwise(WORD) * base_power(kappa)


@pytest.mark.parametrize("kappa", [0.0, 0.5, 1.0, 2.0])
def test_log_p_is_kappa_log_a_where_the_other_terms_allow_it(kappa):
    score = LOG_A + hard_power(kappa).log_phi(MEETS[:, None], LOG_A)
    expected = LOG_A.exp() ** kappa * MEETS
    torch.testing.assert_close(score.exp(), expected, rtol=1e-12, atol=1e-15)
    p = ExactTarget(score).p
    if kappa == 0:
        torch.testing.assert_close(p, MEETS / MEETS.sum())


@pytest.mark.parametrize("kappa", [0.0, 2.0])
def test_training_ends_there(kappa):
    target = ExactTarget(LOG_A + base_power(kappa).log_phi(torch.zeros(len(LOG_A), 0).double(), LOG_A))
    policy = Tabular(BED, 1)
    before = exact_divergence(BED, policy, target, "reverse_kl")
    train(BED, policy, target, "reverse_kl")
    after = exact_divergence(BED, policy, target, "reverse_kl")
    assert before > 0.3 and after < before / 50
    if kappa == 0:  # all texts are as likely
        pi = policy.logprob(BED)[1].detach().exp()
        assert float((pi * len(pi) - 1).abs().mean()) < 0.1


def test_a_term_of_the_user_may_read_log_a():
    even = Target((Term((WORD,), lambda values, log_a: torch.where(values[:, 0] > 0, -log_a, -3.0), False, True),))
    p = ExactTarget(LOG_A + even.log_phi(MEETS[:, None], LOG_A)).p
    assert float(p[MEETS > 0].std()) < 1e-12
    with pytest.raises(Exception, match="reads log a"):
        even.log_phi(MEETS[:, None])


def exact_exponent(kappa, moment):
    low, high = -20.0, 20.0
    for _ in range(80):
        middle = (low + high) / 2
        p = (kappa * LOG_A + middle * MEETS).softmax(0)
        low, high = (middle, high) if float(p @ MEETS) < moment else (low, middle)
    return low


@pytest.mark.parametrize("kappa", [1.0, 0.5])
def test_lambda_is_right_from_samples_of_another_model(kappa):
    """(λ − exact)/stated error over 60 fits: mean 0 ± 1/√60, root mean square 1 ± 0.09; without a/q it is far off."""
    target, exact = base_power(kappa) * distributional([WORD], [0.8]), exact_exponent(kappa, 0.8)
    errors, ignored = [], []
    for seed in range(60):
        picks = draws(LOG_Q, seed)
        one = torch.zeros(SAMPLES, dtype=torch.long)
        sample = MEETS[picks, None], one, LOG_A[picks]
        fitted, wrong = target.fit(*sample, LOG_Q[picks]), target.fit(*sample)
        errors.append((fitted.exponents[0] - exact) / fitted.exponent_errors[0])
        ignored.append((wrong.exponents[0] - exact) / wrong.exponent_errors[0])
    errors = torch.tensor(errors)
    assert abs(float(errors.mean())) < 3.5 / math.sqrt(60) + 0.1
    assert 0.7 < float(errors.square().mean().sqrt()) < 1.45
    assert abs(sum(ignored) / 60) > 3


@pytest.mark.parametrize("kappa", [0.0, 0.5])
def test_what_is_measured_is_of_that_target(kappa):
    """From samples of a policy that is neither base nor target: log Z, E_p, KL(p‖a), divergences, rejection."""
    target, picks = hard_power(kappa), draws(LOG_Q, 0, 40_000)
    exact = ExactTarget(LOG_A + target.log_phi(MEETS[:, None], LOG_A))
    length = BED.length[picks]
    rollouts = Rollouts(
        contexts=(Context(0, "", (0,)),),
        context_index=torch.zeros(len(picks), dtype=torch.long),
        token_ids=torch.zeros(int(length.sum()), dtype=torch.long),
        cu_seqlens=torch.nn.functional.pad(length.cumsum(0), (1, 0)).int(),
        behavior_logprob=torch.zeros(int(length.sum())),
        finished=torch.ones(len(picks), dtype=torch.bool),
    )
    texts = Completions(["a"] * len(picks), [""] * len(picks), [], [])
    scores = Scores(texts, MEETS[picks, None], LOG_Q[picks], LOG_A[picks], exact.log_score[picks])
    found = evaluate(rollouts, scores, target, "jensen_shannon").metrics
    gain = torch.where(exact.p > 0, exact.p * (exact.p.log() - LOG_A), 0.0).sum()
    expected = {"log_z": exact.log_z, "kl_of_target_to_base": gain, "feature_of_target/word": 1.0}
    names = ("jensen_shannon", "total_variation", "forward_kl")
    expected |= {f"divergence/{name}": D_F[name](LOG_Q.exp(), exact.p) for name in names}
    for name, value in expected.items():
        assert abs(found[name].value - float(value)) < 4 * found[name].standard_error + 1e-9, name

    partition = PartitionFunction(1)
    partition.update(scores.log_score - scores.behavior_logprob, rollouts.context_index)
    summary = partition.summary()
    assert abs(summary["log_z"] - float(exact.log_z)) < 4 * summary["log_z_se"]
    (quality,) = quasi_rejection.estimate(scores.log_score - scores.behavior_logprob, rollouts.context_index, [1.0])
    accepted = float(torch.minimum(exact.p, LOG_Q.exp()).sum())
    assert abs(quality.acceptance.value - accepted) < 4 * quality.acceptance.standard_error
