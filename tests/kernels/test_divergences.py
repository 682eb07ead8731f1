"""The table of divergences against formulas written out independently, in float64."""

import math

import pytest
import torch

from fdpg_kernels import Divergence, divergences
from support.kernel_cases import ALLOW_ZEROS, NAMES

F_PRIME = {  # f'(t), textbook f shifted by c·(t−1) so that f'(1) = 0
    "forward_kl": lambda t: 1 - 1 / t,
    "reverse_kl": lambda t: t.log(),
    "total_variation": lambda t: (t - 1).sign() / 2,
    "jensen_shannon": lambda t: (2 * t / (t + 1)).log(),
    "pearson_chi2": lambda t: 1 - 1 / t**2,
    "neyman_chi2": lambda t: 2 * (t - 1),
    "squared_hellinger": lambda t: 1 - 1 / t.sqrt(),
    "alpha:0.3": lambda t: (t**-0.7 - 1) / -0.7,
    "alpha:0.5": lambda t: (t**-0.5 - 1) / -0.5,
}
F_PRIME_AT_INFINITY = {
    "forward_kl": 1.0,
    "reverse_kl": math.inf,
    "total_variation": 0.5,
    "jensen_shannon": math.log(2),
    "pearson_chi2": 1.0,
    "neyman_chi2": math.inf,
    "squared_hellinger": 1.0,
    "alpha:0.3": 1 / 0.7,
    "alpha:0.5": 2.0,
}


def xlogy(a, b):  # a·log b, 0 where a = 0
    return torch.special.xlogy(a, b)


D_F = {  # D(π, p) as the literature writes it; p may have zeros
    "forward_kl": lambda pi, p: (xlogy(p, p) - xlogy(p, pi)).sum(),
    "reverse_kl": lambda pi, p: (pi * (pi / p).log()).sum(),
    "total_variation": lambda pi, p: (pi - p).abs().sum() / 2,
    # twice the ½–½ Jensen-Shannon: KL(π‖m) + KL(p‖m)
    "jensen_shannon": lambda pi, p: (xlogy(pi, 2 * pi / (pi + p)) + xlogy(p, 2 * p / (pi + p))).sum(),
    "pearson_chi2": lambda pi, p: (p**2 / pi).sum() - 1,
    "neyman_chi2": lambda pi, p: (pi**2 / p).sum() - 1,
    "squared_hellinger": lambda pi, p: 2 - 2 * (pi * p).sqrt().sum(),
    "alpha:0.3": lambda pi, p: (1 - (pi**0.3 * p**0.7).sum()) / (0.3 * 0.7),
    "alpha:0.5": lambda pi, p: 4 * (1 - (pi * p).sqrt().sum()),
}
GRID = torch.arange(-300, 301, dtype=torch.float64) / 10 + 0.003  # log t, never 0, where TV has its kink


def simplex(size, rng, zeros=0):
    weights = torch.rand(size, dtype=torch.float64, generator=rng) ** 3
    weights[:zeros] = 0
    return weights / weights.sum()


def f_divergence(divergence, pi, p):
    on = p > 0
    value = (p[on] * divergence.f(pi[on] / p[on])).sum()
    return value + divergence.f_prime_at_infinity * pi[~on].sum() if bool((~on).any()) else value


@pytest.mark.parametrize("name", NAMES)
def test_f_prime_is_the_written_out_formula(name):
    expected = F_PRIME[name](GRID.exp())
    # torch's softplus drops log1p(e^-20) = 2e-9 beyond |L| = 20, where f' is 20 itself
    atol = 3e-9 if name == "jensen_shannon" else 1e-12
    torch.testing.assert_close(divergences.get(name).f_prime(GRID), expected, rtol=1e-12, atol=atol)


@pytest.mark.parametrize("name", NAMES)
def test_f_prime_is_the_derivative_of_f(name):
    divergence, step = divergences.get(name), 1e-5
    log_t = GRID[GRID.abs() < 8]
    change = divergence.f((log_t + step).exp()) - divergence.f((log_t - step).exp())
    slope = change / (2 * step * log_t.exp())  # df/dt = (df/dL)/t; error O(step²) + ε/(step·t)
    torch.testing.assert_close(divergence.f_prime(log_t), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_f_and_its_slope_vanish_at_one(name):
    divergence = divergences.get(name)
    assert divergence.f(torch.ones(1, dtype=torch.float64)).item() == pytest.approx(0, abs=1e-15)
    assert divergence.f_prime(torch.zeros(1)).item() == 0


@pytest.mark.parametrize("name", NAMES)
def test_f_prime_at_infinity_is_the_limit_of_f_over_t(name):
    divergence = divergences.get(name)
    assert divergence.f_prime_at_infinity == pytest.approx(F_PRIME_AT_INFINITY[name], rel=1e-15)
    t = torch.tensor([1e8, 1e12], dtype=torch.float64)
    near, far = (divergence.f(t) / t).tolist()
    if divergence.allows_zeros:
        assert far == pytest.approx(divergence.f_prime_at_infinity, abs=5e-6)  # Hellinger: 2/√t = 2e-6
        assert abs(near - divergence.f_prime_at_infinity) >= abs(far - divergence.f_prime_at_infinity)
    else:
        assert far > near + 9  # log t gains 9.2 from 1e8 to 1e12
    log_t = torch.tensor([0.0, math.inf], dtype=torch.float64)
    assert divergence.f_prime(log_t).tolist() == [0.0, divergence.f_prime_at_infinity]


@pytest.mark.parametrize("name", NAMES)
def test_float32_keeps_its_digits_up_to_80_nats(name):
    log_t = torch.cat([torch.linspace(-80, 80, 641), torch.tensor([-1e-3, -1e-6, 1e-6, 1e-3])])
    exact = divergences.get(name).f_prime(log_t.double())
    single = divergences.get(name).f_prime(log_t)
    assert single.dtype == torch.float32 and not single.isnan().any()
    fits = exact.abs() < torch.finfo(torch.float32).max  # χ²(p‖π) reaches e^160
    # the argument of exp is known to |L|·ε = 80·6e-8
    torch.testing.assert_close(single[fits].double(), exact[fits], rtol=2e-5, atol=0)
    assert torch.equal(single[~fits], exact[~fits].sign().float() * math.inf)


def test_jensen_shannon_keeps_its_digits_near_one():
    log_t = torch.tensor([1e-7, 1e-5, 1e-3, 1e-2]) * torch.tensor([[1.0], [-1.0]])
    exact = log_t.double()
    series = exact / 2 - exact**2 / 8 + exact**4 / 192
    slope = divergences.get("jensen_shannon").f_prime(log_t)
    torch.testing.assert_close(slope.double(), series, rtol=1e-6, atol=0)


def test_total_variation_is_indifferent_at_one_only():
    log_t = torch.tensor([-1e-300, 0.0, 1e-300], dtype=torch.float64)
    assert divergences.get("total_variation").f_prime(log_t).tolist() == [-0.5, 0.0, 0.5]


@pytest.mark.parametrize("zeros", [0, 4])
@pytest.mark.parametrize("name", NAMES)
def test_d_f_is_the_divergence_of_the_literature(name, zeros):
    divergence, rng = divergences.get(name), torch.Generator().manual_seed(0)
    if zeros and name not in ALLOW_ZEROS:
        pi, p = simplex(12, rng), simplex(12, rng, zeros)
        assert f_divergence(divergence, pi, p).item() == math.inf
        return
    for _ in range(50):
        pi, p = simplex(12, rng), simplex(12, rng, zeros)
        value = f_divergence(divergence, pi, p)
        assert value > 0
        torch.testing.assert_close(value, D_F[name](pi, p), rtol=1e-9, atol=1e-12)
    assert f_divergence(divergence, p, p).abs() < 1e-15 or zeros  # f(0) is infinite for some f


def test_which_divergences_allow_zeros():
    assert set(NAMES) - set(ALLOW_ZEROS) == {"reverse_kl", "neyman_chi2"}


@pytest.mark.parametrize(("a", "end"), [(1e-4, "forward_kl"), (1 - 1e-4, "reverse_kl")])
def test_alpha_tends_to_both_kls(a, end):
    log_t = torch.linspace(-3, 3, 61, dtype=torch.float64)
    limit, near = divergences.get(end), divergences.get(f"alpha:{a}")
    # both are smooth in a: an error of 1e-4 times at most L²·e^3 = 180
    torch.testing.assert_close(near.f_prime(log_t), limit.f_prime(log_t), rtol=0, atol=0.02)
    torch.testing.assert_close(near.f(log_t.exp()), limit.f(log_t.exp()), rtol=0, atol=0.02)


def test_alpha_one_half_is_twice_squared_hellinger():
    half, hellinger = divergences.get("alpha:0.5"), divergences.get("squared_hellinger")
    torch.testing.assert_close(half.f_prime(GRID), 2 * hellinger.f_prime(GRID), rtol=1e-14, atol=0)
    torch.testing.assert_close(half.f(GRID.exp()), 2 * hellinger.f(GRID.exp()), rtol=1e-9, atol=1e-12)
    assert half.f_prime_at_infinity == 2 * hellinger.f_prime_at_infinity


@pytest.mark.parametrize("name", ["", "kl", "JENSEN_SHANNON", "forward_kl "])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError) as error:
        divergences.get(name)
    for valid in (*divergences.NAMES, "alpha:a", "0 < a < 1"):
        assert valid in str(error.value)


@pytest.mark.parametrize("name", ["alpha:2", "alpha:0", "alpha:1", "alpha:-1", "alpha:nan", "alpha:x", "alpha"])
def test_a_wrong_alpha_says_what_is_valid(name):
    with pytest.raises(ValueError, match=r"\(0, 1\)"):
        divergences.get(name)


def test_get_passes_a_divergence_through():
    divergence = divergences.get("alpha:0.25")
    assert isinstance(divergence, Divergence) and divergence.name == "alpha:0.25"
    assert divergences.get(divergence) is divergence
