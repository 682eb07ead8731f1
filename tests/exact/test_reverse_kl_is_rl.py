"""Reverse KL to p ∝ a·exp(r/β) is RL with a KL penalty: the same gradient, up to 1/β (Korbak et al. 2022)."""

import pytest
import torch

from fdpg_fast.experiments.enumerable import Tabular, Transformer, make_bed, soft_target
from support.exact_bed import leave_one_out, packed_loss

BED = make_bed()
BASE = Tabular(BED, 0)
REWARD = BED.sum_tokens((BED.tokens == 2).double())


def reinforce(policy, picks, behavior, beta, baseline):
    """∇ of −E[r − β·log(π/a)] as any RL trainer would form it, with the importance ratio of its sampler."""
    log_pi = policy.logprob(BED)[1]
    log_a = BASE.logprob(BED)[1].detach()
    log_q = BED.sum_tokens(behavior)
    penalised = REWARD - beta * (log_pi.detach() - log_a)
    advantage = (log_pi.detach() - log_q).exp()[picks] * (penalised[picks] - baseline)
    return policy.flat_grad(-(advantage * log_pi[picks]).mean()), penalised


@pytest.mark.parametrize("on_policy", [True, False], ids=["on", "off"])
@pytest.mark.parametrize("policy", [Tabular(BED, 1), Transformer(BED, 1)], ids=["tabular", "transformer"])
@pytest.mark.parametrize("beta", [0.1, 0.7, 3.0])
def test_same_samples_same_baseline_same_gradient(beta, policy, on_policy):
    target = soft_target(BED, BASE, beta)
    with torch.no_grad():
        behavior, log_q = (policy if on_policy else Tabular(BED, 7)).logprob(BED)
    picks = torch.multinomial(log_q.exp(), 64, replacement=True, generator=torch.Generator().manual_seed(0))
    _, penalised = reinforce(policy, picks, behavior, beta, 0.0)
    baseline = leave_one_out(penalised[picks])
    rl, _ = reinforce(policy, picks, behavior, beta, baseline)

    # −f' = (r − β·log π/a)/β − log Z, so the baseline moves along
    ours = baseline / beta - target.log_z
    fdpg = policy.flat_grad(packed_loss(BED, policy, picks, behavior, target, "reverse_kl", baseline=ours).loss)
    assert torch.cosine_similarity(fdpg, rl, dim=0) > 0.9999
    torch.testing.assert_close(fdpg * beta, rl, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon", "total_variation"])
def test_no_other_divergence_is_that(name):
    policy, target = Tabular(BED, 1), soft_target(BED, BASE, 0.7)
    with torch.no_grad():
        behavior, log_q = policy.logprob(BED)
    picks = torch.multinomial(log_q.exp(), 64, replacement=True, generator=torch.Generator().manual_seed(0))
    _, penalised = reinforce(policy, picks, behavior, 0.7, 0.0)
    baseline = leave_one_out(penalised[picks])
    rl, _ = reinforce(policy, picks, behavior, 0.7, baseline)
    fdpg = policy.flat_grad(packed_loss(BED, policy, picks, behavior, target, name).loss)
    assert torch.cosine_similarity(fdpg, rl, dim=0) < 0.99
