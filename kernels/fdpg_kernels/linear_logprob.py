"""Log-probs of given tokens straight from hidden states and the LM head, without keeping the logits."""

from __future__ import annotations

from torch import Tensor

from . import chunked, reference
from .reference import IGNORED
from .sequence_weights import choose_impl


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
        impl: "auto" | "chunked" (at most a [chunk, V] block of logits alive) | "reference" (float64, plain).

    Returns:
        [N] float32 (float64 for float64 inputs, and from the reference), accumulated in float32 or better.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit.
    """
    check_head(hidden, weight, target_ids, bias, temperature, softcap)
    if choose_impl(impl) == "reference":
        return reference.linear_logprob(hidden, weight, target_ids, bias=bias, temperature=temperature, softcap=softcap)
    kept = target_ids != IGNORED
    if bool(kept.all()):
        return chunked.linear_logprob(hidden, weight, target_ids, bias, temperature, softcap)
    (rows,) = kept.nonzero(as_tuple=True)  # ignored rows are packed out, not computed and masked
    logprob = chunked.linear_logprob(hidden[rows], weight, target_ids[rows], bias, temperature, softcap)
    return logprob.new_zeros(len(hidden)).index_copy(0, rows, logprob)


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
    if target_ids.device.type == "cpu" and len(target_ids):
        largest, smallest = int(target_ids.max()), int(target_ids.min())
        if largest >= len(weight) or (smallest < 0 and bool(((target_ids < 0) & (target_ids != IGNORED)).any())):
            raise ValueError(
                f"target_ids must lie in [0, V={len(weight)}) or be {IGNORED}; they span [{smallest}, {largest}]"
            )
