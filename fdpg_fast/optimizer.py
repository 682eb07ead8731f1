"""AdamW with one second moment a tensor, whole or divided over processes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from . import ranks


class AdamWPerTensor(torch.optim.Optimizer):
    """AdamW whose second moment is one number of each tensor, the mean square of its gradient.

    Step t moves weights w of n coordinates with gradient g, at rate η and with weight decay λ, by

        m ← β₁·m + (1 − β₁)·g        v ← β₂·v + (1 − β₂)·|g|²/n
        w ← (1 − η·λ)·w − η · m/(1 − β₁ᵗ) / (√(v/(1 − β₂ᵗ)) + ε)

    This is Adam-mini (Zhang et al. 2024, 2406.16793) with whole tensors for blocks. NovoGrad (Ginsburg et al. 2019,
    1905.11286) has such a v, of |g|² and not corrected, but divides by it before it averages.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float = 1e-8,
    ):
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Descend along the gradients that there are; of divided tensors all processes at once."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            states = [self._state_of(parameter) for parameter in parameters]
            if not states:
                continue
            gradients, seconds = [_own(p.grad) for p in parameters], [state["exp_avg_sq"] for state in states]
            (beta, beta_sq), rate = group["betas"], group["lr"]
            squares = ranks.total(torch.stack(torch._foreach_norm(gradients)).double().square())  # [tensors]
            sizes = torch.tensor([parameter.numel() for parameter in parameters]).to(squares)
            second = torch.stack(seconds).double().lerp(squares / sizes, 1 - beta_sq)
            torch._foreach_copy_(seconds, list(second.unbind()))
            for parameter, gradient, state, value in zip(parameters, gradients, states, second.tolist(), strict=True):
                state["step"] += 1
                count = int(state["step"])
                scale = math.sqrt(value / (1 - beta_sq**count)) + group["eps"]
                weight, average = _own(parameter), _own(state["exp_avg"])
                if group["weight_decay"]:
                    weight.mul_(1 - rate * group["weight_decay"])
                # one pass over all three: m ← β₁·m + (1 − β₁)·g, w ← w − lr·m
                options: Any = {"momentum": beta, "dampening": beta, "weight_decay": 0.0, "fused": True}
                options |= {"lr": rate / (1 - beta**count) / scale, "nesterov": False, "maximize": False}
                sgd([weight], [gradient], [average], **options)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
        return state


def _own(tensor: Any) -> Tensor:
    """What this process holds of a tensor; it shares its memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
