"""Z of each context, its standard error, the baselines, and the pseudo-rewards that come out of them."""

import itertools
import math

import pytest
import torch

from fdpg_fast.contexts import Context
from fdpg_fast.partition import Baseline, Estimates, PartitionFunction, pseudo_rewards
from fdpg_fast.rollouts import pack
from fdpg_fast.scoring import Scores
from fdpg_kernels import divergences

F64 = torch.float64
INF = math.inf


def tensor(*values):
    return torch.tensor(values, dtype=F64)


def random_updates(rounds=5, contexts=4, samples=12, seed=0):
    """(log P/q, context) of several rounds; a third of the samples miss the target, context 0 always does."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(rounds):
        owner = torch.randint(contexts, (samples,), generator=generator)
        log_weights = 3 * torch.randn(samples, generator=generator, dtype=F64)
        log_weights[torch.rand(samples, generator=generator) < 0.3] = -INF
        log_weights[owner == 0] = -INF
        yield log_weights, owner


# --- Z ---


@pytest.mark.parametrize("per_context", [True, False])
def test_running_z_is_the_plain_mean_of_all_weights(per_context):
    partition = PartitionFunction(4, per_context=per_context)
    weights, owners = torch.zeros(0, dtype=F64), torch.zeros(0, dtype=torch.long)
    for log_weights, owner in random_updates():
        partition.update(log_weights, owner)
        weights, owners = torch.cat([weights, log_weights.exp()]), torch.cat([owners, owner])
        for context in range(4):
            own = weights[owners == context] if per_context else weights
            log_z = float(partition.log_z(torch.tensor([context])))
            assert log_z == pytest.approx(float(own.mean().log()) if len(own) else -INF, abs=1e-12)


def test_batch_z_forgets_and_oracle_z_is_frozen():
    updates = list(random_updates(rounds=3, contexts=1))
    updates = [(log_weights.clamp(min=-2.0), owner) for log_weights, owner in updates]
    batch, oracle = PartitionFunction(1, kind="batch"), PartitionFunction(1, kind="oracle")
    here, first = torch.tensor([0]), float(updates[0][0].exp().mean().log())
    for log_weights, owner in updates:
        batch.update(log_weights, owner)
        oracle.update(log_weights, owner)
        assert float(batch.log_z(here)) == pytest.approx(float(log_weights.exp().mean().log()), abs=1e-12)
        assert float(oracle.log_z(here)) == pytest.approx(first, abs=1e-12)
        alone = PartitionFunction(1)
        alone.update(log_weights, owner)
        assert batch.summary() == alone.summary()


def test_oracle_stays_frozen_where_its_sample_never_met_the_target():
    oracle = PartitionFunction(1, kind="oracle")
    oracle.update(tensor(-INF, -INF), torch.tensor([0, 0]))
    oracle.update(tensor(0.0), torch.tensor([0]))
    assert oracle.log_z(torch.tensor([0])).tolist() == [-INF]


def test_z_is_zero_until_a_sample_meets_the_target():
    everywhere, partition = torch.tensor([0, 1, 1, 2]), PartitionFunction(3)
    assert partition.log_z(everywhere).tolist() == [-INF] * 4
    partition.update(tensor(-INF, 0.0), torch.tensor([0, 1]))
    assert partition.log_z(everywhere).tolist() == pytest.approx([-INF, 0.0, 0.0, -INF])


def test_extreme_weights_neither_overflow_nor_vanish():
    partition = PartitionFunction(1)
    here = torch.tensor([0])
    for log_weight, expected in ((-2000.0, -2000.0), (-2000.0, -2000.0), (3000.0, 3000 - math.log(3))):
        partition.update(tensor(log_weight), here)
        assert float(partition.log_z(here)) == pytest.approx(expected, abs=1e-9)
    assert math.isfinite(partition.summary()["log_z_se"])


def test_z_is_unbiased_though_the_sampler_changes_with_what_it_saw():
    """Exact expectation over all outcomes of two rounds of two samples; round two's q depends on round one's Z."""
    unnormalised = tensor(0.3, 0.0, 0.9)  # P, and Z = 1.2
    first_q, here = tensor(0.5, 0.3, 0.2), torch.zeros(2, dtype=torch.long)
    expectation = 0.0
    for first in itertools.product(range(3), repeat=2):
        partition = PartitionFunction(1)
        partition.update((unnormalised / first_q)[list(first)].log(), here)
        z = float(partition.log_z(here[:1]).exp())
        second_q = torch.softmax(tensor(z, 0.0, -z), 0)
        state = {name: value.clone() for name, value in partition.state.items()}
        for second in itertools.product(range(3), repeat=2):
            partition.state = state
            partition.update((unnormalised / second_q)[list(second)].log(), here)
            chance = first_q[list(first)].prod() * second_q[list(second)].prod()
            expectation += float(chance * partition.log_z(here[:1]).exp())
    assert expectation == pytest.approx(1.2, abs=1e-12)


def test_standard_error_of_log_z_matches_simulation():
    """Weights lognormal(σ = 0.6) in 3 contexts of unequal size, 1000 replications.

    The spread found has a sampling error of 1/√2000 = 2.2 %; the delta method behind the standard error is off by
    O(CV²/n) = 0.43/100; 8 % is three times both together.
    """
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(3).repeat_interleave(torch.tensor([100, 200, 300]))
    found, claimed, ess = [], [], []
    for _ in range(1000):
        partition = PartitionFunction(5)  # two contexts are never seen and do not count
        partition.update(0.6 * torch.randn(600, generator=generator, dtype=F64), owner)
        summary = partition.summary()
        found.append(summary["log_z"])
        claimed.append(summary["log_z_se"])
        ess.append(summary["ess"])
    found, claimed = torch.tensor(found, dtype=F64), torch.tensor(claimed, dtype=F64)
    assert float(claimed.mean()) == pytest.approx(float(found.std()), rel=0.08)
    assert float(found.mean()) == pytest.approx(0.18, abs=3 * float(found.std()) / math.sqrt(1000) + 0.002)
    # (Σw)²/Σw² → n·exp(−σ²), and the errors go as 1/n: that of n = 3/(1/100 + 1/200 + 1/300)
    assert sum(ess) / 1000 == pytest.approx(3 / (1 / 100 + 1 / 200 + 1 / 300) * math.exp(-0.36), rel=0.03)


def test_summary_of_equal_weights_and_of_contexts_at_zero():
    partition = PartitionFunction(4)
    partition.update(tensor(0.5, 0.5, 0.5, 0.5, -INF), torch.tensor([0, 0, 1, 1, 2]))
    summary = partition.summary()
    assert summary["log_z"] == pytest.approx(0.5) and summary["ess"] == pytest.approx(2)
    assert summary["log_z_se"] == pytest.approx(0, abs=1e-7) and summary["contexts_at_zero"] == 1


def test_summary_while_no_context_has_met_the_target():
    partition = PartitionFunction(4)
    partition.update(tensor(-INF, -INF, -INF), torch.tensor([0, 0, 2]))
    summary = partition.summary()
    assert summary["log_z"] == -INF and summary["ess"] == 0
    assert summary["contexts_at_zero"] == 2  # those that were sampled, as above


@pytest.mark.parametrize("kind", ["running", "batch", "oracle"])
def test_state_continues_where_it_was_taken(kind):
    """A state taken earlier is not changed by later updates, and continues to the same numbers."""
    everywhere = torch.arange(4)
    updates = list(random_updates(rounds=4))
    partition = PartitionFunction(4, kind=kind)
    for update in updates[:2]:
        partition.update(*update)
    state = partition.state
    expected_then = partition.log_z(everywhere).clone()
    for update in updates[2:]:
        partition.update(*update)
    other = PartitionFunction(4, kind=kind)
    other.state = state
    assert other.log_z(everywhere).tolist() == expected_then.tolist()
    for update in updates[2:]:
        other.update(*update)
    assert other.log_z(everywhere).tolist() == partition.log_z(everywhere).tolist()
    assert other.summary() == partition.summary()


# --- baseline ---


def test_leave_one_out_is_the_mean_of_the_context_s_other_samples():
    rewards, owner = tensor(1, 2, 6, 10, 20, 5), torch.tensor([0, 0, 0, 2, 2, 3])
    baseline = Baseline("leave_one_out")
    assert baseline(rewards, owner).tolist() == pytest.approx([4, 3.5, 1.5, 20, 10, 0])  # a lone sample: 0
    assert baseline(rewards, owner).tolist() == pytest.approx([4, 3.5, 1.5, 20, 10, 0])  # rounds are not mixed
    for i in range(6):
        changed = rewards.clone()
        changed[i] += 1000
        assert float(baseline(changed, owner)[i]) == pytest.approx(float(baseline(rewards, owner)[i]), abs=1e-9)


def test_running_baseline_knows_earlier_rounds_only():
    baseline, owner = Baseline("running"), torch.tensor([0, 1, 1])
    rounds = [tensor(1, 2, 6), tensor(-4, 0, 1), tensor(100, 200, 300)]
    expected = [0.0, 3.0, 1.0]
    for rewards, mean in zip(rounds, expected, strict=True):
        assert baseline(rewards, owner).tolist() == pytest.approx([mean] * 3)


def test_no_baseline_is_zero():
    baseline = Baseline("none")
    for _ in range(2):
        assert baseline(tensor(1, 2, 6), torch.tensor([0, 0, 0])).tolist() == [0, 0, 0]


def test_baseline_state_round_trip():
    baseline, owner = Baseline("running"), torch.tensor([0, 0])
    baseline(tensor(3, 5), owner)
    state = baseline.state
    baseline(tensor(100, 100), owner)
    other = Baseline("running")
    other.state = state
    assert other(tensor(0, 0), owner).tolist() == [4, 4]


# --- pseudo-rewards ---


@pytest.mark.parametrize("name", [*divergences.NAMES, "alpha:0.3"])
def test_pseudo_rewards_are_minus_f_prime_of_t(name):
    """t = q·Z/P; f' by automatic differentiation of f. At P = 0 it is −f'(∞)."""
    divergence = divergences.get(name)
    behavior, log_z = tensor(-30.0, -31.0, -29.5, -40.0, -30.0), tensor(-2.0, -3.0, -2.0, -1.0, -2.0)
    log_score = tensor(-33.0, -32.0, -31.4, -39.0, -INF)
    t = (behavior.exp() * log_z.exp() / log_score.exp())[:4].requires_grad_()
    (slope,) = torch.autograd.grad(divergence.f(t).sum(), t)
    rewards = pseudo_rewards(behavior, log_score, log_z, divergence, None)
    torch.testing.assert_close(rewards[:4], -slope, atol=1e-9, rtol=1e-9)
    assert float(rewards[4]) == -divergence.f_prime_at_infinity
    capped = pseudo_rewards(behavior, log_score, log_z, divergence, 0.3)
    assert capped.tolist() == rewards.clamp(-0.3, 0.3).tolist() and float(capped.abs().max()) == pytest.approx(0.3)


def test_pseudo_rewards_wait_while_z_is_zero():
    """A context in which nothing has met the target yet teaches nothing, also while others do."""
    js = divergences.get("jensen_shannon")
    rewards = pseudo_rewards(tensor(-5, -6, -5), tensor(-INF, -INF, -4), tensor(-INF, -INF, -1), js, None)
    assert rewards[:2].tolist() == [0, 0] and float(rewards[2]) > 0


# --- both, as the loop asks for them ---


def scores_of(log_q, log_score):
    return Scores(None, torch.zeros(len(log_q), 0, dtype=F64), log_q, torch.zeros_like(log_q), log_score)


def test_estimates_know_a_context_by_its_place_in_the_data_set():
    """Contexts 3 and 1 of 5; the second round sees only context 1, and adds to what is known of it."""
    contexts = [Context(index, "", (1,)) for index in (3, 1)]
    text = ([5, 0], [-1.0, -1.0], True)
    rollouts = pack(contexts, [[text, text], [text, text, text]])
    log_q, log_score = tensor(-2, -3, -2, -4, -5), tensor(-2.5, -INF, -1, -3, -6)
    js, estimates = divergences.get("jensen_shannon"), Estimates(PartitionFunction(5), Baseline(), reward_cap=0.4)
    log_z, baseline = estimates.update(rollouts, scores_of(log_q, log_score), js)
    z = {3: math.exp(-0.5) / 2, 1: (2 * math.exp(1) + math.exp(-1)) / 3}
    assert log_z.exp().tolist() == pytest.approx([z[3]] * 2 + [z[1]] * 3)
    rewards = pseudo_rewards(log_q, log_score, log_z, js, 0.4)
    assert float(rewards.abs().max()) == pytest.approx(0.4)
    assert baseline.tolist() == Baseline()(rewards, rollouts.context_index).tolist()

    again = pack(contexts[1:], [[text, text]])
    log_z, _ = estimates.update(again, scores_of(tensor(-1, -1), tensor(-INF, -1)), js)
    assert log_z.exp().tolist() == pytest.approx([(3 * z[1] + 0 + 1) / 5] * 2)


def test_estimates_continue_from_their_state():
    text, js = ([5, 0], [-1.0, -1.0], True), divergences.get("jensen_shannon")
    rollouts = pack([Context(0, "", (1,)), Context(1, "", (1,))], [[text], [text, text]])
    one, other = (Estimates(PartitionFunction(2), Baseline("running")) for _ in range(2))
    one.update(rollouts, scores_of(tensor(-1, -2, -3), tensor(-3, -2, -2)), js)
    other.load_state(one.state())
    again = rollouts, scores_of(tensor(-2, -2, -1), tensor(-1, -INF, -4)), js
    found, expected = one.update(*again), other.update(*again)
    assert [x.tolist() for x in found] == [x.tolist() for x in expected] and float(found[1][0]) != 0
