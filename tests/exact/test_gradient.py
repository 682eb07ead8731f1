"""The f-DPG gradient is ∇D_f: in expectation, by enumerating every text, and from samples."""

import pytest
import torch

from fdpg_fast.experiments.enumerable import Tabular, Transformer, hard_target, make_bed, soft_target, uniform_sampler
from support.exact_bed import HARD, NAMES, exact_gradient, gradient_per_text, packed_loss

BED = make_bed()
BASE = Tabular(BED, 0)
TARGETS = {"soft": soft_target(BED, BASE), "hard": hard_target(BED, BASE)}
POLICIES = {"tabular": Tabular(BED, 1), "transformer": Transformer(BED, 1)}
CASES = [(name, "soft") for name in NAMES] + [(name, "hard") for name in HARD]
SAMPLES = 16384


def sampler(policy, on_policy):
    """Token log-probs [T] and text probabilities [B] of q: π itself, or a policy of its own."""
    with torch.no_grad():
        tokens, texts = (policy if on_policy else Tabular(BED, 7)).logprob(BED)
    return tokens, texts.exp()


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
@pytest.mark.parametrize("on_policy", [True, False], ids=["on", "off"])
@pytest.mark.parametrize(("name", "target"), CASES)
def test_the_expected_gradient_is_exact(name, target, on_policy, policy):
    behavior, q = sampler(policy, on_policy)
    expected = q @ gradient_per_text(BED, policy, behavior, TARGETS[target], name)
    torch.testing.assert_close(expected, exact_gradient(BED, policy, TARGETS[target], name), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
@pytest.mark.parametrize(("name", "target"), CASES)
def test_every_text_once_is_the_expectation_under_a_uniform_sampler(name, target, policy):
    # one batch, no sampling: the mean over it is E_q with q = 1/B, spread over the tokens of each text
    every = torch.randperm(len(BED.length))
    loss = packed_loss(BED, policy, every, uniform_sampler(BED), TARGETS[target], name, baseline=0.3).loss
    exact = exact_gradient(BED, policy, TARGETS[target], name)
    torch.testing.assert_close(policy.flat_grad(loss), exact, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon"])
def test_without_the_ratio_the_gradient_is_the_more_wrong_the_older_the_sampler(name):
    policy, target, samplers = Tabular(BED, 1), TARGETS["soft"], []
    optimiser = torch.optim.Adam(policy.parameters(), lr=0.05)
    for _ in range(5):
        samplers.append(sampler(policy, True))
        exact = exact_gradient(BED, policy, target, name)
        torch.nn.utils.vector_to_parameters(exact, gradients := [p.clone() for p in policy.parameters()])
        for parameter, gradient in zip(policy.parameters(), gradients, strict=True):
            parameter.grad = gradient.detach()
        optimiser.step()
    samplers.append(sampler(policy, True))

    exact = exact_gradient(BED, policy, target, name)

    def error(rounds_old, ratio):
        behavior, q = samplers[-1 - rounds_old]
        expected = q @ gradient_per_text(BED, policy, behavior, target, name, ratio=ratio)
        return float((expected - exact).norm() / exact.norm())

    assert all(error(rounds_old, "sequence") < 1e-8 for rounds_old in (0, 1, 4))
    assert error(0, "none") < 1e-8
    assert 0.01 < error(1, "none") < error(4, "none") / 2


class Sampled:
    """A gradient from SAMPLES texts of q, and how far it lies from `exact` in units of its exact covariance."""

    def __init__(self, policy, target, name, on_policy, exact, seed=0, **options):
        behavior, q = sampler(policy, on_policy)
        picks = torch.multinomial(q, SAMPLES, replacement=True, generator=torch.Generator().manual_seed(seed))
        estimate = policy.flat_grad(packed_loss(BED, policy, picks, behavior, target, name, **options).loss)
        per_text = gradient_per_text(BED, policy, behavior, target, name, **options)
        centred = (per_text - q @ per_text) * (q / SAMPLES).sqrt()[:, None]  # centredᵀ·centred is the covariance
        error, deviation = estimate - exact, centred.norm(dim=0)
        self.max_z = float((error / deviation).abs().max())
        _, scale, axes = torch.linalg.svd(centred, full_matrices=False)
        self.chi2 = float(((axes[:10] @ error / scale[:10]) ** 2).sum())  # along the ten widest axes


# |z| > 5 has p = 6e-7 a coordinate, of which there are 264 (tabular); χ² with 10 degrees exceeds 42 with p = 7e-6
MAX_Z, MAX_CHI2 = 5.0, 42.0


@pytest.mark.parametrize("on_policy", [True, False], ids=["on", "off"])
@pytest.mark.parametrize(("name", "target"), CASES)
def test_a_sampled_gradient_lies_within_its_confidence_region(name, target, on_policy):
    policy, target = POLICIES["tabular"], TARGETS[target]
    got = Sampled(policy, target, name, on_policy, exact_gradient(BED, policy, target, name))
    assert got.max_z < MAX_Z and got.chi2 < MAX_CHI2


@pytest.mark.parametrize("name", NAMES)
def test_the_region_excludes_a_gradient_without_its_ratio(name):
    policy, target = POLICIES["tabular"], TARGETS["soft"]
    exact = exact_gradient(BED, policy, target, name)
    got = Sampled(policy, target, name, False, exact, ratio="none")
    assert got.max_z > 2 * MAX_Z and got.chi2 > 2 * MAX_CHI2


@pytest.mark.parametrize("name", HARD)
def test_the_region_excludes_other_divergences(name):
    policy, target = POLICIES["tabular"], TARGETS["hard"]
    exact = exact_gradient(BED, policy, target, name)
    for other in HARD:
        if other != name:
            assert Sampled(policy, target, other, True, exact).chi2 > MAX_CHI2, other
