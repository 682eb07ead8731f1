"""f-divergences as data: `D_f(π‖p) = Σ_{p>0} p·f(π/p) + f'(∞)·π({p=0})`, with t = π/p and L = log t.

f and f + c·(t−1) define the same divergence, so every f here is normalised to f(1) = f'(1) = 0. The
policy gradient of D_f needs only the pseudo-reward −f'(t) (Go et al. 2023, theorem 1), and needs it from
L: t itself overflows within a few dozen tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from . import derived

LOG_2 = math.log(2.0)
_BY_KEY: WeakValueDictionary[str, Divergence] = WeakValueDictionary()


@dataclass(frozen=True)
class Divergence:
    """A convex f, checked numerically when it is made.

    Attributes:
        name: shown in messages and the key of metrics.
        f: t → f(t), elementwise on positive float64 tensors, f(1) = 0. An f without `f_prime_from_log` may have any
            slope at 1: f − f'(1)·(t − 1), the same divergence, takes its place, and f'(∞) is lowered as well.
        f_prime_at_infinity: lim f(t)/t for t → ∞, the price of probability mass where p is zero.
            `math.inf` means that the divergence is undefined on a target with zeros.
        f_prime_from_log: L → f'(e^L), elementwise in any float dtype, stable for |L| ≤ 80, f'(1) = 0.
            Left out, it is derived from f by automatic differentiation in float64.
        power: (κ, c) where f'(t) = c·(t^κ − 1). Such an f lets the importance ratio and t^κ be
            multiplied as one exponent; leave it out for any other f.
        f_over_t_from_log: L → f(e^L)/e^L, stable for |L| ≤ 700. Left out, it follows from power, or else from f.
        f_at_zero: lim f(t) for t → 0, finite or `math.inf`. Left out, it follows from power, or else from f, which then
            must be within 1e-6 of its limit at t = e^-350.
        kernel_family: the branch of `triton/weigh.slope_of` that computes this f', "power" where power is given.
            Left out, PyTorch evaluates f' between two launches.
        label: shown in tables; the name where it is left out.
        key: a string that `get` takes for this very object while it lives; an operator takes no functions.

    Raises:
        ValueError: f is not convex, f(1) ≠ 0, f'(1) ≠ 0, or another attribute does not belong to f.
    """

    name: str
    f: Callable[[Tensor], Tensor]
    f_prime_at_infinity: float
    f_prime_from_log: Callable[[Tensor], Tensor] | None = None
    power: tuple[float, float] | None = None
    f_over_t_from_log: Callable[[Tensor], Tensor] | None = None
    f_at_zero: float = math.nan
    kernel_family: str | None = None
    label: str = ""
    key: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.f_prime_from_log is None:
            f, slope = self.f, derived.differentiate(self.f)
            at_one = float(slope(torch.zeros(1, dtype=torch.float64)))
            self._set(
                f=lambda t: f(t) - at_one * (t - 1),
                f_prime_from_log=lambda log_t: slope(log_t) - at_one,
                f_prime_at_infinity=self.f_prime_at_infinity - at_one,
            )
        if math.isnan(self.f_at_zero):
            self._set(f_at_zero=derived.limit_at_zero(self.f, self.power))
        if self.f_over_t_from_log is None:
            limits = self.f_at_zero, self.f_prime_at_infinity
            self._set(f_over_t_from_log=derived.divide(self.f, self.power, *limits))
        if self.power is not None:
            self._set(kernel_family="power")
        self._set(label=self.label or self.name, key=f"{self.name} at {id(self):#x}")
        _check(self)
        _BY_KEY[self.key] = self

    def _set(self, **attributes: object) -> None:
        for name, value in attributes.items():
            object.__setattr__(self, name, value)

    @property
    def allows_zeros(self) -> bool:
        """Whether the target may be zero on some sequences."""
        return math.isfinite(self.f_prime_at_infinity)

    @property
    def refusal(self) -> str:
        """Why this divergence, if its f'(∞) is infinite, cannot be used where the target is zero; two ways out."""
        return (
            f"{self.name} is infinite as soon as one sample has target probability 0 "
            "(its f'(∞) is infinite); either soften the target, "
            "exp(b/beta) instead of the hard constraint b, or use alpha:a with a < 1"
        )

    def f_prime(self, log_t: Tensor) -> Tensor:
        """f'(t) from log t; f'(∞) where log t = +inf."""
        return self._on_support(self.f_prime_from_log, log_t)

    def f_over_t(self, log_t: Tensor) -> Tensor:
        """f(t)/t from log t, |log t| ≤ 700; f'(∞) where log t = +inf: what D_f pays for a sample of π."""
        return self._on_support(self.f_over_t_from_log, log_t)

    def _on_support(self, function: Callable[[Tensor], Tensor] | None, log_t: Tensor) -> Tensor:
        assert function is not None
        off_support = torch.isposinf(log_t)
        return function(log_t.masked_fill(off_support, 0.0)).masked_fill(off_support, self.f_prime_at_infinity)


def _check(divergence: Divergence) -> None:
    """Compare f and what was given beside it on a grid; the messages are for whoever wrote f."""
    log_t = torch.arange(-240, 241, dtype=torch.float64) / 40  # exactly 0 at 240
    t, step = log_t.exp(), 1e-6
    f, slope, ratio = divergence.f, divergence.f_prime(log_t), divergence.f_over_t(log_t)
    at_infinity, at_zero = divergence.f_prime_at_infinity, divergence.f_at_zero
    value_at_one = float(f(torch.ones(1, dtype=torch.float64)))
    # an f whose f'(1) = s is the same divergence as f − s·(t−1): compare derivatives up to that constant
    drift = (f(t * (1 + step)) - f(t * (1 - step))) / (2 * step * t) - slope
    drift = drift - drift[241]
    drift[240] = 0  # t = 1, where total variation has its kink
    rises = slope.diff() >= -1e-9 * (1 + slope[1:].abs())
    exponent, factor = divergence.power or (0.0, 0.0)
    is_power = divergence.power is None or torch.allclose(factor * torch.expm1(exponent * log_t), slope, rtol=1e-9)
    demands = (  # in the order in which an author meets them
        (abs(value_at_one) < 1e-9, f"f(1) is {value_at_one:.3g}; a divergence needs f(1) = 0"),
        (slope.isfinite().all(), "f' is not finite for every t in [e^-6, e^6]"),
        ((drift.abs() <= 1e-4 * (1 + slope.abs())).all(), "f_prime_from_log is not the derivative of f"),
        (rises.all(), "f is not convex (f' decreases somewhere in [e^-6, e^6])"),
        (abs(slope[240]) < 1e-9, "f'(1) is not 0; subtract f'(1)·(t−1), which leaves the divergence unchanged"),
        (is_power, f"power={divergence.power} does not describe f': it must be c·(t^κ − 1)"),
        (slope[-1] <= at_infinity + 1e-9, f"f' exceeds f_prime_at_infinity={at_infinity}"),
        (((ratio - f(t) / t).abs() <= 1e-9 * (1 + ratio.abs())).all(), "f_over_t_from_log is not f(t)/t"),
        (f(t)[0] <= at_zero + 1e-9, f"f(e^-6) exceeds f_at_zero={at_zero}"),
    )
    for is_met, message in demands:
        if not bool(is_met):
            raise ValueError(f"divergence {divergence.name!r}: {message}")


def _power(name: str, f: Callable[[Tensor], Tensor], exponent: float, factor: float, label: str = "") -> Divergence:
    return Divergence(
        name,
        f,
        f_prime_at_infinity=-factor if exponent < 0 else math.inf,
        f_prime_from_log=lambda log_t: factor * torch.expm1(exponent * log_t),
        power=(exponent, factor),
        label=label,
    )


def _jensen_shannon_slope(log_t: Tensor) -> Tensor:
    # log 2 + log σ(L) loses all digits near L = 0; log1p(tanh(L/2)) is the same number
    near = torch.log1p(torch.tanh(log_t.clamp(-1.0, 1.0) / 2))
    return torch.where(log_t.abs() < 1, near, LOG_2 + torch.nn.functional.logsigmoid(log_t))


def _jensen_shannon_over_t(log_t: Tensor) -> Tensor:
    # log(2t/(1+t)) is f'(t), and log(2/(1+t)) is f'(1/t)
    return _jensen_shannon_slope(log_t) + (-log_t).exp() * _jensen_shannon_slope(-log_t)


@functools.cache
def alpha(a: float) -> Divergence:
    """Amari's α-divergence, 0 < a < 1: a → 0 is forward KL, a → 1 reverse KL, ½ is 2·squared Hellinger."""
    if not 1e-4 <= a <= 1 - 1e-4:
        raise ValueError(f"alpha:{a:g} is outside (0, 1) or within 0.0001 of its ends, forward_kl and reverse_kl")
    made = _power(f"alpha:{a:g}", lambda t: (t**a - a * t - (1 - a)) / (a * (a - 1)), a - 1, 1 / (a - 1))
    if a == float(f"{a:g}"):  # the name says it all
        made._set(key=made.name)
        _TABLE[made.name] = made
    return made


_TABLE = {
    divergence.name: divergence
    for divergence in (
        _power("forward_kl", lambda t: t - 1 - t.log(), -1.0, -1.0, "forward KL(p‖π)"),
        Divergence(
            "reverse_kl",
            lambda t: t * t.log() - t + 1,
            f_prime_at_infinity=math.inf,
            f_prime_from_log=lambda log_t: log_t,
            f_over_t_from_log=lambda log_t: log_t + torch.expm1(-log_t),
            f_at_zero=1.0,
            kernel_family="reverse_kl",
            label="reverse KL(π‖p)",
        ),
        Divergence(
            "total_variation",
            lambda t: (t - 1).abs() / 2,
            f_prime_at_infinity=0.5,
            f_prime_from_log=lambda log_t: torch.where(log_t.isnan(), log_t, log_t.sign()) / 2,  # sign(NaN) is 0
            f_over_t_from_log=lambda log_t: torch.expm1(-log_t).abs() / 2,
            f_at_zero=0.5,
            kernel_family="total_variation",
            label="total variation",
        ),
        Divergence(
            "jensen_shannon",
            lambda t: t * (2 * t / (1 + t)).log() + (2 / (1 + t)).log(),
            f_prime_at_infinity=LOG_2,
            f_prime_from_log=_jensen_shannon_slope,
            f_over_t_from_log=_jensen_shannon_over_t,
            f_at_zero=LOG_2,
            kernel_family="jensen_shannon",
            label="Jensen–Shannon",
        ),
        _power("squared_hellinger", lambda t: (t.sqrt() - 1) ** 2, -0.5, -1.0, "squared Hellinger"),
        _power("pearson_chi2", lambda t: (t - 1) ** 2 / t, -2.0, -1.0, "Pearson χ²(p‖π)"),
        _power("neyman_chi2", lambda t: (t - 1) ** 2, 1.0, 2.0, "Neyman χ²(π‖p)"),
    )
}
NAMES = tuple(_TABLE)
for _row in _TABLE.values():
    _row._set(key=_row.name)


def get(divergence: str | Divergence) -> Divergence:
    """The divergence called `divergence`: one of `NAMES`, or "alpha:a" with 0 < a < 1.

    Raises:
        ValueError: the name is unknown; the message lists the valid ones.
    """
    return divergence if isinstance(divergence, Divergence) else _named(divergence)


def _named(divergence: str) -> Divergence:
    if not isinstance(divergence, str):
        raise ValueError(f"divergence {divergence!r}: give a name or a Divergence")
    if known := _TABLE.get(divergence) or _BY_KEY.get(divergence):
        return known
    family, _, parameter = divergence.partition(":")
    if family == "alpha":
        try:
            a = float(parameter)
        except ValueError:
            raise ValueError(f"divergence {divergence!r}: write alpha:a with a number a in (0, 1)") from None
        return alpha(a)
    raise ValueError(f"unknown divergence {divergence!r}; choose one of {', '.join(NAMES)}, alpha:a with 0 < a < 1")


# A name means the same at every call: torch.compile need not look inside. This is what
# torch.compiler.assume_constant_result sets, without importing the whole compiler, which takes longer than torch.
_named._dynamo_marked_constant = True  # type: ignore[attr-defined]
