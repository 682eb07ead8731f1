"""Log-probs of given tokens straight from hidden states and the LM head, without keeping the logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference
from .dispatch import cast_for_autocast, choose_impl, implementation, without_autocast
from .reference import IGNORED


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """log softmax(head(hidden))[target] of every row; differentiable in hidden, weight and bias.

    Args:
        hidden: final hidden states, [N, D] floating point.
        weight: LM head, [V, D], same dtype as hidden; frozen (requires_grad False) it gets no gradient.
        target_ids: [N] integer; -100 marks an ignored row, whose log-prob is 0.
        bias: [V] or None.
        temperature: logits are divided by it, > 0, after the soft cap.
        softcap: c in c·tanh(logit/c), > 0, or None.
        impl: "auto" | "triton" (no logits in memory; bfloat16 on an NVIDIA GPU) | "chunked" (at most a [chunk, V] block
            of logits alive) | "reference" (float64, plain).

    Returns:
        [N] float32 (float64 for float64 inputs, and from the reference), accumulated in float32 or better.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit.
    """
    hidden, weight, bias = cast_for_autocast(hidden, weight, bias)
    check_head(hidden, weight, target_ids, bias, temperature, softcap)
    impl = choose_impl(impl, hidden, multiplies=True)
    if impl == "reference":
        return reference.linear_logprob(hidden, weight, target_ids, bias=bias, temperature=temperature, softcap=softcap)
    return _LinearLogprob.apply(hidden, weight, target_ids, bias, temperature, softcap, impl)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target_ids, bias, temperature, softcap, impl):
        run = implementation(impl)
        with without_autocast(hidden):
            logprob, kept = run.linear_logprob_forward(hidden, weight, target_ids, bias, temperature, softcap)
        ctx.save_for_backward(hidden, weight, target_ids, bias, logprob, kept)
        ctx.settings = temperature, softcap, impl
        return logprob

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        temperature, softcap, impl = ctx.settings
        needs = ctx.needs_input_grad
        wants = (needs[0], needs[1], needs[3])
        run = implementation(impl)
        with without_autocast(gradient):
            gradients = run.linear_logprob_backward(gradient, *ctx.saved_tensors, temperature, softcap, wants)
        return gradients[0], gradients[1], None, gradients[2], None, None, None


def check_head(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [N, D] and weight [V, D] with one D; got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if not hidden.is_floating_point() or hidden.dtype != weight.dtype:
        raise ValueError(f"hidden and weight must share one floating dtype; got {hidden.dtype} and {weight.dtype}")
    if target_ids.shape != hidden.shape[:1] or target_ids.is_floating_point():
        raise ValueError(
            f"target_ids must be [N]=[{len(hidden)}] integers; got {tuple(target_ids.shape)} {target_ids.dtype}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [V]=[{len(weight)}]; got {tuple(bias.shape)}")
    devices = {str(x.device) for x in (hidden, weight, target_ids, bias) if x is not None}
    if len(devices) > 1:
        raise ValueError(f"hidden, weight, target_ids and bias must be on one device; got {', '.join(sorted(devices))}")
    for name, value in (("temperature", temperature), ("softcap", softcap)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value}; it must be a positive number")
    if target_ids.device.type == "cpu" and len(target_ids) and not torch.compiler.is_compiling():
        largest, smallest = int(target_ids.max()), int(target_ids.min())
        if largest >= len(weight) or (smallest < 0 and bool(((target_ids < 0) & (target_ids != IGNORED)).any())):
            raise ValueError(
                f"target_ids must lie in [0, V={len(weight)}) or be {IGNORED}; they span [{smallest}, {largest}]"
            )
