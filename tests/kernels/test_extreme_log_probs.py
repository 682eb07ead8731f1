"""Sequences of 10⁴ nats: a weight is finite wherever the mathematics is, and float32 sums lose nothing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdpg_kernels import sequence_weights
from support.kernel_cases import NAMES, packing


def one_token(log_pi, log_q, log_p, dtype=torch.float64, **options):
    """Weights of sequences of one token each, Z = 1."""
    columns = [torch.as_tensor(x, dtype=torch.float64).to(dtype).reshape(-1) for x in (log_pi, log_q, log_p)]
    policy, behavior, score = torch.broadcast_tensors(*columns)
    packed = packing([1] * len(policy))
    return sequence_weights(policy, behavior, packed, score, torch.tensor(0.0), impl="chunked", **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("log_pi", [-1e4, -800.0, -100.0, -8.0])
def test_forward_kl_is_p_over_q_however_small_pi_is(log_pi, dtype):
    log_q, log_p, baseline = -5.0, -7.0, 0.25
    got = one_token(log_pi, log_q, log_p, dtype, divergence="forward_kl", baseline=baseline)
    expected = math.exp(log_p - log_q) - math.exp(log_pi - log_q) * (1 + baseline)
    assert float(got.weight) == pytest.approx(expected, rel=1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("kappa_name", [(-0.5, "squared_hellinger", -1.0), (-0.7, "alpha:0.3", 1 / -0.7)])
def test_a_power_law_joins_its_exponents(kappa_name):
    kappa, name, c = kappa_name
    # π/q underflows and t^κ overflows, their product is 1/e
    log_pi, log_q = -4000.0, -2000.0
    log_t = (-1 - (log_pi - log_q)) / kappa
    got = one_token(log_pi, log_q, log_pi - log_t, divergence=name)
    assert float(got.weight) == pytest.approx(-c * math.exp(-1), rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_texts_of_ten_thousand_nats_on_which_all_agree(name):
    # only differences of log-probs matter, whatever their size
    close = one_token(-1.0, -1.5, -2.0, divergence=name, baseline=0.1)
    far = one_token(-1e4, -1e4 - 0.5, -1e4 - 1.0, divergence=name, baseline=0.1)
    torch.testing.assert_close(far.weight, close.weight, rtol=1e-9, atol=0)


extreme = st.floats(-1e4, 1e4)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(extreme, extreme, extreme, st.floats(-3, 3), st.sampled_from([torch.float32, torch.float64]))
def test_caps_keep_any_weight_finite(name, log_pi, log_q, log_p, baseline, dtype):
    caps = dict(ratio_cap=10.0, reward_cap=5.0)
    got = one_token(log_pi, log_q, log_p, dtype, divergence=name, baseline=baseline, **caps)
    assert abs(float(got.weight)) <= 10.0 * (5.0 + abs(baseline)) * (1 + 1e-6)
    assert abs(float(got.pseudo_reward)) <= 5.0 and float(got.log_ratio.exp()) <= 10.0 * (1 + 1e-6)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.floats(-1e4, 0), st.floats(-1e4, 0), st.floats(-1e4, 0))
def test_a_weight_is_never_nan_where_the_exact_one_is_representable(name, log_pi, log_q, log_p):
    ratio, log_t = log_pi - log_q, log_pi - log_p
    kappa = {"forward_kl": -1, "pearson_chi2": -2, "neyman_chi2": 1, "squared_hellinger": -0.5}
    kappa |= {"alpha:0.3": -0.7, "alpha:0.5": -0.5}
    largest = max(ratio, ratio + kappa.get(name, 0) * log_t)  # exponents of the terms of ratio·f'(t)
    got = one_token(log_pi, log_q, log_p, divergence=name)
    if largest < 690:  # e^690 is representable, with room for the factor |f'| ≤ 2e4
        assert bool(torch.isfinite(got.weight).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_thousands_of_tokens_cost_no_digits(dtype):
    rng = torch.Generator().manual_seed(0)
    policy = (-torch.rand(20_000, generator=rng) * 3).to(dtype)
    behavior = policy + (torch.randn(20_000, generator=rng) * 1e-3).to(dtype)
    log_pi, log_q = policy.double().sum(), behavior.double().sum()
    got = sequence_weights(
        policy, behavior, packing([20_000]), (log_pi - 0.5)[None], torch.tensor(0.0), divergence="reverse_kl"
    )
    assert got.weight.dtype == dtype
    # a float32 sum of 30,000 nats would be off by 1e-3 at least
    assert float(got.weight) == pytest.approx(float((log_pi - log_q).exp() * -0.5), rel=1e-6)
    assert float(got.log_t) == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_results_are_float32_unless_float64_was_given(dtype):
    got = one_token([-1.0, -2.0], [-1.5, -1.0], [-1.0, -2.0], dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {x.dtype for x in got[:6]} == {wide} and got.clipped.dtype == torch.bool


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_results_are_detached(impl):
    leaf = lambda *x: torch.tensor(x, dtype=torch.float64, requires_grad=True)  # noqa: E731
    got = sequence_weights(
        leaf(-1.0, -2.0),
        leaf(-1.5, -1.0),
        packing([1, 1]),
        leaf(-1.0, -2.0),
        leaf(0.0)[0],
        baseline=leaf(0.1, 0.2),
        impl=impl,
    )
    assert not any(x.requires_grad for x in got)
