"""The configs of examples/papers against the papers' own formulas, on texts that can be enumerated.

Gradients and optima of the papers are written down here as the papers have them, and held against what a run with the
divergence, Z, baseline, caps and ratio of the config would do.
"""

import itertools
import math

import pytest
import torch

from fdpg_fast.config.load import load_config
from fdpg_fast.experiments.enumerable import ExactTarget, Tabular, Transformer, make_bed, uniform_sampler
from fdpg_fast.imports import import_object
from fdpg_fast.measure.quasi_rejection import acceptance_probability
from fdpg_fast.partition import Baseline, PartitionFunction, pseudo_rewards
from fdpg_fast.targets import base_power
from fdpg_kernels import divergences
from support import runs
from support.exact_bed import packed_loss
from support.examples import EXAMPLES, load_example

PAPERS = sorted(EXAMPLES.glob("papers/*.yaml"))
BED = make_bed()
BASE = Tabular(BED, 0)
LOG_A = BASE.logprob(BED)[1].detach()
MEETS = BED.contains(2)
REWARD = BED.sum_tokens((BED.tokens == 2).double())
HARD = ExactTarget(LOG_A.masked_fill(~MEETS, -torch.inf))


def policy():
    return Transformer(BED, 1)


def known(model):
    """Token log-probs [T] and log π [B] of a policy, as a sampler reports them."""
    with torch.no_grad():
        return model.logprob(BED)


def draw(log_q, count, seed=0):
    return torch.multinomial(log_q.exp(), count, replacement=True, generator=torch.Generator().manual_seed(seed))


def of_paper(model, picks, coefficients):
    """∇ of the mean of coefficient·log π over texts, the coefficients being constants."""
    return model.flat_grad((coefficients * model.logprob(BED)[1][picks]).mean())


def config(name):
    return load_config(EXAMPLES / "papers" / f"{name}.yaml")


def ours(name, model, picks, target, sampler=None, log_z=None):
    """The gradient of a round of one context by the settings of a config; Z by its `partition.kind` unless given."""
    settings = config(name)
    divergence = divergences.get(
        import_object(settings.divergence) if ".py:" in settings.divergence else settings.divergence
    )
    behavior, log_q = sampler or known(model)
    context = torch.zeros(len(picks), dtype=torch.long)
    partition = PartitionFunction(1, kind=settings.partition.kind)
    partition.update(target.log_score[picks] - log_q[picks], context)
    log_z = partition.log_z(context) if log_z is None else log_z.expand(len(picks))
    loss = settings.loss
    rewards = pseudo_rewards(log_q[picks], target.log_score[picks], log_z, divergence, loss.reward_cap)
    options = {"log_z": log_z, "baseline": Baseline(loss.baseline)(rewards, context), "ratio": loss.ratio}
    options |= {"ratio_cap": loss.ratio_cap, "reward_cap": loss.reward_cap}
    return model.flat_grad(packed_loss(BED, model, picks, behavior, target, divergence, **options).loss)


def in_expectation(model, target, divergence):
    """The expected gradient of a run: every text once, with its probability."""
    every = torch.arange(len(LOG_A))
    return model.flat_grad(packed_loss(BED, model, every, uniform_sampler(BED), target, divergence).loss)


def near(found, expected):
    assert float(expected.norm()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_every_config_would_run(path, monkeypatch, capsys):
    monkeypatch.chdir(EXAMPLES.parent)
    assert runs.call("train", path, "--dry-run") == 0
    assert "nothing was done yet" in capsys.readouterr().out


def test_the_index_names_every_config_and_every_test():
    index = (EXAMPLES.parent / "docs/papers.md").read_text()
    for path in PAPERS:
        assert f"../examples/papers/{path.name}" in index
    for name in (name for name in globals() if name.startswith("test_") and name.endswith("_paper")):
        assert name in index


PAPER_F_PRIME = {  # of the f in table 1 of 2302.08215, with its value at infinity
    "forward_kl": (lambda t: -1 / t, 0.0),
    "total_variation": (lambda t: 0.5 * (t - 1).sign(), 0.5),
    "jensen_shannon": (lambda t: (2 * t / (t + 1)).log(), math.log(2)),
}


@pytest.mark.parametrize("name", PAPER_F_PRIME)
def test_f_dpg_paper(name):
    """Theorem 1: ∇D_f(π‖p) = E_π[f'(π/p)·∇log π]."""
    model, (f_prime, at_infinity) = policy(), PAPER_F_PRIME[name]
    log_pi = known(model)[1]
    coefficients = torch.where(MEETS, f_prime(log_pi.exp() / HARD.p), at_infinity)
    theorem = model.flat_grad((log_pi.exp() * coefficients * model.logprob(BED)[1]).sum())
    near(in_expectation(model, HARD, name), theorem)


@pytest.mark.parametrize("count", [4, 256])
def test_alpha_dpg_paper(count):
    """Reward min((p/π)^(1−α) − 1, 10), less the mean of the prompt's other samples; p = P/Z of the same samples."""
    model, alpha = policy(), 0.25
    log_pi = known(model)[1]
    picks = draw(log_pi, count, seed=3)
    weights = (HARD.log_score - log_pi)[picks].exp()
    rewards = ((weights / weights.mean()) ** (1 - alpha) - 1).clamp(max=10.0)
    assert float(rewards.max()) <= count ** (1 - alpha) - 1 + 1e-9  # so of 4 samples none is clipped
    others = (rewards.sum() - rewards) / (count - 1)
    near(ours("alpha_dpg", model, picks, HARD) * (1 - alpha), of_paper(model, picks, others - rewards))


def test_the_clip_of_alpha_dpg_paper():
    model, alpha = policy(), 0.25
    log_pi = known(model)[1]
    picks, log_z = torch.arange(len(LOG_A)), HARD.log_z - 4  # as from a wrong Z
    rewards = (((HARD.log_score - log_pi - log_z).exp()) ** (1 - alpha) - 1).clamp(max=10.0)
    assert 0 < int((rewards == 10).sum()) < len(rewards)
    others = (rewards.sum() - rewards) / (len(picks) - 1)
    found = ours("alpha_dpg", model, picks, HARD, log_z=log_z) * (1 - alpha)
    torch.testing.assert_close(found, of_paper(model, picks, others - rewards), rtol=1e-5, atol=1e-7)


def soft(beta):
    return ExactTarget(LOG_A + REWARD / beta)


def test_trajectory_balance_paper():
    """(log Z + log π − log P)² at a given Z, from any sampler; VarGrad's Z from the batch, on-policy."""
    settings = config("trajectory_balance")
    target = soft(settings.target[0].beta)
    model, sampler = policy(), known(Tabular(BED, 7))
    picks = draw(sampler[1], 64)
    residual = model.logprob(BED)[1][picks] - target.log_score[picks] + target.log_z
    balance = model.flat_grad(residual.square().mean())
    loss = packed_loss(BED, model, picks, sampler[0], target, settings.divergence, ratio=settings.loss.ratio).loss
    near(2 * model.flat_grad(loss), balance)

    picks = draw(known(model)[1], 16)
    residual = model.logprob(BED)[1][picks] - target.log_score[picks]
    vargrad = model.flat_grad((residual - residual.mean()).square().mean())
    near(2 * 15 / 16 * ours("trajectory_balance", model, picks, target), vargrad)


def test_flowrl_paper():
    """w·(log Z + log π − β·r − log reference)², w = min(π/q, 1 + ε) constant; its residual is 0 at the target."""
    settings, beta = config("flowrl"), 15.0
    target = soft(settings.target[0].beta)
    assert settings.target[0].beta == pytest.approx(1 / beta, rel=1e-3)
    target = soft(1 / beta)
    torch.testing.assert_close(target.log_z + target.p.log(), beta * REWARD + LOG_A)
    model, sampler = policy(), known(Tabular(BED, 7))
    picks = draw(sampler[1], 64)
    log_pi = model.logprob(BED)[1][picks]
    residual = target.log_z + log_pi - beta * REWARD[picks] - LOG_A[picks]
    weight = (log_pi - sampler[1][picks]).detach().exp().clamp(max=1.2)
    assert 0 < int((weight == 1.2).sum()) < 64
    squared = model.flat_grad((weight * residual.square()).mean())
    options = {"ratio": settings.loss.ratio, "ratio_cap": settings.loss.ratio_cap}
    loss = packed_loss(BED, model, picks, sampler[0], target, settings.divergence, **options).loss
    near(2 * model.flat_grad(loss), squared)

    milder = soft(1.0)  # where their residual, divided by the length, is 0 everywhere
    divided = (BED.length * (REWARD - milder.log_z) + LOG_A).softmax(0)
    assert float((divided - milder.p).abs().sum()) > 0.1  # another distribution


def test_guard_paper():
    """DPG: −E_p[∇log π]; then what does not meet the constraint is thrown away: π·b/Σ, with B → 0."""
    model = policy()
    assert config("guard").divergence == "forward_kl"
    near(in_expectation(model, HARD, "forward_kl"), model.flat_grad(-(HARD.p * model.logprob(BED)[1]).sum()))
    pi = known(model)[1].exp()
    kept = pi * acceptance_probability(HARD.log_score - pi.log(), HARD.log_z, 1e-6)
    guaranteed = pi * MEETS / (pi * MEETS).sum()
    torch.testing.assert_close(kept / kept.sum(), guaranteed)


@pytest.mark.parametrize("seed", range(3))
def test_maxrl_paper(seed):
    """Σ r·∇log π/K − Σ ∇log π/N over N samples with K successes, ascending: the policy itself is the base."""
    model, settings = policy(), config("maxrl")
    assert settings.base.refresh_every == 1
    log_pi = known(model)[1]
    picks = draw(log_pi, 16, seed)
    success = MEETS[picks].double()
    assert 0 < float(success.sum()) < 16
    estimator = of_paper(model, picks, 16 * success / success.sum() - 1)
    near(ours("maxrl", model, picks, ExactTarget(log_pi.masked_fill(~MEETS, -torch.inf))), -estimator)


def test_maxrl_is_maximum_likelihood_paper():
    """In expectation it is ∇log of the success rate."""
    model = policy()
    log_pi = known(model)[1]
    target = ExactTarget(log_pi.masked_fill(~MEETS, -torch.inf))
    near(
        in_expectation(model, target, "forward_kl"), model.flat_grad(-(model.logprob(BED)[1].exp() * MEETS).sum().log())
    )


def test_power_paper():
    """KL-penalised RL with log a as the reward: E_π[log a] − β·KL(π‖a), κ = 1 + 1/β."""
    kappa = config("power").target[0].kappa
    beta, model = 1 / (kappa - 1), policy()
    log_pi = model.logprob(BED)[1]
    objective = (log_pi.exp() * (LOG_A - beta * (log_pi - LOG_A))).sum()
    expected = model.flat_grad(-objective)
    score = LOG_A + base_power(kappa).log_phi(LOG_A[:, None][:, :0], LOG_A)
    torch.testing.assert_close(ExactTarget(score).p, LOG_A.exp() ** kappa / (LOG_A.exp() ** kappa).sum())
    near(beta * in_expectation(model, ExactTarget(score), "reverse_kl"), expected)


def test_mara_paper():
    """π ∝ reference·exp(R/β) of their augmented reward R: even over what is good, the rest as ever."""
    mara = load_example("papers/mara")
    reward = MEETS.double()
    augmented = torch.where(MEETS, 1.0 + mara.BETA * (mara.ANCHOR - LOG_A), reward)
    expected = (LOG_A + augmented / mara.BETA).softmax(0)
    found = ExactTarget(LOG_A + mara.log_phi(reward[:, None], LOG_A)).p
    torch.testing.assert_close(found, expected)
    assert float(found[MEETS].std()) < 1e-12 < float(found[~MEETS].std())


@pytest.mark.parametrize("n", [2, 3])
def test_bond_paper(n, monkeypatch):
    """The law of the best of N draws, by enumerating all N-tuples, ties broken evenly; and Jeffreys as two KLs."""
    bond = load_example("papers/bond")
    monkeypatch.setattr(bond, "N", n)
    a = LOG_A.exp()
    below = torch.stack([a[own > REWARD].sum() for own in REWARD])
    up_to = torch.stack([a[own >= REWARD].sum() for own in REWARD])
    levels = range(int(REWARD.max()) + 1)
    mass = [float(a[level == REWARD].sum()) for level in levels]
    law = torch.zeros_like(a)
    for tuple_of_levels in itertools.product(levels, repeat=n):
        best = max(tuple_of_levels)
        law[best == REWARD] += math.prod(mass[level] for level in tuple_of_levels) / mass[best]
    law *= a  # within a level the winner is one of the base's own draws of it
    assert float(law.sum()) == pytest.approx(1)
    torch.testing.assert_close(a * bond.best_of(below, up_to), law)

    model, target = policy(), ExactTarget(law.log())
    pi = model.logprob(BED)[1]
    both = bond.BETA * (pi.exp() * (pi - law.log())).sum() - (1 - bond.BETA) * (law * pi).sum()
    near(in_expectation(model, target, bond.jeffreys), model.flat_grad(both))


def test_distillation_paper():
    """The sum over tokens of KL(student‖teacher) on prefixes of the student, its gradient through the sampling too."""
    assert (
        config("distillation").target[0].kappa == 1 and config("distillation").base.model != config("power").base.model
    )
    model, teacher = policy(), BASE
    token_pi = model.logprob(BED)[0]
    students, teachers = ((m.hidden() @ m.head.T).log_softmax(-1) for m in (model, teacher))
    starts = BED.length.cumsum(0) - BED.length
    reach = {}  # probability that the student comes to a prefix
    for start, length in zip(starts.tolist(), BED.length.tolist(), strict=True):
        for i in range(length):
            reach[int(BED.prefix[start + i])] = token_pi[start : start + i].sum().exp()
    at_prefix = (students.exp() * (students - teachers.detach())).sum(-1)
    expected = model.flat_grad(sum(reach[prefix] * at_prefix[prefix] for prefix in reach))
    target = ExactTarget(LOG_A + base_power(1.0).log_phi(LOG_A[:, None][:, :0], LOG_A))
    near(in_expectation(model, target, "reverse_kl"), expected)
