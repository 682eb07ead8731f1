"""Every check of what the ops are called with; a ValueError names the argument and what would fit.

Values are looked at only where that costs nothing: on the CPU, and not while torch.compile traces. Elsewhere what they
should not be becomes NaN in the results, never a number.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .arguments import IGNORED, INTEGERS, RATIOS, Head, Number, Options, Sequences, is_ignored, result_dtype, to_device


def as_local(name: str, tensor: Any) -> Any:
    """A plain tensor: the argument itself, or what a replicated DTensor holds on this rank."""
    placements = getattr(tensor, "placements", ())  # a DTensor has them; importing the class takes long
    if not all(placement.is_replicate() for placement in placements):
        raise ValueError(
            f"{name} is a DTensor placed as {tuple(placements)}: if FSDP has sharded it, call the op in the forward of "
            f"the module that FSDP wraps, or pass {name}.full_tensor(); if its vocabulary is split, and hidden equal "
            "on all ranks, pass hidden as a DTensor replicated on the head's mesh, or the head's to_local() to "
            "sharded_linear_logprob. A plain hidden does not say which it is"
        )
    return tensor.to_local() if placements else tensor


def make_head(
    hidden: Tensor,
    target_ids: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: Number,
    softcap: float | None,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Head]:
    """Hidden states [N, D], target ids [N, K] and head as the ops compute with them.

    They are plain tensors, under torch.autocast in its dtype. What is no head of these hidden states is refused with a
    ValueError that names the argument and what would fit; only `check_targets` reads ids, which may lie on the CPU.
    """
    hidden, target_ids = as_local("hidden", hidden), as_local("target_ids", target_ids)
    weight, bias = as_local("weight", weight), as_local("bias", bias)
    if torch.is_autocast_enabled(hidden.device.type):  # as torch's own matrix products take them
        dtype = torch.get_autocast_dtype(hidden.device.type)
        given: Any = hidden, weight, bias
        hidden, weight, bias = (x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in given)
    if not hidden.ndim or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [N, D] or [..., D] and weight [V, D] with one D; "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if not hidden.is_floating_point() or hidden.dtype != weight.dtype:
        raise ValueError(f"hidden and weight must share one floating dtype; got {hidden.dtype} and {weight.dtype}")
    leading = hidden.shape[:-1]
    ids_of_row = target_ids.shape[-1] if target_ids.ndim == hidden.ndim else 1
    if target_ids.shape not in (leading, (*leading, ids_of_row)) or not ids_of_row or target_ids.dtype not in INTEGERS:
        raise ValueError(
            f"target_ids must be [N]={list(leading)}, or K ≥ 1 for each, signed integers; "
            f"got {tuple(target_ids.shape)} {target_ids.dtype}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [V]=[{len(weight)}]; got {tuple(bias.shape)}")
    _check_devices("hidden, weight and bias", hidden, weight, bias)
    if target_ids.device.type != "cpu":
        _check_devices("hidden and target_ids", hidden, target_ids)
    target_ids = target_ids.reshape(leading.numel(), ids_of_row)
    number, rows = _temperature(temperature, hidden, target_ids)
    _check_positive("it must be a positive number", math.inf, temperature=number, softcap=softcap)
    if chunk_bytes is not None and (not isinstance(chunk_bytes, int) or chunk_bytes < 1):
        raise ValueError(f"chunk_bytes={chunk_bytes!r}; it must be a positive whole number, or None")
    head = Head(weight, bias, number, softcap, rows, None, chunk_bytes)
    return hidden.reshape(len(target_ids), weight.shape[1]), target_ids, head


def _temperature(given: Number, hidden: Tensor, target_ids: Tensor) -> tuple[float, Tensor | None]:
    """A temperature as a number, or 1 and that of each row [N]."""
    if not isinstance(given, Tensor):
        return float(given), None
    leading = hidden.shape[:-1]
    if given.requires_grad or given.shape not in ((), leading):
        raise ValueError(
            f"temperature must be a number or a tensor without requires_grad, [] or [N]={list(leading)}; "
            f"got {tuple(given.shape)}{' with requires_grad' * given.requires_grad}"
        )
    if not given.ndim and _may_look(given):
        return float(given), None
    _check_devices("hidden and temperature", hidden, given)
    ignored = to_device(is_ignored(target_ids), hidden.device)
    rows = given.to(result_dtype(hidden)).expand(leading).reshape(-1).masked_fill(ignored, 1.0)
    positive = (rows > 0) & (rows < math.inf)
    if _may_look(rows) and not bool(positive.all()):
        raise ValueError(f"temperature holds {float(rows[~positive][0])}; each must be a positive number")
    return 1.0, rows.masked_fill(~positive, math.nan)


def check_targets(target_ids: Tensor, vocabulary: int) -> None:
    """Refuse ids that are none, where they can be looked at."""
    if _may_look(target_ids) and target_ids.numel():
        largest, smallest = int(target_ids.max()), int(target_ids.min())
        if largest >= vocabulary or (smallest < 0 and bool(((target_ids < 0) & (target_ids != IGNORED)).any())):
            raise ValueError(
                f"target_ids must lie in [0, V={vocabulary}) or be {IGNORED}; they span [{smallest}, {largest}]"
            )


def check_weight_grad_out(into: Tensor | None, weight: Tensor) -> None:
    """Refuse one that weight's gradient cannot be added to."""
    if into is None:
        return
    if into.shape != weight.shape or into.device != weight.device:
        raise ValueError(
            f"weight_grad_out must be {tuple(weight.shape)} on {weight.device}, as weight is; "
            f"got {tuple(into.shape)} on {into.device}"
        )
    if into.dtype not in (result_dtype(weight), weight.dtype) or into.requires_grad:
        raise ValueError(
            f"weight_grad_out must be a {result_dtype(weight)} or {weight.dtype} tensor without requires_grad; "
            f"got {into.dtype}"
        )


def check_sequences(per_token: Tensor, sequences: Sequences, options: Options) -> None:
    """Refuse sequences that do not fit the tokens `per_token` [N], options, and scores that no weight can come of."""
    if per_token.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "fdpg_loss and sequence_weights cannot be captured in a CUDA graph, which would keep this call's tables of "
            "cu_seqlens; call them outside it (linear_logprob can be captured)"
        )
    cu_seqlens, behavior, score, log_z, total = sequences
    num_tokens, num_sequences = len(per_token), len(cu_seqlens) - 1
    if per_token.ndim != 1 or behavior.shape != per_token.shape:
        raise ValueError(
            f"what there is one of for each token must be [N] tensors of one N; "
            f"got {tuple(per_token.shape)} and {tuple(behavior.shape)}"
        )
    if cu_seqlens.ndim != 1 or num_sequences < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be a [B+1] int32 tensor with B ≥ 1; got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )
    if _may_look(cu_seqlens):
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != num_tokens or any(a > b for a, b in zip(ends, ends[1:], strict=False)):
            raise ValueError(f"cu_seqlens must rise from 0 to N={num_tokens}; it runs from {ends[0]} to {ends[-1]}")
    if score.shape != (num_sequences,):
        raise ValueError(f"target_log_score must be [B]=[{num_sequences}]; got {tuple(score.shape)}")
    _check_devices("log-probs and target_log_score", per_token, behavior, score)
    for name, value in (("log_z", log_z), ("baseline", options.baseline)):
        if value is not None and value.shape not in ((), (num_sequences,)):
            raise ValueError(f"{name} must be a scalar or [B]=[{num_sequences}]; got {tuple(value.shape)}")
    if options.ratio not in RATIOS:
        raise ValueError(f"ratio={options.ratio!r}; choose one of {', '.join(RATIOS)}")
    caps = dict(ratio_cap=options.ratio_cap, reward_cap=options.reward_cap)
    _check_positive("a cap must be a positive number, or None for no cap", math.nan, **caps)
    _check_positive("it must be a positive number, or None", math.nan, ratio_drop=options.ratio_drop)
    cap, drop = options.ratio_cap, options.ratio_drop
    if cap is not None and drop is not None and drop <= cap:
        raise ValueError(f"ratio_drop={drop!r} leaves ratio_cap={cap!r} nothing to cap; it must be larger")
    for name, value, exception in (
        ("target_log_score", score, ", or −inf where the target is zero"),
        ("log_z", log_z, ", or −inf where it is not known yet"),
        ("baseline", options.baseline, ""),
    ):
        if value is not None and _may_look(value):
            fits = (value if exception else value.abs()) < math.inf  # and is no NaN
            if not bool(fits.all()):
                raise ValueError(f"{name} holds {float(value[~fits][0])}; it must be a number{exception}")
    if _may_look(score) and not options.divergence.allows_zeros and bool(score.isneginf().any()):
        raise ValueError(options.divergence.refusal)
    if total < 1:
        raise ValueError(f"total_sequences={total}; it must be a positive number, or None for B")


def _check_positive(demand: str, forbidden: float, **numbers: float | None) -> None:
    for name, value in numbers.items():
        if isinstance(value, Tensor) or (value is not None and (not value > 0 or value == forbidden)):
            raise ValueError(f"{name}={value!r}; {demand}")


def _check_devices(what: str, *tensors: Tensor | None) -> None:
    devices = {str(x.device) for x in tensors if x is not None}
    if len(devices) > 1:
        raise ValueError(f"{what} must be on one device; got {', '.join(sorted(devices))}")


def _may_look(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
