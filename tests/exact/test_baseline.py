"""A baseline leaves the expected gradient where it is and lowers its variance; both computed exactly."""

import itertools

import pytest
import torch

from fdpg_fast.experiments.enumerable import Tabular, hard_target, make_bed, soft_target
from fdpg_kernels import sequence_weights
from support.exact_bed import HARD, NAMES, divergence, exact_gradient, gradient_per_text, leave_one_out, packed_loss

BED = make_bed()
BASE, POLICY, OTHER = (Tabular(BED, seed) for seed in (0, 1, 7))
TARGETS = {"soft": soft_target(BED, BASE), "hard": hard_target(BED, BASE)}
CASES = [(name, "soft") for name in NAMES] + [(name, "hard") for name in HARD]


def rewards(bed, behavior, target, name, log_z=None):
    """Pseudo-reward of every text, [B], as known before the learner's forward: from the sampler's own log-probs."""
    packed = torch.nn.functional.pad(bed.length.cumsum(0), (1, 0))
    z = target.log_z if log_z is None else log_z
    weights = sequence_weights(behavior, behavior, packed, target.log_score, z, divergence=divergence(name))
    return weights.pseudo_reward


def total_variance(per_text, q):
    return float(q @ ((per_text - q @ per_text) ** 2).sum(1))


@pytest.mark.parametrize("baseline", [0.7, -3.0])
@pytest.mark.parametrize("policy", [POLICY, OTHER], ids=["on", "off"])
@pytest.mark.parametrize(("name", "target"), CASES)
def test_a_constant_leaves_the_expectation(name, target, policy, baseline):
    with torch.no_grad():
        behavior, log_q = POLICY.logprob(BED)
    per_text = gradient_per_text(BED, policy, behavior, TARGETS[target], name, baseline=baseline)
    exact = exact_gradient(BED, policy, TARGETS[target], name)
    torch.testing.assert_close(log_q.exp() @ per_text, exact, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("on_policy", [True, False], ids=["on", "off"])
def test_leave_one_out_leaves_the_expectation(name, on_policy):
    # every batch of three texts out of seven, with its probability
    bed = make_bed(vocab=3, max_length=2)
    base, policy, other = (Tabular(bed, seed) for seed in (0, 1, 2))
    target = soft_target(bed, base) if name not in HARD else hard_target(bed, base)
    with torch.no_grad():
        behavior, log_q = (policy if on_policy else other).logprob(bed)
    reward, expected = rewards(bed, behavior, target, name), 0.0
    for batch in itertools.product(range(len(bed.length)), repeat=3):
        picks = torch.tensor(batch)
        baseline = leave_one_out(reward[picks])
        loss = packed_loss(bed, policy, picks, behavior, target, name, baseline=baseline).loss
        expected = expected + log_q[picks].sum().exp() * policy.flat_grad(loss)
    exact = exact_gradient(bed, policy, target, name)
    torch.testing.assert_close(expected, exact, rtol=1e-8, atol=1e-8)


def test_a_mean_that_includes_its_own_sample_is_biased():
    # the same enumeration notices: it shrinks the gradient by (S−1)/S
    bed = make_bed(vocab=3, max_length=2)
    base, policy = Tabular(bed, 0), Tabular(bed, 1)
    target = soft_target(bed, base)
    with torch.no_grad():
        behavior, log_q = policy.logprob(bed)
    reward, expected = rewards(bed, behavior, target, "reverse_kl"), 0.0
    for batch in itertools.product(range(len(bed.length)), repeat=2):
        picks = torch.tensor(batch)
        options = dict(baseline=reward[picks].mean())
        loss = packed_loss(bed, policy, picks, behavior, target, "reverse_kl", **options).loss
        expected = expected + log_q[picks].sum().exp() * policy.flat_grad(loss)
    torch.testing.assert_close(expected, exact_gradient(bed, policy, target, "reverse_kl") / 2)


def variances(name, target, baselines, **options):
    with torch.no_grad():
        behavior, log_q = POLICY.logprob(BED)
    q = log_q.exp()
    reward = rewards(BED, behavior, target, name, options.get("log_z"))
    values = [float(q @ reward) if b == "mean" else b for b in baselines]
    per_text = (gradient_per_text(BED, POLICY, behavior, target, name, baseline=b, **options) for b in values)
    return [total_variance(x, q) for x in per_text]


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_forward_kl_has_its_baseline_built_in(target):
    # DPG's reward p/π wants the baseline 1 = E[p/π]; f'(1) = 0 has subtracted it, −1 adds it again
    plain, raw, mean = variances("forward_kl", target, [0.0, -1.0, "mean"])
    assert plain < 0.97 * raw
    assert mean == pytest.approx(plain, rel=1e-9)  # on-policy with the true Z its mean is zero


# not χ²(p‖π): its variance is made by a few texts with t^-2 > 1000, next to which no constant counts
@pytest.mark.parametrize("name", ["forward_kl", "squared_hellinger", "alpha:0.3"])
def test_the_mean_baseline_absorbs_a_wrong_z(name):
    # Z four times too large: −f' = c − c·t^κ no longer averages to what it should, the mean takes that back
    target = TARGETS["soft"]
    without, mean = variances(name, target, [0.0, "mean"], log_z=target.log_z + 1.4)
    assert mean < 0.7 * without


@pytest.mark.parametrize("name", ["reverse_kl", "jensen_shannon", "total_variation", "triangular", "jeffreys"])
def test_the_mean_baseline_lowers_the_variance(name):
    without, mean = variances(name, TARGETS["hard" if name in HARD else "soft"], [0.0, "mean"])
    assert mean < 0.97 * without
