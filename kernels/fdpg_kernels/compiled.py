"""The ops as single nodes for torch.compile: the tracer sees a name and the shapes that come out, nothing inside.

Used only while torch traces; eager calls go straight to the implementation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import divergences
from .divergences import Divergence
from .reference import SequenceWeights


@dataclass(frozen=True)
class Nodes:
    """An implementation of which every function is one custom operator."""

    impl: str

    def linear_logprob_forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        return _logprob(*arguments, self.impl)

    def linear_logprob_backward(self, *arguments: Any) -> tuple[Tensor | None, ...]:
        *rest, wants = arguments
        return _wanted(_logprob_backward(*rest, list(wants), self.impl), wants)

    def sequence_weights(
        self, *arguments: Any, divergence: Divergence, baseline: Any, **options: Any
    ) -> SequenceWeights:
        arguments = tuple(x.detach() for x in arguments)
        sums, clipped = _weights(*arguments, divergence.name, _tensor(baseline), *options.values(), self.impl)
        return SequenceWeights(*sums.unbind(0), clipped)  # type: ignore[call-arg]

    def fdpg_loss(self, *arguments: Any) -> tuple[Any, ...]:
        *rest, wants, options = arguments
        options = dict(options)
        divergence, baseline = options.pop("divergence"), _tensor(options.pop("baseline"))
        loss, sums, clipped, recomputed, *gradients = _loss(
            *rest, list(wants), divergence.name, baseline, *options.values(), self.impl
        )
        weights = SequenceWeights(*sums.unbind(0), clipped)  # type: ignore[call-arg]
        return loss, weights, recomputed, *_wanted(gradients, wants)


def _run(impl: str) -> Any:
    from .dispatch import load

    return load(impl)


def _tensor(baseline: Tensor | float | None) -> Tensor | None:
    return None if baseline is None else torch.as_tensor(baseline, dtype=torch.float64)


def _wanted(gradients: Any, wants: Any) -> tuple[Tensor | None, ...]:
    return tuple(gradient if want else None for gradient, want in zip(gradients, wants, strict=True))


def _made(gradients: tuple[Tensor | None, ...], like: Tensor) -> list[Tensor]:
    return [like.new_empty(0) if gradient is None else gradient for gradient in gradients]


@torch.library.custom_op("fdpg_kernels::linear_logprob", mutates_args=())
def _logprob(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return _run(impl).linear_logprob_forward(hidden, weight, target_ids, bias, temperature, softcap)


@_logprob.register_fake
def _(hidden, weight, target_ids, bias, temperature, softcap, impl):
    logprob = hidden.new_empty(len(hidden), dtype=_wide(hidden))
    return logprob, torch.empty_like(logprob) if impl == "triton" else logprob.new_empty(2, len(hidden))


@torch.library.custom_op("fdpg_kernels::linear_logprob_backward", mutates_args=())
def _logprob_backward(
    gradient: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    bias: Tensor | None,
    logprob: Tensor,
    kept: Tensor,
    temperature: float,
    softcap: float | None,
    wants: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (gradient, hidden, weight, target_ids, bias, logprob, kept, temperature, softcap, tuple(wants))
    one, two, three = _made(_run(impl).linear_logprob_backward(*arguments), hidden)
    return one, two, three


@_logprob_backward.register_fake
def _(gradient, hidden, weight, target_ids, bias, logprob, kept, temperature, softcap, wants, impl):
    return _fake_gradients(hidden, weight, bias, wants)


@torch.library.custom_op("fdpg_kernels::sequence_weights", mutates_args=())
def _weights(
    policy: Tensor,
    behavior: Tensor,
    cu_seqlens: Tensor,
    score: Tensor,
    log_z: Tensor,
    divergence: str,
    baseline: Tensor | None,
    ratio: str,
    ratio_cap: float | None,
    reward_cap: float | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    from .sequence_weights import sequence_weights

    weights = sequence_weights(
        policy,
        behavior,
        cu_seqlens,
        score,
        log_z,
        divergence=divergence,
        baseline=baseline,
        ratio=ratio,
        ratio_cap=ratio_cap,
        reward_cap=reward_cap,
        impl=impl,
    )
    return torch.stack(weights[:6]), weights.clipped.clone()


@_weights.register_fake
def _(policy, behavior, cu_seqlens, score, log_z, *rest):
    dtype = torch.float64 if rest[-1] == "reference" else _wide(policy)
    return policy.new_empty(6, len(score), dtype=dtype), policy.new_empty(len(score), dtype=torch.bool)


# unsafe in a CUDA graph: chunks are cut on the values of cu_seqlens, and small tables are copied from the host
@torch.library.custom_op(
    "fdpg_kernels::fdpg_loss", mutates_args=("weight_grad_out",), tags=(torch.Tag.cudagraph_unsafe,)
)
def _loss(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    cu_seqlens: Tensor,
    behavior: Tensor,
    score: Tensor,
    log_z: Tensor,
    total_sequences: int,
    weight_grad_out: Tensor | None,
    wants: list[bool],
    divergence: str,
    baseline: Tensor | None,
    ratio: str,
    ratio_cap: float | None,
    reward_cap: float | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = dict(
        divergence=divergences.get(divergence),
        baseline=baseline,
        ratio=ratio,
        ratio_cap=ratio_cap,
        reward_cap=reward_cap,
    )
    sequences = (cu_seqlens, behavior, score, log_z, total_sequences, weight_grad_out)
    loss, weights, recomputed, *gradients = _run(impl).fdpg_loss(
        hidden, weight, target_ids, bias, temperature, softcap, *sequences, tuple(wants), options
    )
    one, two, three = _made(tuple(gradients), hidden)
    return loss, torch.stack(weights[:6]), weights.clipped.clone(), recomputed, one, two, three


@_loss.register_fake
def _(hidden, weight, target_ids, bias, temperature, softcap, cu_seqlens, behavior, score, *rest):
    weight_grad_out, wants = rest[2:4]
    num_sequences = len(score)
    loss = hidden.new_empty((), dtype=_wide(hidden))
    sums = hidden.new_empty(6, num_sequences, dtype=torch.float64)
    flags = [hidden.new_empty(num_sequences, dtype=torch.bool) for _ in range(2)]
    wants = [wants[0], wants[1] and weight_grad_out is None, wants[2]]
    return loss, sums, *flags, *_fake_gradients(hidden, weight, bias, wants)


def _fake_gradients(hidden, weight, bias, wants):
    pairs = zip((hidden, weight, bias), wants, strict=True)
    return tuple(torch.empty_like(x) if want and x is not None else hidden.new_empty(0) for x, want in pairs)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
