"""What fused LM-head losses can do, tried on a CPU with tiny tensors: the table of features in kernels/README.md.

TRITON_INTERPRET=1 PYTHONPATH=kernels:tests python benchmarks/peer_features.py

Of what can be imported among liger-kernel, cut-cross-entropy and trl. "yes": log-probs and gradients of hidden and head
are within 1e-4 of autograd through full logits (bfloat16 and float16: 4e-2). Else the error, or how far off.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear_cross_entropy

from fdpg_kernels import linear_logprob

N, D, V = 32, 32, 128
IGNORED = -100
LogProb = Callable[..., Tensor]


def liger_flce(hidden, weight, target_ids, bias=None, softcap=None) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as function

    return -function.apply(hidden, weight, target_ids, bias, None, IGNORED, 0.0, 0.0, "none", softcap)[0]


def liger_scaled(hidden, weight, target_ids, temperature=1.0, return_entropy=False) -> Tensor:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction as function,
    )

    found = function.apply(hidden, weight, target_ids, temperature, IGNORED, 1, return_entropy)
    return found[1] if return_entropy else -found


def trl(hidden, weight, target_ids, bias=None, softcap=None, temperature=1.0, return_entropy=False) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction as function

    outputs = ("entropy",) if return_entropy else ()
    found = function.apply(hidden, weight, bias, target_ids, temperature, 48, softcap, 1.0, outputs)
    return found[1] if return_entropy else found[0]


def torch_chunked(hidden, weight, target_ids, bias=None) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return -linear_cross_entropy(hidden, weight, target_ids, linear_bias=bias, reduction="none", options=options)


def cce(hidden, weight, target_ids, softcap=None) -> Tensor:
    """Its form for a CPU: Triton 3.9's interpreter does not run its kernels."""
    from cut_cross_entropy import linear_cross_entropy as function

    return -function(hidden, weight, target_ids, softcap=softcap, reduction="none", impl="torch_compile")


def ours(hidden, weight, target_ids, return_entropy=False, return_lse=False, **options) -> Tensor:
    if not return_entropy and not return_lse:
        return linear_logprob(hidden, weight, target_ids, **options)
    found: Any = linear_logprob(
        hidden, weight, target_ids, return_entropy=return_entropy, return_lse=return_lse, **options
    )
    return found.entropy if return_entropy else found.lse


PEERS: dict[str, LogProb] = {
    "fdpg-kernels": ours,
    "liger-kernel FLCE": liger_flce,
    "liger-kernel scaled": liger_scaled,
    "cut-cross-entropy": cce,
    "trl": trl,
    "torch": torch_chunked,
}


def define(
    hidden, weight, target_ids, bias=None, softcap=None, temperature=1.0, return_entropy=False, return_lse=False
):
    """The definition, through full logits in float64."""
    logits = hidden.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    temperature = temperature[..., None] if isinstance(temperature, Tensor) else temperature
    logprobs = (logits / temperature).log_softmax(-1)
    if return_entropy:
        return -(logprobs.exp() * logprobs).sum(-1)
    if return_lse:
        return (logits / temperature).logsumexp(-1)
    ignored = target_ids == IGNORED
    ids = target_ids.masked_fill(ignored, 0)
    picked = logprobs.gather(-1, ids if ids.ndim == hidden.ndim else ids[..., None])
    return picked.view_as(ids).masked_fill(ignored, 0.0)


def try_one(peer: LogProb, case: Callable[[Tensor, Tensor, Tensor], dict[str, Any]]) -> str:
    """Whether a peer takes a case and is right: `case` changes the arguments, or how the peer is called."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator) * 0.3
    changed = case(hidden, weight, torch.randint(V, (N,), generator=generator))
    hidden, weight, ids = changed.pop("hidden", hidden), changed.pop("weight", weight), changed.pop("target_ids")
    frozen, twice, compiled = (changed.pop(name, False) for name in ("frozen", "twice", "compiled"))
    leaves = [hidden.requires_grad_()] if frozen else [hidden.requires_grad_(), weight.requires_grad_()]
    exact = define(hidden.nan_to_num(), weight, ids, **changed)
    upstream = torch.linspace(-1, 1, exact.numel()).view_as(exact)
    wanted = torch.autograd.grad(exact, leaves, upstream)
    try:
        call = torch.compile(peer, fullgraph=True, backend="aot_eager") if compiled else peer
        found = call(hidden, weight, ids, **changed)
        gradients = torch.autograd.grad(found, leaves, upstream.to(found.dtype), retain_graph=twice)
        if twice:
            gradients = torch.autograd.grad(found, leaves, upstream.to(found.dtype))
    except Exception as error:
        reason = " ".join(str(error).split())
        return "no" if "unexpected keyword argument" in reason else f"no: {type(error).__name__}: {reason[:80]}"
    errors = [
        float((a.detach() - b.detach()).abs().nan_to_num(torch.inf).max())
        for a, b in zip((found, *gradients), (exact, *wanted), strict=True)
    ]
    limit = 1e-4 if hidden.dtype == torch.float32 else 4e-2
    kind = "" if hidden.dtype == torch.float32 else f" ({found.dtype}, log-probs off by {errors[0]:.0e})"
    return f"yes{kind}" if max(errors) < limit else f"wrong by {max(errors):.0e}{kind}"


def with_ids(**changes: Any) -> Callable[[Tensor, Tensor, Tensor], dict[str, Any]]:
    return lambda hidden, weight, ids: {"target_ids": ids, **changes}


def nan_under_ignored(hidden, weight, ids):
    hidden[::4] = torch.nan
    return {"target_ids": ids.index_fill(0, torch.arange(0, N, 4), IGNORED), "hidden": hidden}


def in_dtype(dtype: torch.dtype):
    return lambda hidden, weight, ids: dict(hidden=hidden.to(dtype), weight=weight.to(dtype), target_ids=ids)


CASES = {
    "a gradient for each log-prob": with_ids(),
    "bfloat16": in_dtype(torch.bfloat16),
    "float16": in_dtype(torch.float16),
    "bias": with_ids(bias=torch.linspace(-1, 1, V)),
    "soft cap": with_ids(softcap=2.0),
    "temperature": with_ids(temperature=0.7),
    "temperature of each row": with_ids(temperature=torch.linspace(0.5, 2, N)),
    "entropy, with gradient": with_ids(return_entropy=True),
    "log-sum-exp, with gradient": with_ids(return_lse=True),
    "K ids of each row": lambda h, w, y: {"target_ids": torch.stack([y, y.flip(0), (y + 1) % V], 1)},
    "[B, T, D]": lambda h, w, y: {"hidden": h.view(4, -1, D), "target_ids": y.view(4, -1)},
    "NaN under ignored rows": nan_under_ignored,
    "a frozen head": with_ids(frozen=True),
    "a second backward": with_ids(twice=True),
    "torch.compile(fullgraph=True)": with_ids(compiled=True),
    "head stored as [D, V]": lambda h, w, y: {"weight": w.T.contiguous().T, "target_ids": y},
}


def main() -> None:
    for name, peer in PEERS.items():
        try:
            version = "this tree" if peer is ours else importlib.metadata.version(name.split()[0])
        except importlib.metadata.PackageNotFoundError:
            print(f"\n{name}: not installed")
            continue
        print(f"\n{name}, {version}")
        for feature, case in CASES.items():
            print(f"  {feature:32} {try_one(peer, case)}", flush=True)


if __name__ == "__main__":
    main()
