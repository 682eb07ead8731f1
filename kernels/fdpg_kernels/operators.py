"""The ops as PyTorch operators, and which implementation runs them.

An operator is one node for torch.compile and one call for a dispatch mode, whatever happens inside. Its arguments are
those of `Head`, `Sequences` and `Options` one after the other; a gradient that nobody wants is an empty tensor.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import divergences
from .arguments import (
    IGNORED,
    Gradients,
    Head,
    LogitGradients,
    Logprobs,
    Options,
    Sequences,
    Wants,
    is_ignored,
    result_dtype,
)
from .chunks import pack
from .reference import SequenceWeights

IMPLEMENTATIONS = ("auto", "triton", "chunked", "reference")
HEAD = (
    "Tensor weight, Tensor? bias, float temperature, float? softcap, Tensor? row_temperature, "
    "ScalarType? weight_grad_dtype, SymInt? chunk_bytes"
)
SEQUENCES = "Tensor cu_seqlens, Tensor behavior_logprob, Tensor target_log_score, Tensor log_z"
OPTIONS = "str divergence, Tensor? baseline, str ratio, float? ratio_cap, float? ratio_drop, float? reward_cap"
HAS_TRITON = importlib.util.find_spec("triton") is not None  # asked here: torch 2.10 cannot trace it
EXACT = ("ieee", "none")  # settings of float32 products that are no TF32 or bfloat16
MULTIPLIED = (torch.float16, torch.bfloat16, torch.float32)  # by Triton
KERNELS: dict[str, Callable] = {}  # what runs inside each operator
# of the name that this package was imported under: Hugging Face's hub loads several versions in one process
NAMESPACE = re.sub(r"^(?=\d)|\W", "_", __package__)
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def choose_impl(impl: str, tensor: Tensor, *, multiplies: bool = False) -> str:
    """`impl`, with "auto" resolved for an op on this tensor: Triton where it can run, else chunked PyTorch.

    multiplies: the op is a product with the head; float64 is left to PyTorch.

    Raises:
        ValueError: there is no such implementation, or it cannot run here.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r}; choose {', '.join(IMPLEMENTATIONS[:-1])} or reference")
    if impl not in ("auto", "triton"):
        return impl
    obstacle = _obstacle(tensor, multiplies)
    if impl == "triton" and obstacle:
        raise ValueError(f"impl='triton' {obstacle}; impl='chunked' runs everywhere")
    return "chunked" if obstacle or tensor.device.type == "cpu" and impl == "auto" else "triton"


def linear_logprob(hidden: Tensor, target_ids: Tensor, head: Head, with_entropy: bool, impl: str) -> Logprobs:
    """log π of ids [N, K], and of each row the log-sum-exp and, if it is asked for, the entropy."""
    logprob, lse, entropy = _linear_logprob(hidden, target_ids, *head, with_entropy, impl)
    return Logprobs(logprob, lse, entropy if with_entropy else None)


def linear_logprob_backward(
    hidden: Tensor, target_ids: Tensor, head: Head, results: Logprobs, given: LogitGradients, wants: Wants, impl: str
) -> Gradients:
    """Gradients of hidden, weight and bias from those of the logits, which are formed again."""
    made = _linear_logprob_backward(hidden, target_ids, *head, *results[:2], *given, wants, impl)
    return _only_wanted(made, wants)


def sequence_weights(policy: Tensor, sequences: Sequences, options: Options, impl: str) -> SequenceWeights:
    """The weights of B sequences in float32, or float64 where `policy` [N] is, and from the reference."""
    columns, clipped = _sequence_weights(policy, *sequences[:4], *as_schema(options), impl)
    return SequenceWeights(*columns.unbind(), clipped)  # type: ignore[call-arg]


def fdpg_loss(
    hidden: Tensor, target_ids: Tensor, head: Head, sequences: Sequences, options: tuple, wants: Wants, impl: str
) -> tuple[Tensor, Tensor, Tensor, Gradients]:
    """The loss [], the six float columns of `SequenceWeights` [6, B] and its flags [B], gradients.

    options: `as_schema` gives them.
    """
    loss, columns, clipped, *made = _fdpg_loss(hidden, target_ids, *head, *sequences, *options, wants, impl)
    return loss, columns, clipped, _only_wanted(made, wants)


def _operator(schema: str, fake: Callable, *tags: torch.Tag) -> Callable[[Callable], Callable]:
    """Register an operator and what it is to torch.compile; return what calls it."""
    name = schema.partition("(")[0]

    def register(kernel: Callable) -> Callable:
        def run(first: Tensor, *rest: Any) -> Any:
            kind = first.device.type
            matmul = (torch.backends.cuda if kind == "cuda" else torch.backends.mkldnn).matmul
            if (before := matmul.fp32_precision) in EXACT and not torch.is_autocast_enabled(kind):
                return kernel(first, *rest)
            try:  # products have the dtype that they are written with, whatever the caller has set
                matmul.fp32_precision = EXACT[0]
                with torch.autocast(kind, enabled=False):
                    return kernel(first, *rest)
            finally:
                matmul.fp32_precision = before

        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        KERNELS[name] = run
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    return register


def _fake_logprob(hidden, target_ids, *rest):
    dtype, rows = result_dtype(hidden), len(hidden)
    lse = hidden.new_empty(rows, dtype=torch.float64)
    return hidden.new_empty(target_ids.shape, dtype=dtype), lse, hidden.new_empty(rows if rest[-2] else 0, dtype=dtype)


@_operator(
    f"linear_logprob(Tensor hidden, Tensor target_ids, {HEAD}, bool with_entropy, str impl) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_logprob,
)
def _linear_logprob(hidden, target_ids, *rest):
    *head, with_entropy, impl = rest
    logprob, lse, entropy = _load(impl).linear_logprob(hidden, target_ids, Head(*head), with_entropy)
    ignored = is_ignored(target_ids)
    logprob, lse = logprob.masked_fill(target_ids == IGNORED, 0.0), lse.masked_fill(ignored, 0.0)
    return logprob, lse, logprob.new_empty(0) if entropy is None else entropy.masked_fill(ignored, 0.0)


def _fake_gradients(hidden, weight, bias, wants):
    pairs = zip((hidden, weight, bias), wants, strict=True)
    return tuple(hidden.new_empty(0) if x is None or not want else x.new_empty(x.shape) for x, want in pairs)


@_operator(
    f"linear_logprob_backward(Tensor hidden, Tensor target_ids, {HEAD}, Tensor logprob, Tensor lse, "
    "Tensor at_target, Tensor alpha, Tensor? beta, bool[] wants, str impl) -> (Tensor, Tensor, Tensor)",
    lambda hidden, target_ids, weight, bias, *rest: _fake_gradients(hidden, weight, bias, rest[-2]),
)
def _linear_logprob_backward(hidden, target_ids, *rest):
    head, results, given = Head(*rest[:7]), Logprobs(rest[7], rest[8], None), LogitGradients(*rest[9:12])
    wants, impl = rest[12:]
    made = _load(impl).linear_logprob_backward(hidden, target_ids, head, results, given, tuple(wants))
    return _all_tensors(made, hidden)


def _fake_weights(policy, cu_seqlens, behavior, score, *rest):
    dtype = torch.float64 if rest[-1] == "reference" else result_dtype(policy)
    return policy.new_empty(6, len(score), dtype=dtype), policy.new_empty(len(score), dtype=torch.bool)


@_operator(f"sequence_weights(Tensor policy, {SEQUENCES}, {OPTIONS}, str impl) -> (Tensor, Tensor)", _fake_weights)
def _sequence_weights(policy, *rest):
    sequences, options, impl = Sequences(*rest[:4]), _from_schema(rest[4:10]), rest[10]
    if impl == "triton" and options.divergence.kernel_family is None:
        impl = "chunked"  # a user's own f is a PyTorch function
    weights = _load(impl).sequence_weights(policy, sequences, options)
    dtype = torch.float64 if impl == "reference" else result_dtype(policy)
    return torch.stack(weights[:6]).to(dtype), weights.clipped


def _fake_loss(hidden, target_ids, weight, bias, *rest):
    weight_grad_dtype, score, wants, num_sequences = rest[3], rest[7], rest[-2], len(rest[7])
    of_hidden, of_weight, of_bias = _fake_gradients(hidden, weight, bias, wants)
    gradients = of_hidden, of_weight.to(weight_grad_dtype if wants[1] else hidden.dtype), of_bias
    columns = score.new_empty(6, num_sequences, dtype=torch.float64)
    clipped = hidden.new_empty(num_sequences, dtype=torch.bool)
    return hidden.new_empty((), dtype=result_dtype(hidden)), columns, clipped, *gradients


# unsafe in a CUDA graph: chunks are cut on the values of cu_seqlens, and small tables are copied from the host
@_operator(
    f"fdpg_loss(Tensor hidden, Tensor target_ids, {HEAD}, "
    f"{SEQUENCES}, SymInt total, {OPTIONS}, bool[] wants, str impl) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_loss,
    torch.Tag.cudagraph_unsafe,
)
def _fdpg_loss(hidden, target_ids, *rest):
    head, sequences, options = Head(*rest[:7]), Sequences(*rest[7:12]), _from_schema(rest[12:18])
    wants, impl = rest[18:]
    live, rows = None, hidden
    if impl == "chunked" or target_ids.device.type == "cpu":  # else the GPU would be waited for
        rows, target_ids, head, sequences, live = pack(hidden, target_ids, head, sequences)
    loss, weights, made = _load(impl).fdpg_loss(rows, target_ids, head, sequences, options, tuple(wants))
    if live is not None and made[0] is not None:
        made = torch.zeros_like(hidden).index_copy_(0, live, made[0]), *made[1:]
    return loss, torch.stack(weights[:6]), weights.clipped, *_all_tensors(made, hidden)


def as_schema(options: Options) -> tuple[Any, ...]:
    """The options with the divergence's key for itself, as torch.compile of 2.10 and 2.11 takes them to a Function."""
    return options.divergence.key, *options[1:]


def _from_schema(values: tuple[Any, ...]) -> Options:
    return Options(divergences.get(values[0]), *values[1:])


def _all_tensors(gradients: Gradients, like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if x is None else x.contiguous() for x in gradients)


def _only_wanted(gradients: Any, wants: Wants) -> Gradients:
    hidden, weight, bias = (x if want else None for x, want in zip(gradients, wants, strict=True))
    return hidden, weight, bias


def _load(impl: str) -> ModuleType:
    """The module of an implementation, imported when it is first used."""
    return importlib.import_module(".triton.launch" if impl == "triton" else f".{impl}", __package__)


def _obstacle(tensor: Tensor, multiplies: bool) -> str | None:
    """Why Triton cannot take this tensor."""
    if not HAS_TRITON:
        return "needs the package triton, which is not installed"
    if not (tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        if tensor.device.type != "cuda" or torch.version.cuda is None:
            return f"needs an NVIDIA GPU, not {tensor.device}"
        if torch.cuda.get_device_capability(tensor.device) < (8, 0):
            return "needs a GPU of compute capability 8.0 or newer"
    if multiplies and tensor.dtype not in MULTIPLIED:
        return f"takes float16, bfloat16 or float32, not {tensor.dtype}"
    return None
