"""The ways to log-probs that the GPU benchmark compares: our ops, PyTorch's, and other libraries' where installed.

A peer's builder imports it, and raises where it is absent; all of them take bfloat16 (hidden, weight, target_ids).
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu_cases import Case, Method
from fdpg_kernels import fdpg_loss, linear_logprob

SMALL_CHUNKS = "ours (triton), 4,096 rows a chunk"  # beside as many as memory allows: for the breakdown alone


def ours(name: str, impl: str, chunk_rows: int | None = None) -> Method:
    def loss(hidden: Tensor, weight: Tensor, case: Case) -> Tensor:
        sequences = (case.cu_seqlens, case.behavior, case.score, torch.zeros((), device=hidden.device))
        chunk_bytes = None if chunk_rows is None else 2 * chunk_rows * len(weight)
        return fdpg_loss(hidden, weight, case.target_ids, *sequences, impl=impl, chunk_bytes=chunk_bytes).loss

    return Method(name, partial(linear_logprob, impl=impl), loss, ours=True)


def plain_logprob(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
    """Full logits in bfloat16, log_softmax in float32, gather: what everybody writes first."""
    logits = hidden @ weight.T
    return logits.log_softmax(-1, dtype=torch.float32).gather(1, target_ids[:, None])[:, 0]


def checkpointed_logprob(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
    """The same, 4096 rows at a time, their logits recomputed in the backward pass."""
    parts = zip(hidden.split(4096), target_ids.split(4096), strict=True)
    options = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.cat([checkpoint(plain_logprob, x, weight, y, **options) for x, y in parts])


EAGER = Method("PyTorch eager", plain_logprob)


def compiled() -> Method:
    return Method("PyTorch compiled", torch.compile(plain_logprob, dynamic=False))


def torch_linear_cross_entropy() -> Method:
    cross_entropy = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if cross_entropy is None:
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return Method("torch linear_cross_entropy", lambda *x: -cross_entropy(*x, reduction="none", options=options))


def liger() -> Method:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    # float32 accumulation of the weight gradient, as ours does; Liger's default is the weight's dtype
    loss = LigerFusedLinearCrossEntropyLoss(reduction="none", accum_dtype=torch.float32)
    return Method("Liger fused linear CE", lambda x, w, y: -loss(w, x, y))


def liger_scaled() -> Method:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return Method("Liger scaled CE", lambda *x: -LigerFusedLinearScaledCrossEntropyFunction.apply(*x))


def cut_cross_entropy() -> Method:
    from cut_cross_entropy import linear_cross_entropy

    # release 25.1.1 has no such preset: there the gradient filter is switched off
    recent = "accum_c_fp32" in inspect.signature(linear_cross_entropy).parameters
    exact = {"impl": "cce_exact"} if recent else {"filter_eps": None}
    return Method("CCE exact", lambda *x: -linear_cross_entropy(*x, reduction="none", **exact))


def trl() -> Method:
    from trl.kernels import ChunkedLogProbFunction

    def logprob(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
        # bias, targets, temperature, vocabulary chunk (TRL's own), softcap, logit scale, no further outputs
        return ChunkedLogProbFunction.apply(hidden, weight, None, target_ids, 1.0, 32768, None, 1.0, ())[0]

    return Method("TRL chunked", logprob)


def quack() -> Method:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return Method(
        "quack chunked, sum only", lambda *x: -chunked_linear_cross_entropy(*x, reduction="sum"), per_token=False
    )


# the most telling first: what has to be left out is left out from the end
METHODS: dict[str, Callable[[], Method]] = {
    "ours (triton)": lambda: ours("ours (triton)", "triton"),
    "PyTorch eager": lambda: EAGER,
    "Liger scaled CE": liger_scaled,
    "CCE exact": cut_cross_entropy,
    "quack chunked, sum only": quack,
    "Liger fused linear CE": liger,
    "ours (chunked)": lambda: ours("ours (chunked)", "chunked"),
    "PyTorch checkpointed": lambda: Method("PyTorch checkpointed", checkpointed_logprob),
    "torch linear_cross_entropy": torch_linear_cross_entropy,
    "TRL chunked": trl,
    "PyTorch compiled": compiled,
    SMALL_CHUNKS: lambda: ours(SMALL_CHUNKS, "triton", 4096),
}
NEEDS = {"Liger": "liger_kernel", "CCE": "cut_cross_entropy", "quack": "quack", "TRL": "trl"}  # by a name's first word
FIRST = 5  # so many at every shape before the others at any


def obstacle(name: str, device: str) -> str | None:
    """Why this method cannot be had here, as far as that can be seen without importing it."""
    package = NEEDS.get(name.split()[0])
    if package and importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if device == "cpu" and name in ("ours (triton)", "PyTorch compiled"):
        return "slow on a CPU"
    return None


def implementation(output: Tensor) -> list[str]:
    """The autograd functions behind a result, those of libraries only: which of its implementations a peer chose."""
    names, waiting = [], [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and len(names) < 5:
            if not type(node).__name__[-1].isdigit() and type(node).__name__ != "AccumulateGrad":
                names.append(type(node).__name__)
            waiting += [function for function, _ in node.next_functions]
    return list(dict.fromkeys(names))
