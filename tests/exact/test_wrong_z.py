"""What an error in log Z does: nothing to reverse KL, a scale to the power laws, a different optimum to the rest."""

import math

import pytest
import torch

from fdpg_fast.experiments.enumerable import Tabular, hard_target, make_bed, soft_target
from fdpg_kernels import sequence_weights
from support.exact_bed import D_F, divergence, exact_divergence, gradient_per_text, leave_one_out, packed_loss

BED = make_bed()
BASE, POLICY = Tabular(BED, 0), Tabular(BED, 1)
SOFT, HARD = soft_target(BED, BASE), hard_target(BED, BASE)
ERRORS = [-1.5, 0.7, 2.0]  # of log Z
# f' = c·(t^κ − 1): t grows by the error's exponential, f' by its κ-th power
POWER = {"forward_kl": -1, "pearson_chi2": -2, "squared_hellinger": -0.5, "alpha:0.3": -0.7, "neyman_chi2": 1}


def sampled_gradient(name, target, error):
    """From 256 texts on-policy with a leave-one-out baseline, everything computed with log Z + error."""
    with torch.no_grad():
        behavior, log_q = POLICY.logprob(BED)
    picks = torch.multinomial(log_q.exp(), 256, replacement=True, generator=torch.Generator().manual_seed(0))
    log_z = target.log_z + error
    ends = torch.nn.functional.pad(BED.length.cumsum(0), (1, 0))
    known = sequence_weights(behavior, behavior, ends, target.log_score, log_z, divergence=divergence(name))
    options = dict(log_z=log_z, baseline=leave_one_out(known.pseudo_reward[picks]))
    return POLICY.flat_grad(packed_loss(BED, POLICY, picks, behavior, target, name, **options).loss)


@pytest.mark.parametrize("error", ERRORS)
def test_reverse_kl_does_not_notice(error):
    right, wrong = sampled_gradient("reverse_kl", SOFT, 0.0), sampled_gradient("reverse_kl", SOFT, error)
    torch.testing.assert_close(wrong, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", POWER)
def test_a_power_law_is_rescaled(name, error):
    target = SOFT if name == "neyman_chi2" else HARD
    right, wrong = sampled_gradient(name, target, 0.0), sampled_gradient(name, target, error)
    torch.testing.assert_close(wrong, right * math.exp(POWER[name] * error), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", ["jensen_shannon", "total_variation", "triangular"])
def test_the_others_point_elsewhere(name, error):
    right, wrong = sampled_gradient(name, HARD, 0.0), sampled_gradient(name, HARD, error)
    # modest, and yet a million times what rounding does to the power laws
    assert torch.cosine_similarity(wrong, right, dim=0) < 0.998


def expected_gradient(policy, name, target, error):
    with torch.no_grad():
        behavior, log_q = policy.logprob(BED)
    options = dict(log_z=target.log_z + error)
    return log_q.exp() @ gradient_per_text(BED, policy, behavior, target, name, **options)


def optimum(name, target, seed=1):
    """The best policy of a family that cannot represent p: one hidden number a prefix."""
    policy = Tabular(BED, seed, width=1)
    steps = dict(max_iter=3000, tolerance_grad=1e-11, tolerance_change=0.0, line_search_fn="strong_wolfe")
    optimiser = torch.optim.LBFGS(policy.parameters(), **steps)

    def closure():
        optimiser.zero_grad()
        value = D_F[name](policy.logprob(BED)[1].exp(), target.p)
        value.backward()
        return value

    optimiser.step(closure)
    return policy


MOVES = {"jensen_shannon": True, "triangular": True} | dict.fromkeys(
    ("reverse_kl", "forward_kl", "squared_hellinger", "alpha:0.3"), False
)


@pytest.mark.parametrize(("name", "moves"), MOVES.items())
def test_the_optimum_of_a_policy_that_cannot_be_p(name, moves):
    # one that can is stationary at p whatever Z is, since t is constant there
    policy = optimum(name, SOFT)
    assert exact_divergence(BED, policy, SOFT, name) > 1e-3
    assert expected_gradient(policy, name, SOFT, 0.0).norm() < 1e-6
    drift = expected_gradient(policy, name, SOFT, 0.7).norm()
    assert drift > 1e-3 if moves else drift < 1e-6


def test_total_variation_stops_short_of_the_target():
    # Z twice too large: any π ≥ p/2 has t ≥ 1 everywhere, hence one reward for all texts and no gradient
    halfway = Tabular(BED, 0)
    wanted = (SOFT.p + BASE.logprob(BED)[1].detach().exp()) / 2
    set_distribution(halfway, wanted)
    torch.testing.assert_close(halfway.logprob(BED)[1].exp(), wanted)
    assert exact_divergence(BED, halfway, SOFT, "total_variation") > 0.1
    log_2 = torch.tensor(2.0).double().log()
    assert expected_gradient(halfway, "total_variation", SOFT, log_2 + 1e-9).norm() < 1e-12
    assert expected_gradient(halfway, "total_variation", SOFT, 0.0).norm() > 1e-2


def set_distribution(policy, p):
    """Make a tabular policy equal to p: its next-token probabilities are ratios of prefix masses."""
    mass = torch.zeros(len(BED.prefixes), BED.vocab, dtype=torch.float64)
    mass.index_put_((BED.prefix, BED.tokens), p[BED.text_index], accumulate=True)
    with torch.no_grad():
        policy.head.zero_()[:, : BED.vocab] = torch.eye(BED.vocab)
        policy.table.zero_()[:, : BED.vocab] = mass.log()
