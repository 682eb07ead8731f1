"""What follows from a convex f alone where its author gives no closed form: f', f(t)/t and f(0), from L = log t."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]
AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality


def differentiate(f: Function) -> Function:
    """L → f'(e^L) by automatic differentiation in float64, at |L| ≤ 80."""

    def derivative(log_t: Tensor) -> Tensor:
        # an operator runs without autograd under a dispatch mode (a FLOP counter, torch.compile's check of aliases)
        with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(AUTOGRAD, False):
            t = log_t.detach().double().clamp(-80.0, 80.0).exp().requires_grad_()
            (gradient,) = torch.autograd.grad(f(t).sum(), t)
        return gradient.to(log_t.dtype)

    return derivative


def divide(f: Function, power: tuple[float, float] | None, at_zero: float, at_infinity: float) -> Function:
    """L → f(e^L)/e^L: of the integral of c·(t^κ − 1) in closed form, else with limits where f leaves float64."""
    if power is not None:
        exponent, factor = power
        if exponent == -1:  # the one power whose integral is a logarithm
            return lambda log_t: -factor * (1 - (1 + log_t) * (-log_t).exp())
        scale = factor / (exponent + 1)
        return lambda log_t: scale * (torch.expm1(exponent * log_t) + exponent * torch.expm1(-log_t))

    def f_over_t(log_t: Tensor) -> Tensor:
        wide = log_t.double()
        ratio = f(wide.exp()) / wide.exp()
        limit = torch.where(wide > 0, at_infinity, at_zero * (-wide).exp())
        return torch.where(ratio.isfinite(), ratio, limit).to(log_t.dtype)

    return f_over_t


def limit_at_zero(f: Function, power: tuple[float, float] | None) -> float:
    """f(0); infinite where f still changes between e^-350 and e^-700."""
    if power is not None:
        exponent, factor = power
        return factor * exponent / (exponent + 1) if exponent > -1 else math.inf
    near, nearer = f(torch.tensor([-350.0, -700.0], dtype=torch.float64).exp()).tolist()
    return nearer if abs(nearer - near) <= 1e-6 * (1 + abs(near)) else math.inf
