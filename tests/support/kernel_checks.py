"""Checks of every path of the Triton kernels: small under the interpreter, larger on a GPU, from one list.

A check compares with the float64 definition and yields what it compared, the error and the bound. bfloat16 and float16
gradients may be twice as far off as those of PyTorch's own path in bfloat16. Fresh memory holds NaN.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fdpg_kernels import Divergence, fdpg_loss, linear_logprob, sequence_weights

from .kernel_cases import ALLOW_ZEROS, IGNORED, NAMES, batch, packing
from .kernel_inputs import Place, Values, gradients, make, plain_values, poisoned, relative


class Finding(NamedTuple):
    what: str
    error: float
    bound: float


@contextlib.contextmanager
def rounds_as_a_gpu() -> Iterator[None]:
    """The interpreter truncates float32 to bfloat16, a GPU rounds to nearest even: make it do the same."""
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def round_first(self, source, target):
        if source.dtype.scalar.is_fp32() and target.scalar.is_bf16():
            bits = source.data.view(np.uint32)
            rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) & np.uint32(0xFFFF0000)
            finite = np.isfinite(source.data)
            source = interpreter.TensorHandle(np.where(finite, rounded, bits).view(np.float32), source.dtype.scalar)
        return cast(self, source, target)

    interpreter.InterpreterBuilder.cast_impl = round_first
    try:
        yield
    finally:
        interpreter.InterpreterBuilder.cast_impl = cast


def gradient_findings(
    place: Place, dtype: torch.dtype, found: Values, exact: Values, plain: Values
) -> Iterator[Finding]:
    for name, gradient in found.items():
        twice = 2 * relative(plain[name], exact[name]) if dtype != torch.float32 else 0.0
        yield Finding(f"gradient of {name}", relative(gradient, exact[name]), max(twice, place.relative))


def check_logprob(
    place: Place, dtype: torch.dtype, *, transposed: bool = False, many: int = 0, **variant: Any
) -> Iterator[Finding]:
    """transposed: how the head is stored; many: so many ids of each row, and entropies and log-sum-exps, [1, N, D]."""
    inputs, rng = make(place, dtype, **variant), torch.Generator().manual_seed(1)
    leaves, arguments = inputs.on(place, dtype, transposed)
    target_ids, flags = inputs.target_ids, {}
    if many:
        target_ids = torch.stack([target_ids.roll(i) for i in range(many)], 1).masked_fill(
            (target_ids == IGNORED)[:, None], IGNORED
        )
        target_ids[::2, 1] = target_ids[::2, 0]  # twice in a row
        flags = dict(return_entropy=True, return_lse=True)
    arguments["target_ids"] = target_ids.to(place.device)
    shapes = {"logprob": target_ids.shape, "entropy": (len(target_ids),), "lse": (len(target_ids),)}
    upstream = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items() if many or name == "logprob"}

    def values_of(impl: str, leaves: Values, options: dict[str, Any]) -> Values:
        if not many:
            return {"logprob": linear_logprob(**leaves, **options, impl=impl)}
        shaped = {k: x[None] if isinstance(x, Tensor) else x for k, x in options.items()}
        out = linear_logprob(**leaves | {"hidden": leaves["hidden"][None]}, **shaped, **flags, impl=impl)
        return {name: x.squeeze(0) for name, x in out._asdict().items()}

    def objective(values: Values) -> Tensor:
        return torch.stack([(values[name] * g.to(values[name].device)).sum() for name, g in upstream.items()]).sum()

    with poisoned(place.chunk_rows):
        values = values_of("triton", leaves, arguments)
        found = gradients(objective(values), leaves)
    exact_leaves = {name: x.clone().requires_grad_() for name, x in inputs.leaves.items()}
    exact = values_of("reference", exact_leaves, inputs.options | {"target_ids": target_ids})
    for name, x in values.items():
        yield Finding(f"{name}, nats", float((x.cpu() - exact[name]).detach().abs().max()), place.nats)
    plain = gradients(objective(plain_values(leaves, **arguments)), leaves)
    yield from gradient_findings(place, dtype, found, gradients(objective(exact), exact_leaves), plain)


def check_loss(
    place: Place, dtype: torch.dtype, *, frozen: bool = False, accumulated: bool = False, guarded: bool = False,
    ids_on_cpu: bool = False, one_chunk: bool = False, long: bool = False, divergence: Any = "jensen_shannon",
    **variant: Any,
) -> Iterator[Finding]:  # fmt: skip
    """guarded: rows whose sums leave the range of float32; accumulated: the head's gradient into weight_grad_out."""
    if long:
        place = place._replace(lengths=[place.chunk_rows + 2, 3, place.chunk_rows + 5])
    inputs = make(place, dtype, **variant)
    settings: dict[str, Any] = dict(divergence=divergence, log_z=0.3, cu_seqlens=packing(place.lengths))
    if guarded:
        inputs.sequences["behavior_logprob"][[1, 20, 21]] = -150.0
        inputs.sequences["behavior_logprob"][26] = 200.0
        settings["ratio"] = "none"
    leaves, arguments = inputs.on(place, dtype)
    if ids_on_cpu:
        arguments["target_ids"] = inputs.target_ids
    sequences = {name: x.to(place.device) for name, x in inputs.sequences.items()}
    wanted = {name: x for name, x in leaves.items() if not (frozen and name != "hidden")}
    for name in leaves.keys() - wanted.keys():
        leaves[name].requires_grad_(False)
    into = torch.ones(leaves["weight"].shape, device=place.device) if accumulated else None
    with poisoned(10 * place.chunk_rows if one_chunk else place.chunk_rows):
        out = fdpg_loss(**leaves, **arguments, **sequences, **settings, weight_grad_out=into, impl="triton")
        if into is None:
            found = gradients(out.loss, wanted)
        else:
            out.loss.backward()
            found = {"hidden": leaves["hidden"].grad, "weight": into - 1}
    exact_leaves = {name: x.clone().requires_grad_() for name, x in inputs.leaves.items()}
    exact_arguments = inputs.options | inputs.sequences | settings
    expected = fdpg_loss(**exact_leaves, target_ids=inputs.target_ids, **exact_arguments, impl="reference")
    yield Finding("loss", abs(float(out.loss - expected.loss)), 16 * place.nats * max(1.0, abs(float(expected.loss))))
    lengths = torch.tensor(place.lengths).clamp(min=1)
    off = (out.weights.policy_logprob.cpu().double() - expected.weights.policy_logprob).abs() / lengths
    yield Finding("log-probs, nats a token", float(off.max()), place.nats)
    bound = 8 * place.nats * max(place.lengths) ** 0.5  # errors of a sequence's tokens add up before the exponential
    weight = out.weights.weight.cpu().double()
    yield Finding("weights, relative", relative(weight, expected.weights.weight), bound)
    # the gradient that these very weights make: what is wrong with them has been said
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(place.lengths))
    by_token = -weight[owner] / len(lengths)
    exact_logprob = linear_logprob(**exact_leaves, target_ids=inputs.target_ids, **inputs.options, impl="reference")
    exact = gradients((exact_logprob * by_token).sum(), {name: exact_leaves[name] for name in wanted})
    arguments["target_ids"] = inputs.target_ids.to(place.device)
    plain = gradients((plain_values(leaves, **arguments)["logprob"] * by_token.float().to(place.device)).sum(), wanted)
    yield from gradient_findings(place, dtype, found, exact, plain)


def check_weights(place: Place) -> Iterator[Finding]:
    lengths = [3, 0, 2 * place.block + 1, 1, 40, place.block]
    for name in NAMES:
        arguments = batch(lengths, zeros=name in ALLOW_ZEROS)
        expected = sequence_weights(**arguments, divergence=name, ratio_cap=1.5, reward_cap=2.0, impl="reference")
        moved = {key: x.to(place.device) for key, x in arguments.items()}
        found = sequence_weights(**moved, divergence=name, ratio_cap=1.5, reward_cap=2.0, impl="triton")
        error = (found.weight.cpu() - expected.weight).abs().max()
        yield Finding(name, float(error / expected.weight.abs().max()), 1e-10)


def check_repeated(place: Place) -> Iterator[Finding]:
    """Many runs with sequences that several programs share, bit by bit: whoever is last makes the weight."""
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(place.block + 1, 3 * place.block, (place.sequences,), generator=rng).tolist()
    inputs = make(place._replace(lengths=lengths, width=64, vocabulary=32), torch.bfloat16)
    leaves, arguments = inputs.on(place, torch.bfloat16)
    sequences = {name: x.to(place.device) for name, x in inputs.sequences.items()}
    first, different = None, 0
    for _ in range(place.repeats):
        out = fdpg_loss(**leaves, **arguments, **sequences, cu_seqlens=packing(lengths), log_z=0.3, impl="triton")
        found = [*out.weights, *gradients(out.loss, leaves).values()]
        first = first or [x.clone() for x in found]
        different += not all(torch.equal(a, b) for a, b in zip(first, found, strict=True))
    yield Finding("runs that differ from the first", different, 0)


def check_compiled(place: Place) -> Iterator[Finding]:
    inputs = make(place, torch.bfloat16, bias=True)
    leaves, arguments = inputs.on(place, torch.bfloat16)
    sequences = {name: x.to(place.device) for name, x in inputs.sequences.items()}
    sequences |= {"cu_seqlens": packing(place.lengths), "log_z": torch.tensor(0.3, device=place.device)}

    def step(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = dict(hidden=hidden * 1.0, weight=weight, bias=bias, **arguments)
        return fdpg_loss(**head, **sequences, impl="triton").loss + linear_logprob(**head, impl="triton").mean()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="inductor" if place.device == "cuda" else "aot_eager")
    expected, found = (gradients(call(**leaves), leaves) for call in (step, compiled))
    for name, gradient in found.items():
        yield Finding(f"gradient of {name}", relative(gradient, expected[name].cpu().double()), 0.01)


def check_captured(place: Place) -> Iterator[Finding]:
    """A CUDA graph of linear_logprob, replayed on other hidden states."""
    if place.device != "cuda":
        return
    leaves, arguments = make(place, torch.bfloat16).on(place, torch.bfloat16)
    leaves = {name: x.detach() for name, x in leaves.items()}
    linear_logprob(**leaves, **arguments, impl="triton")  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = linear_logprob(**leaves, **arguments, impl="triton")
    leaves["hidden"].copy_(leaves["hidden"].flip(0))
    graph.replay()
    found = captured.clone()
    expected = linear_logprob(**leaves, **arguments, impl="triton")
    yield Finding("log-probs that differ", float((found != expected).sum()), 0)


ODD = "bias, soft cap, odd widths"
CAPPED = dict(bias=True, softcap=2.5, temperature=0.6)
MINE = Divergence("mine", lambda t: (t - 1) ** 2 / (t + 1), f_prime_at_infinity=1.0)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "whole tiles": dict(even=True),
    "odd widths": dict(odd=True),
    "bias": dict(bias=True),
    "bias, soft cap, temperature": CAPPED,
    ODD: dict(odd=True, **CAPPED),
    "temperature of each row": dict(rows=True),
    "ignored rows hold NaN": dict(ignored=True),
}
LOSSES: dict[str, dict[str, Any]] = VARIANTS | {
    "rows out of range": dict(guarded=True),
    "rows out of range, capped": dict(guarded=True, **CAPPED),
    "one chunk": dict(one_chunk=True),
    "several long sequences": dict(long=True),
    "several long sequences, accumulated": dict(long=True, accumulated=True),
    "ignored rows, ids on the CPU": dict(ignored=True, ids_on_cpu=True),
    "one chunk, ignored rows": dict(one_chunk=True, ignored=True),
    "frozen head": dict(frozen=True),
    "accumulated": dict(accumulated=True),
    "a user's divergence": dict(divergence=MINE),
    "total variation": dict(divergence="total_variation"),
    "forward KL": dict(divergence="forward_kl"),
}
MANY = ("plain", ODD, "temperature of each row", "ignored rows hold NaN")
OTHER_DTYPES = ("plain", ODD, "ignored rows hold NaN", "temperature of each row", "accumulated")
Check = Callable[[Place], Iterator[Finding]]
CHECKS: dict[str, Check] = {
    **{f"log-probs, {name}": partial(check_logprob, dtype=torch.bfloat16, **v) for name, v in VARIANTS.items()},
    **{f"values, {name}": partial(check_logprob, dtype=torch.bfloat16, many=3, **VARIANTS[name]) for name in MANY},
    "log-probs, head stored transposed": partial(check_logprob, dtype=torch.bfloat16, transposed=True),
    **{f"loss, {name}": partial(check_loss, dtype=torch.bfloat16, **v) for name, v in LOSSES.items()},
    "sequence weights": check_weights,
    "same from run to run": check_repeated,
    "torch.compile": check_compiled,
    "CUDA graph": check_captured,
}
for _dtype in (torch.float16, torch.float32):
    for _name in OTHER_DTYPES:
        for _op, _check, _variants in (("log-probs", check_logprob, VARIANTS), ("loss", check_loss, LOSSES)):
            if _name in _variants:
                CHECKS[f"{str(_dtype)[6:]} {_op}, {_name}"] = partial(_check, dtype=_dtype, **_variants[_name])
