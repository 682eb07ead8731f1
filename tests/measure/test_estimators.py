"""Estimates against sums over every outcome of small distributions: values, coverage, the edges of float64.

A world is a few contexts, each with a policy π over K outcomes and P = Z·p. The intervals are judged on 400
or 500 replications with a fixed seed: nominal coverage 0.95 has a sampling error of 0.011 there. Sample sizes
are such that the O(1/n) bias of the plug-in Z stays small beside the standard error: with 2000 samples of one
context, and Var(P/π)/Z² near 1, it is of order 1/n = 0.0005 against 1/√n = 0.02; with 240 samples of each of
25 contexts, about a tenth of the spread between contexts over √25. Each test states what it allows.
"""

import math
import warnings

import pytest
import torch

from fdpg_fast.measure.estimators import (
    MATRIX,
    Estimate,
    LogPartition,
    divergence_matrix,
    log_partition,
    mean,
    mean_under_target,
    ratio,
)

F64 = torch.float64
INFINITE_ON_ZEROS = ("reverse_kl", "neyman_chi2")
NAMES = (*MATRIX, "jensen_shannon_half")


def exactly(log_z):
    """A Z that is known without error, or none."""
    return None if log_z is None else LogPartition(log_z, torch.zeros_like(log_z), torch.full_like(log_z, math.inf))


def exact_divergences(policy, target):
    """Textbook sums over outcomes, [K] each; written without f and without log space."""
    m = (policy + target) / 2
    zeros = bool((target == 0).any())
    policy_on, target_on = policy[target > 0], target[target > 0]
    kl_to_mixture = (policy * (policy / m).log()).sum()
    kl_to_mixture = kl_to_mixture + (target_on * (target_on / m[target > 0]).log()).sum()
    values = {
        "forward_kl": (target_on * (target_on / policy_on).log()).sum(),
        "reverse_kl": math.inf if zeros else (policy * (policy / target).log()).sum(),
        "total_variation": (policy - target).abs().sum() / 2,
        "jensen_shannon": kl_to_mixture,
        "pearson_chi2": ((policy - target) ** 2 / policy).sum(),
        "neyman_chi2": math.inf if zeros else ((policy - target) ** 2 / target).sum(),
        "squared_hellinger": (policy.sqrt() - target.sqrt()).square().sum(),
        "alpha:0.5": 4 * (1 - (policy * target).sqrt().sum()),
        "jensen_shannon_half": kl_to_mixture / 2,
    }
    return {name: float(value) for name, value in values.items()}


def random_distribution(generator, outcomes, zeros=0, spread=1.0):
    probs = (spread * torch.randn(outcomes, generator=generator, dtype=F64)).exp()
    probs[:zeros] = 0
    return probs / probs.sum()


def draw(generator, policies, samples):
    """`samples` outcomes of each row of policies [C, K], and the context of each: [C·samples] twice."""
    outcomes = torch.multinomial(policies, samples, replacement=True, generator=generator)
    return outcomes.flatten(), torch.arange(len(policies)).repeat_interleave(samples)


def coverage(estimates, truth):
    intervals = [estimate.interval for estimate in estimates]
    return sum(low <= truth <= high for low, high in intervals) / len(intervals)


def assert_unbiased(values, truth, tolerance_in_sd=0.0):
    """The average is within 4 of its own standard errors of the truth, plus a part of one estimate's sd."""
    values = torch.tensor(values, dtype=F64)
    sd = float(values.std())
    assert abs(float(values.mean()) - truth) < 4 * sd / math.sqrt(len(values)) + tolerance_in_sd * sd


# --- exact: a sample in which every outcome occurs exactly in proportion to π makes the plug-in exact ---


@pytest.mark.parametrize("zeros", [0, 3])
@pytest.mark.parametrize("known_z", [False, True])
@pytest.mark.parametrize("contexts", [1, 3])
def test_a_proportional_sample_gives_the_exact_matrix(zeros, known_z, contexts):
    generator = torch.Generator().manual_seed(zeros + contexts)
    counts = torch.randint(1, 9, (contexts, 12), generator=generator)
    policies = counts / counts.sum(1, keepdim=True, dtype=F64)
    targets = torch.stack([random_distribution(generator, 12, zeros) for _ in range(contexts)])
    log_z = torch.randn(contexts, generator=generator, dtype=F64)
    outcome = torch.cat([torch.arange(12).repeat_interleave(row) for row in counts])
    context = torch.arange(contexts).repeat_interleave(counts.sum(1))
    policy_logprob = policies[context, outcome].log()
    target_log_score = targets[context, outcome].log() + log_z[context]

    partition = log_partition(policy_logprob, target_log_score, context)
    torch.testing.assert_close(partition.log_z, log_z, rtol=1e-12, atol=1e-12)
    weights = targets / policies
    torch.testing.assert_close(
        partition.ess, counts.sum(1) * (policies * weights).sum(1) ** 2 / (policies * weights**2).sum(1)
    )
    matrix = divergence_matrix(policy_logprob, target_log_score, context, exactly(log_z) if known_z else None)
    assert (matrix.contexts, matrix.contexts_left_out) == (contexts, 0)
    assert tuple(matrix.estimates) == NAMES
    values = torch.randn(12, generator=generator, dtype=F64)
    reweighted = mean_under_target(values[outcome], policy_logprob, target_log_score, context)
    assert reweighted.value == pytest.approx(float((targets @ values).mean()), abs=1e-12)
    assert reweighted.ess == pytest.approx(float(partition.ess.sum()))
    exact = [exact_divergences(policy, target) for policy, target in zip(policies, targets, strict=True)]
    for name, estimate in matrix.estimates.items():
        assert estimate.value == pytest.approx(sum(row[name] for row in exact) / contexts, abs=1e-12), name
        all_count = known_z and name not in ("forward_kl", "pearson_chi2")
        assert estimate.ess == pytest.approx(len(outcome) if all_count else float(partition.ess.sum()))
        assert math.isnan(estimate.standard_error) == math.isinf(estimate.value)


# --- coverage of the 95 % intervals ---


@pytest.mark.parametrize("zeros", [0, 5])
@pytest.mark.parametrize("known_z", [False, True])
def test_matrix_intervals_cover_in_one_context(zeros, known_z):
    generator = torch.Generator().manual_seed(10 + zeros)
    policy = random_distribution(generator, 20, spread=0.7)
    target = random_distribution(generator, 20, zeros, spread=0.7)
    truth = exact_divergences(policy, target)
    log_z = torch.tensor([-3.0], dtype=F64) if known_z else None
    runs = []
    for _ in range(400):
        outcome, context = draw(generator, policy[None], 2000)
        log_score = target.log()[outcome] - 3.0
        runs.append(divergence_matrix(policy.log()[outcome], log_score, context, exactly(log_z)).estimates)
    for name in NAMES:
        if zeros and name in INFINITE_ON_ZEROS:
            assert all(run[name].value == math.inf and math.isnan(run[name].standard_error) for run in runs)
            continue
        estimates = [run[name] for run in runs]
        assert_unbiased([estimate.value for estimate in estimates], truth[name], tolerance_in_sd=0.1)
        assert 0.9 <= coverage(estimates, truth[name]) <= 0.98, name


def test_matrix_intervals_cover_over_contexts_drawn_at_random():
    generator = torch.Generator().manual_seed(20)
    policies = torch.stack([random_distribution(generator, 10, spread=0.4) for _ in range(30)])
    targets = torch.stack([random_distribution(generator, 10, 2, spread=0.5) for _ in range(30)])
    exact = [exact_divergences(policy, target) for policy, target in zip(policies, targets, strict=True)]
    runs = []
    for _ in range(400):
        drawn = torch.randint(30, (25,), generator=generator)
        outcome, context = draw(generator, policies[drawn], 240)
        policy, target = (table[drawn[context], outcome] for table in (policies, targets))
        runs.append(divergence_matrix(policy.log(), target.log(), context).estimates)
    for name in NAMES:
        if name not in INFINITE_ON_ZEROS:
            truth = sum(row[name] for row in exact) / len(exact)
            estimates = [run[name] for run in runs]
            assert_unbiased([estimate.value for estimate in estimates], truth, tolerance_in_sd=0.25)
            assert 0.9 <= coverage(estimates, truth) <= 0.98, name


def test_log_partition_intervals_cover():
    generator = torch.Generator().manual_seed(30)
    policies = torch.stack([random_distribution(generator, 15) for _ in range(3)])
    targets = torch.stack([random_distribution(generator, 15, zeros, spread=0.7) for zeros in (0, 4, 8)])
    log_z = torch.tensor([-200.0, 0.5, 30.0], dtype=F64)
    log_scores = targets.log() + log_z[:, None]
    hits, relative = torch.zeros(3), []
    for _ in range(500):
        outcome, context = draw(generator, policies, 1500)
        partition = log_partition(policies[context, outcome].log(), log_scores[context, outcome], context)
        hits += (partition.log_z - log_z).abs() <= 1.96 * partition.relative_standard_error
        relative.append((partition.log_z - log_z).exp())
    assert ((hits / 500 >= 0.9) & (hits / 500 <= 0.98)).all(), hits
    for column in torch.stack(relative).T:
        assert_unbiased(column.tolist(), 1.0)  # Z itself, unlike log Z, has no bias at any n


@pytest.mark.parametrize("contexts", [1, 40])
def test_mean_and_token_rate_intervals_cover(contexts):
    generator = torch.Generator().manual_seed(40 + contexts)
    pool = 50 if contexts > 1 else 1
    policies = torch.stack([random_distribution(generator, 8) for _ in range(pool)])
    base_logprob = torch.stack([random_distribution(generator, 8) for _ in range(pool)]).log()
    lengths = torch.randint(1, 12, (pool, 8), generator=generator)
    tokens = float((policies * lengths).sum())
    truth = {
        "kl": float((policies * (policies.log() - base_logprob)).sum()) / pool,
        "sequence": -float((policies * policies.log()).sum()) / pool,
        "token": -float((policies * policies.log()).sum()) / tokens,
        "perplexity": math.exp(-float((policies * base_logprob).sum()) / tokens),
    }
    runs = []
    for _ in range(500):
        drawn = torch.randint(pool, (contexts,), generator=generator)
        outcome, context = draw(generator, policies[drawn], 600 if contexts == 1 else 10)
        which = drawn[context]
        policy, base, length = (table[which, outcome] for table in (policies.log(), base_logprob, lengths))
        runs.append(
            {
                "kl": mean(policy - base, context),
                "sequence": mean(-policy, context),
                "token": ratio(-policy, length, context),
                "perplexity": ratio(-base, length, context).exp(),
            }
        )
    for name, expected in truth.items():
        estimates = [run[name] for run in runs]
        # the ratios of two means carry a bias of order 1/n; with 40 contexts that is a sixth of 1/√n
        assert_unbiased([estimate.value for estimate in estimates], expected, tolerance_in_sd=0.15)
        assert 0.9 <= coverage(estimates, expected) <= 0.98, name


@pytest.mark.parametrize("contexts", [1, 40])
def test_intervals_of_a_mean_under_the_target_cover(contexts):
    generator = torch.Generator().manual_seed(50 + contexts)
    pool = 50 if contexts > 1 else 1
    policies = torch.stack([random_distribution(generator, 8, spread=0.5) for _ in range(pool)])
    targets = torch.stack([random_distribution(generator, 8, zeros=2, spread=0.5) for _ in range(pool)])
    values = torch.randn(pool, 8, generator=generator, dtype=F64)
    truth = float((targets * values).sum() / pool)
    estimates = []
    for _ in range(500):
        drawn = torch.randint(pool, (contexts,), generator=generator)
        outcome, context = draw(generator, policies[drawn], 600 if contexts == 1 else 60)
        value, policy, target = (table[drawn[context], outcome] for table in (values, policies.log(), targets.log()))
        estimates.append(mean_under_target(value, policy, target - 7.0, context))
    assert_unbiased([estimate.value for estimate in estimates], truth, tolerance_in_sd=0.15)
    assert 0.9 <= coverage(estimates, truth) <= 0.98


# --- values by direct computation ---


def test_mean_under_target_ignores_what_does_not_apply_and_contexts_without_support():
    values = torch.tensor([1.0, 3.0, math.nan, 5.0, 6.0])
    weight = torch.tensor([1.0, 3.0, 9.0, 0.0, 0.0], dtype=F64).log()
    estimate = mean_under_target(values, torch.zeros(5), weight, torch.tensor([0, 0, 0, 1, 1]))
    assert estimate.value == pytest.approx((1 + 9) / 4)
    assert estimate.ess == pytest.approx(16 / 10)
    nothing = mean_under_target(values[3:], torch.zeros(2), weight[3:], torch.tensor([0, 0]))
    assert math.isnan(nothing.value) and nothing.ess == 0


def test_mean_weighs_contexts_alike_and_ignores_nan():
    values = torch.tensor([1.0, 3.0, math.nan, 5.0, math.nan, 9.0])
    context = torch.tensor([0, 0, 0, 1, 2, 7])  # context 2 has nothing to say
    estimate = mean(values, context)
    assert estimate.value == pytest.approx((2 + 5 + 9) / 3)
    assert estimate.standard_error == pytest.approx(float(torch.tensor([2.0, 5.0, 9.0]).std()) / math.sqrt(3))
    assert estimate.ess == 4
    assert mean(values[:3], context[:3]).standard_error == pytest.approx(math.sqrt(2) / math.sqrt(2))


def test_mean_takes_booleans_and_integers():
    assert mean(torch.tensor([True, False]), torch.tensor([0, 0])).value == 0.5
    assert mean(torch.tensor([3, 4]), torch.tensor([0, 1])).value == 3.5


def test_rates_pool_all_tokens():
    logprob = torch.tensor([-2.0, -7.0, -3.0], dtype=F64)
    lengths, context = torch.tensor([1, 4, 3]), torch.tensor([0, 0, 1])
    assert ratio(-logprob, lengths, context).value == pytest.approx(12 / 8)
    assert ratio(-logprob, lengths, context).exp().value == pytest.approx(math.exp(12 / 8))
    assert mean(-logprob, context).value == pytest.approx((4.5 + 3) / 2)
    assert mean(logprob - (logprob - 0.25), context).value == pytest.approx(0.25)


def test_interval_is_normal():
    assert Estimate(2.0, 0.5, 10.0).interval == pytest.approx((1.02, 2.98))


# --- edges ---


def test_one_sample_has_a_value_but_no_error():
    one, context = torch.tensor([-3.0], dtype=F64), torch.tensor([0])
    for estimate in (
        mean(one, context),
        mean(-one, context),
        ratio(-one, torch.tensor([2]), context),
        ratio(-one, torch.tensor([2]), context).exp(),
    ):
        assert math.isfinite(estimate.value) and math.isnan(estimate.standard_error) and estimate.ess == 1
    partition = log_partition(one, one - 1, context)
    assert partition.log_z.tolist() == [-1.0] and partition.ess.tolist() == [1.0]
    assert partition.relative_standard_error.isnan().all()
    matrix = divergence_matrix(one, one - 1, context, exactly(torch.tensor([-1.5], dtype=F64)))
    assert matrix.estimates["reverse_kl"].value == pytest.approx(-0.5)  # log π/p
    assert math.isnan(matrix.estimates["reverse_kl"].standard_error)


def test_no_samples_or_no_tokens_give_nan():
    nothing, no_context = torch.zeros(0, dtype=F64), torch.zeros(0, dtype=torch.int64)
    zero, context = torch.zeros(2, dtype=F64), torch.tensor([0, 0])
    for estimate in (
        mean(nothing, no_context),
        mean(torch.full((2,), math.nan), context),
        ratio(-nothing, no_context, no_context),
        ratio(-zero, torch.tensor([0, 0]), context),
        divergence_matrix(nothing, nothing, no_context).estimates["forward_kl"],
    ):
        assert math.isnan(estimate.value) and math.isnan(estimate.standard_error)


def test_a_context_of_one_sample_cannot_supply_its_own_z():
    policy_logprob = torch.tensor([-1.0, -2.0, -3.0, -1.5], dtype=F64)
    score, context = policy_logprob - torch.tensor([1.0, 2.0, 0.5, 1.0]), torch.tensor([0, 0, 0, 1])
    matrix = divergence_matrix(policy_logprob, score, context)
    assert (matrix.contexts, matrix.contexts_left_out) == (1, 1)
    assert matrix.estimates == divergence_matrix(policy_logprob[:3], score[:3], context[:3]).estimates


def test_nothing_satisfies_the_target():
    policy_logprob, context = torch.full((6,), -4.0, dtype=F64), torch.tensor([0, 0, 1, 1, 2, 2])
    nowhere = torch.full((6,), -math.inf, dtype=F64)
    partition = log_partition(policy_logprob, nowhere, context)
    assert partition.log_z.tolist() == [-math.inf] * 3 and partition.ess.tolist() == [0.0] * 3
    assert partition.relative_standard_error.isnan().all()
    matrix = divergence_matrix(policy_logprob, nowhere, context)
    assert (matrix.contexts, matrix.contexts_left_out) == (0, 3)
    for estimate in matrix.estimates.values():
        assert math.isnan(estimate.value) and math.isnan(estimate.standard_error) and estimate.ess == 0
    known_empty = divergence_matrix(policy_logprob, nowhere, context, exactly(torch.full((3,), -math.inf, dtype=F64)))
    assert known_empty.contexts == 0 and math.isnan(known_empty.estimates["jensen_shannon"].value)
    # with Z known from elsewhere the same sample says that all of π's mass is off the support, and p elsewhere
    known = divergence_matrix(policy_logprob, nowhere, context, exactly(torch.zeros(3, dtype=F64)))
    assert known.contexts == 3
    assert known.estimates["jensen_shannon"].value == pytest.approx(2 * math.log(2))
    assert known.estimates["total_variation"].value == pytest.approx(1)
    assert known.estimates["reverse_kl"].value == math.inf


def test_contexts_without_z_are_left_out_and_counted():
    generator = torch.Generator().manual_seed(50)
    policy_logprob = torch.randn(12, generator=generator, dtype=F64) - 5
    score = policy_logprob + torch.randn(12, generator=generator, dtype=F64)
    context = torch.arange(3).repeat_interleave(4)
    score[4:8] = -math.inf
    matrix = divergence_matrix(policy_logprob, score, context)
    rest = context != 1
    others = divergence_matrix(policy_logprob[rest], score[rest], context[rest] // 2)
    assert (matrix.contexts, matrix.contexts_left_out) == (2, 1)
    assert matrix.estimates == others.estimates
    one_known = torch.tensor([-math.inf, 0.3, -math.inf], dtype=F64)
    assert divergence_matrix(policy_logprob, score, context, exactly(one_known)).contexts_left_out == 2


def test_policy_equal_to_target_has_no_divergence():
    policy_logprob, context = -torch.arange(1.0, 9.0, dtype=F64), torch.arange(2).repeat_interleave(4)
    for score, log_z in ((policy_logprob + 500, 500.0), (policy_logprob, 0.0)):
        for given in (None, exactly(torch.full((2,), log_z, dtype=F64))):
            for estimate in divergence_matrix(policy_logprob, score, context, given).estimates.values():
                assert estimate.value == pytest.approx(0, abs=1e-12) and estimate.standard_error < 1e-12


@pytest.mark.parametrize("level", [0.0, -60_000.0, 60_000.0])
def test_any_level_of_log_probs_gives_the_same_matrix(level):
    policy_logprob = torch.tensor([-8.0, -10.0, -9.0, -7.5], dtype=F64)
    score = torch.tensor([-8.5, -9.0, -math.inf, -9.0], dtype=F64)
    context = torch.zeros(4, dtype=torch.int64)
    expected = divergence_matrix(policy_logprob, score, context).estimates
    for name, estimate in divergence_matrix(policy_logprob + level, score - level, context).estimates.items():
        assert estimate.value == pytest.approx(expected[name].value, abs=1e-9)
        assert estimate.standard_error == pytest.approx(expected[name].standard_error, abs=1e-9, nan_ok=True)


def test_ratios_of_e_to_the_700_are_finite_numbers():
    policy_logprob = torch.tensor([-5.0, -5.0, -5.0], dtype=F64)
    context = torch.zeros(3, dtype=torch.int64)
    log_z = torch.zeros(1, dtype=F64)
    huge = math.exp(700)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        too_likely = divergence_matrix(policy_logprob, policy_logprob - 700, context, exactly(log_z)).estimates
        too_rare = divergence_matrix(policy_logprob, policy_logprob + 700, context, exactly(log_z)).estimates
        uneven = policy_logprob + torch.tensor([0.0, 1.0, -700.0])
        one_far = divergence_matrix(policy_logprob, uneven, context).estimates  # Z from the sample
    at_infinity = {  # f'(∞) + f(0), of distributions that hardly meet; what forward KL and χ² would be is not seen
        "forward_kl": 1.0,
        "reverse_kl": 700.0,
        "total_variation": 1.0,
        "jensen_shannon": 2 * math.log(2),
        "pearson_chi2": 1.0,
        "neyman_chi2": huge,
        "squared_hellinger": 2.0,
        "alpha:0.5": 4.0,
        "jensen_shannon_half": math.log(2),
    }
    at_zero = {  # f(0)/t, with f(0) = 1 for most
        "forward_kl": 699 * huge,
        "reverse_kl": huge,
        "total_variation": huge / 2,
        "jensen_shannon": math.log(2) * huge,
        "pearson_chi2": math.inf,  # e^1400
        "neyman_chi2": huge,
        "squared_hellinger": huge,
        "alpha:0.5": 2 * huge,
        "jensen_shannon_half": math.log(2) / 2 * huge,
    }
    for name in NAMES:
        assert too_likely[name].value == pytest.approx(at_infinity[name], rel=1e-9), name
        assert too_rare[name].value == pytest.approx(at_zero[name], rel=1e-9), name
        assert math.isfinite(one_far[name].value) and math.isfinite(one_far[name].standard_error), name
        if at_zero[name] < math.inf:
            assert too_likely[name].standard_error <= 1e-12 * max(1, at_infinity[name])
            assert too_rare[name].standard_error <= 1e-12 * at_zero[name]


def test_ratios_beyond_float64_are_infinite_never_nan():
    policy_logprob = torch.tensor([-5.0, -5.0], dtype=F64)
    context, log_z = torch.tensor([0, 0]), torch.zeros(1, dtype=F64)
    rare = divergence_matrix(policy_logprob, policy_logprob + 5000, context, exactly(log_z)).estimates
    assert all(estimate.value == math.inf for estimate in rare.values())
    likely = divergence_matrix(policy_logprob, policy_logprob - 5000, context, exactly(log_z)).estimates
    assert likely["reverse_kl"].value == pytest.approx(5000)
    assert likely["neyman_chi2"].value == math.inf
    assert likely["forward_kl"].value == pytest.approx(1)


def test_perplexity_and_kl_may_overflow_to_infinity():
    logprob, context = torch.tensor([-9000.0, -9100.0], dtype=F64), torch.tensor([0, 0])
    assert ratio(-logprob, torch.tensor([1, 1]), context).exp().value == math.inf
    impossible = torch.tensor([-math.inf, -1.0], dtype=F64)
    assert mean(logprob - impossible, context).value == math.inf
    assert math.isnan(mean(logprob - impossible, context).standard_error)
    assert ratio(-impossible, torch.tensor([1, 1]), context).exp().value == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_refused(bad):
    policy_logprob, context = torch.tensor([-5.0, -5.0], dtype=F64), torch.tensor([0, 0])
    with pytest.raises(ValueError, match="sample 1: log P"):
        divergence_matrix(policy_logprob, torch.tensor([-5.0, bad], dtype=F64), context)


def test_uneven_contexts_in_any_order_of_size():
    generator = torch.Generator().manual_seed(60)
    sizes = torch.tensor([5, 2, 9])
    context = torch.arange(3).repeat_interleave(sizes)
    policy_logprob = torch.randn(16, generator=generator, dtype=F64)
    score = policy_logprob + torch.randn(16, generator=generator, dtype=F64)
    together = divergence_matrix(policy_logprob, score, context).estimates
    apart = []
    for c, size in enumerate(sizes.tolist()):
        one, alone = context == c, torch.zeros(size, dtype=torch.int64)
        apart.append(divergence_matrix(policy_logprob[one], score[one], alone).estimates)
    for name, estimate in together.items():
        values = torch.tensor([alone[name].value for alone in apart], dtype=F64)
        assert estimate.value == pytest.approx(float(values.mean()))
        assert estimate.standard_error == pytest.approx(float(values.std()) / math.sqrt(3))


def test_the_error_of_a_z_from_another_sample_reaches_one_contexts_divergences():
    """D̂ with an independent Ẑ, known to 4 %: its spread over replications is what the reported error says."""
    rng = torch.Generator().manual_seed(5)
    policy, target, base = (torch.tensor(p, dtype=F64) for p in ([0.7, 0.2, 0.1], [0.2, 0.3, 0.5], [0.5, 0.3, 0.2]))
    found = []
    for _ in range(400):
        frozen = torch.multinomial(base, 500, replacement=True, generator=rng)
        one = torch.zeros(500, dtype=torch.long)
        known = log_partition(base.log()[frozen], target.log()[frozen], one)
        drawn = torch.multinomial(policy, 20000, replacement=True, generator=rng)
        context = torch.zeros(20000, dtype=torch.long)
        found.append(divergence_matrix(policy.log()[drawn], target.log()[drawn], context, known).estimates)
    for name in ("forward_kl", "reverse_kl", "jensen_shannon", "squared_hellinger", "total_variation"):
        values = torch.tensor([estimates[name].value for estimates in found])
        errors = torch.tensor([estimates[name].standard_error for estimates in found])
        assert 0.85 < float(errors.mean() / values.std()) < 1.15, name


def test_a_known_z_bounds_the_estimates_where_the_policy_hardly_samples_the_target():
    """Half of p lies where π goes once in 800 samples: plain averages of f(t)/t spread widely there."""
    policy, target = torch.tensor([0.99875, 0.001, 0.00025], dtype=F64), torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    truth = exact_divergences(policy, target)
    rng = torch.Generator().manual_seed(6)
    context, known = torch.zeros(2000, dtype=torch.long), exactly(torch.zeros(1, dtype=F64))
    plain, found = [], []
    for _ in range(300):
        drawn = torch.multinomial(policy, 2000, replacement=True, generator=rng)
        plain.append((policy - target).abs()[drawn].div(2 * policy[drawn]).mean())
        found.append(divergence_matrix(policy.log()[drawn], target.log()[drawn], context, known).estimates)
    assert float(torch.stack(plain).std()) > 0.15
    for name in ("total_variation", "jensen_shannon", "squared_hellinger", "alpha:0.5", "reverse_kl"):
        values = torch.tensor([estimates[name].value for estimates in found])
        assert float((values - truth[name]).abs().max()) < 0.1 * truth[name], name
