"""sequence_weights against the definition, over every divergence and option, and what must leave it unchanged."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdpg_kernels import SequenceWeights, sequence_weights
from support.kernel_cases import ALLOW_ZEROS, NAMES, batch, packing

LENGTHS = [3, 0, 1, 7, 2, 0, 5, 4]
RATIOS = ["sequence", "none"]
CAPS = [
    {},
    {"ratio_cap": 1.2},
    {"ratio_cap": 0.8, "reward_cap": 0.5},
    {"reward_cap": 0.3},
    {"ratio_drop": 1.1},
    {"ratio_cap": 0.7, "ratio_drop": 1.2, "reward_cap": 0.4},
]
hypothesis_settings = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def weights(arguments, impl="chunked", **options):
    return sequence_weights(**arguments, impl=impl, **options)


def assert_same(actual: SequenceWeights, expected: SequenceWeights, rtol=1e-10):
    """Field by field; a difference of exponentials is known to ε times the larger one, hence atol."""
    scale = float(expected.log_ratio.exp().max()) * (1 + float(expected.pseudo_reward.abs().max()))
    for name, a, b in zip(actual._fields, actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * scale, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_chunked_meets_the_definition(name, zeros):
    if zeros and name not in ALLOW_ZEROS:
        with pytest.raises(ValueError):
            weights(batch(LENGTHS, zeros=True), divergence=name)
        return
    arguments = batch(LENGTHS, zeros=zeros)
    rng = torch.Generator().manual_seed(2)
    per_sequence = torch.randn(len(LENGTHS), dtype=torch.float64, generator=rng)
    log_zs = [arguments["log_z"], per_sequence, per_sequence.masked_fill(per_sequence > 0, -math.inf)]
    for log_z in [*log_zs, torch.tensor(-math.inf).double()]:
        for ratio in RATIOS:
            for caps in CAPS:
                for baseline in (None, 0.4, per_sequence, per_sequence[0]):
                    options = dict(divergence=name, ratio=ratio, **caps)
                    both = [
                        weights(arguments | {"log_z": log_z}, impl, baseline=baseline, **options)
                        for impl in ("chunked", "reference")
                    ]
                    assert_same(*both)


@pytest.mark.parametrize("name", NAMES)
def test_a_float32_baseline_leaves_float64_weights_exact(name):
    baseline = torch.tensor(-0.2)
    both = [weights(batch(LENGTHS), impl, divergence=name, baseline=baseline) for impl in ("chunked", "reference")]
    assert_same(*both)


def test_the_definition_written_out():
    """One sequence of two tokens, by hand: π = 0.08, q = 0.04, P = 0.1, Z = 2, so t = 1.6 and π/q = 2."""
    log = lambda *x: torch.tensor(x, dtype=torch.float64).log()  # noqa: E731
    arguments = (log(0.2, 0.4), log(0.4, 0.1), packing([2]), log(0.1), log(2.0)[0])
    for impl in ("chunked", "reference"):
        got = sequence_weights(*arguments, divergence="pearson_chi2", baseline=0.1, impl=impl)
        expected = [0.08, 0.04, 1.6, 2.0]
        assert [float(x.exp()) for x in got[:4]] == pytest.approx(expected)
        assert float(got.pseudo_reward) == pytest.approx(1 / 1.6**2 - 1)
        assert float(got.weight) == pytest.approx(2 * (1 / 1.6**2 - 1 - 0.1))
        assert got.clipped.tolist() == [False]


ragged = st.lists(st.integers(0, 6), min_size=1, max_size=7)
names_with_zeros = st.sampled_from([(n, n in ALLOW_ZEROS) for n in NAMES]).flatmap(
    lambda x: st.tuples(st.just(x[0]), st.booleans() if x[1] else st.just(False))
)


@hypothesis_settings
@given(ragged, names_with_zeros, st.sampled_from(RATIOS), st.sampled_from(CAPS), st.integers(0, 2**31))
def test_ragged_packings(lengths, name_and_zeros, ratio, caps, seed):
    name, zeros = name_and_zeros
    arguments = batch(lengths, zeros=zeros, seed=seed)
    options = dict(divergence=name, ratio=ratio, baseline=0.2, **caps)
    whole = weights(arguments, **options)
    assert_same(whole, weights(arguments, "reference", **options))
    assert all(x.shape == (len(lengths),) for x in whole)

    alone = [weights(one_sequence(arguments, i), **options) for i in range(len(lengths))]
    assert_same(SequenceWeights(*(torch.cat(column) for column in zip(*alone, strict=True))), whole)

    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = weights(concatenate([one_sequence(arguments, i) for i in order]), **options)
    assert_same(shuffled, SequenceWeights(*(x[order] for x in whole)))


def one_sequence(arguments, i):
    start, stop = arguments["cu_seqlens"][i : i + 2].tolist()
    return arguments | dict(
        policy_logprob=arguments["policy_logprob"][start:stop],
        behavior_logprob=arguments["behavior_logprob"][start:stop],
        cu_seqlens=packing([stop - start]),
        target_log_score=arguments["target_log_score"][i : i + 1],
    )


def concatenate(parts):
    joined = {k: torch.cat([p[k] for p in parts]) for k in ("policy_logprob", "behavior_logprob", "target_log_score")}
    return parts[0] | joined | dict(cu_seqlens=packing([len(p["policy_logprob"]) for p in parts]))


@hypothesis_settings
@given(names_with_zeros, st.floats(-50, 50), st.integers(0, 2**31))
def test_only_the_normalised_target_matters(name_and_zeros, shift, seed):
    name, zeros = name_and_zeros
    arguments = batch(LENGTHS, zeros=zeros, seed=seed)
    shifted = arguments | dict(target_log_score=arguments["target_log_score"] + shift, log_z=arguments["log_z"] + shift)
    # t = exp(L) with L known to 50·ε
    assert_same(weights(shifted, divergence=name), weights(arguments, divergence=name), rtol=1e-9)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_clipped_marks_what_a_cap_changed(impl):
    # log π/q of −1, 1, 3, 5 and t = 1 throughout except the last, whose pseudo-reward is −2
    behavior = torch.tensor([1.0, -1.0, -3.0, -5.0]).double()
    arguments = dict(
        policy_logprob=torch.zeros(4).double(),
        behavior_logprob=behavior,
        cu_seqlens=packing([1, 1, 1, 1]),
        target_log_score=torch.tensor([0.0, 0.0, 0.0, -2.0]).double(),
        log_z=torch.tensor(0.0).double(),
    )

    def clipped(**caps):
        return weights(arguments, impl, divergence="reverse_kl", **caps)

    assert clipped().clipped.tolist() == [False] * 4
    capped = clipped(ratio_cap=math.exp(2))
    assert capped.clipped.tolist() == [False, False, True, True]
    assert capped.log_ratio.tolist() == pytest.approx([-1, 1, 2, 2])
    capped = clipped(ratio_cap=math.exp(4), reward_cap=1.5)
    assert capped.clipped.tolist() == [False, False, False, True]
    assert capped.pseudo_reward.tolist() == [0, 0, 0, -1.5]
    assert capped.weight[-1].item() == pytest.approx(-1.5 * math.exp(4))
    unknown = arguments | dict(log_z=torch.tensor([0.0, 0.0, 0.0, -math.inf]).double())
    assert weights(unknown, impl, divergence="reverse_kl", ratio_cap=math.exp(2)).clipped.tolist()[-1] is False


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_what_is_dropped_has_weight_zero_and_counts_apart_from_what_is_capped(impl):
    # log π/q of −1, 1, 3, 5 and ∞; where the target is zero −f' of pearson_chi2 is −1, and π of 0 is no reason to drop
    arguments = dict(
        policy_logprob=torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, -math.inf]).double(),
        behavior_logprob=torch.tensor([1.0, -1.0, -3.0, -5.0, -math.inf, -1.0]).double(),
        cu_seqlens=packing([1] * 6),
        target_log_score=torch.tensor([0.0, 0.0, -math.inf, -math.inf, -math.inf, 0.0]).double(),
        log_z=torch.tensor(0.0).double(),
    )
    got = weights(arguments, impl, divergence="squared_hellinger", ratio_cap=math.exp(2), ratio_drop=math.exp(4))
    assert got.dropped.tolist() == [False, False, False, True, True, False]
    assert got.clipped.tolist() == [False, False, True, False, False, False]
    assert got.weight[2:5].tolist() == pytest.approx([-math.exp(2), 0, 0])
    assert got.log_ratio.tolist() == pytest.approx([-1, 1, 2, -math.inf, -math.inf, -math.inf])
    assert not weights(arguments, impl, divergence="squared_hellinger", ratio_cap=math.exp(2)).dropped.any()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_satisfying_seen_yet_means_weight_zero(name):
    arguments = batch(LENGTHS, zeros=name in ALLOW_ZEROS)
    none_known = arguments | dict(log_z=torch.tensor(-math.inf).double())
    got = weights(none_known, divergence=name, baseline=3.0)
    assert got.weight.tolist() == [0.0] * len(LENGTHS)
    assert all(bool(torch.isfinite(x).all()) for x in got[:6])


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("name", ALLOW_ZEROS)
def test_off_support_the_pseudo_reward_is_minus_f_prime_at_infinity(name, impl):
    arguments = batch(LENGTHS, zeros=True)
    got = weights(arguments, impl, divergence=name, baseline=0.25)
    off = torch.isneginf(arguments["target_log_score"])
    limit = {"forward_kl": 1, "total_variation": 0.5, "jensen_shannon": math.log(2), "pearson_chi2": 1}
    limit |= {"squared_hellinger": 1, "alpha:0.3": 1 / 0.7, "alpha:0.5": 2}
    assert off.sum() == 3 and bool(torch.isposinf(got.log_t[off]).all())
    assert got.pseudo_reward[off].tolist() == pytest.approx([-limit[name]] * 3)
    expected = got.log_ratio[off].exp() * (-limit[name] - 0.25)
    torch.testing.assert_close(got.weight[off], expected, rtol=1e-12, atol=0)
