"""A divergence of the user's own: accepted when f is a divergence, refused with a reason when it is not."""

import math

import pytest
import torch

from fdpg_kernels import Divergence


def jeffreys(t):
    return t * t.log() - t.log()


def triangular(t):
    return (t - 1) ** 2 / (t + 1)


def triangular_slope(log_t):
    t = log_t.exp()
    return 1 - 4 / (t + 1) ** 2


def test_jeffreys_by_automatic_differentiation():
    divergence = Divergence("jeffreys", jeffreys, math.inf)
    log_t = torch.linspace(-40, 40, 161, dtype=torch.float64)
    torch.testing.assert_close(divergence.f_prime(log_t), log_t + 1 - (-log_t).exp(), rtol=1e-12, atol=1e-12)
    assert not divergence.allows_zeros


def test_jeffreys_with_its_slope_written_out():
    divergence = Divergence("jeffreys", jeffreys, math.inf, lambda log_t: log_t - torch.expm1(-log_t))
    derived = Divergence("jeffreys", jeffreys, math.inf)
    log_t = torch.linspace(-5, 5, 41)
    torch.testing.assert_close(divergence.f_prime(log_t), derived.f_prime(log_t), rtol=1e-5, atol=1e-6)
    assert derived.f_prime(log_t).dtype == torch.float32


@pytest.mark.parametrize("slope", [None, triangular_slope])
def test_a_finite_price_of_zeros_is_charged(slope):
    divergence = Divergence("triangular", triangular, 1.0, slope)
    assert divergence.allows_zeros
    assert divergence.f_prime(torch.tensor([math.inf, 0.0])).tolist() == [1.0, 0.0]


def test_the_derived_slope_works_where_gradients_are_off():
    with torch.no_grad():
        slope = Divergence("triangular", triangular, 1.0).f_prime(torch.tensor([1.0]))
    torch.testing.assert_close(slope, triangular_slope(torch.tensor([1.0])))
    assert not slope.requires_grad


def test_a_power_law_may_be_declared():
    f = lambda t: t - 1 - t.log()  # noqa: E731
    Divergence("mine", f, 1.0, lambda log_t: -torch.expm1(-log_t), power=(-1.0, -1.0))


@pytest.mark.parametrize(
    ("f", "at_infinity", "slope", "reason"),
    [
        (lambda t: -triangular(t), 1.0, None, "not convex"),
        (lambda t: torch.sin(t - 1) - (t - 1), math.inf, None, "not convex"),
        (lambda t: triangular(t) + 0.1, 1.0, None, r"f\(1\) = 0"),
        (lambda t: triangular(t) / 0.0, 1.0, None, r"f\(1\)"),
        (lambda t: t * t.log(), math.inf, lambda log_t: log_t + 1, r"f'\(1\) is not 0; subtract"),
        (triangular, 1.0, lambda log_t: 2 * triangular_slope(log_t), "not the derivative"),
        (triangular, 1.0, lambda log_t: -triangular_slope(log_t), "not the derivative"),
        (triangular, 0.5, None, "exceeds f_prime_at_infinity=0.5"),
        (jeffreys, 3.0, None, "exceeds f_prime_at_infinity=3.0"),
    ],
    ids=["concave", "wavy", "f(1)=0.1", "f(1)=nan", "f'(1)=1", "slope×2", "−slope", "f'(∞)=½", "f'(∞)=3"],
)
def test_what_is_not_a_divergence_is_refused(f, at_infinity, slope, reason):
    with pytest.raises(ValueError, match=reason) as error:
        Divergence("mine", f, at_infinity, slope)
    assert "'mine'" in str(error.value)


@pytest.mark.parametrize(
    ("f", "at_infinity"),
    [
        (lambda t: t * (t - 1) / (t + 1), 1.0),  # triangular discrimination/2 with f'(1) = ½
        (lambda t: 2 * (t - 1) - t.log(), 2.0),  # forward KL with f'(1) = 1
        (lambda t: -t.log(), 0.0),  # forward KL as the paper writes it, f'(1) = −1
    ],
    ids=["triangular", "forward_kl+", "forward_kl−"],
)
def test_an_unnormalised_f_is_normalised_whole_or_refused_for_that_reason(f, at_infinity):
    # lim f(t)/t as the docstring asks for; f' is shifted by f'(1), so f'(∞) has to move with it
    try:
        divergence = Divergence("mine", f, at_infinity)
    except ValueError as error:
        assert "f'(1)" in str(error)
        return
    far = divergence.f_prime(torch.tensor([60.0, math.inf], dtype=torch.float64)).tolist()
    assert far[1] == pytest.approx(far[0], abs=1e-9)
