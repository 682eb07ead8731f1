"""From tensors to launches: row chunks, buffers that are used again, and which kernel follows which.

Nothing here waits for the GPU, except where cu_seqlens lies there: chunks are cut on its values.
"""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..chunked import sequence_groups
from ..divergences import Divergence
from ..reference import SequenceWeights
from ..sequence_weights import weights_from_sums
from . import configs, gemm, rows, weights

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOG2_E = 1 / math.log(2)
CHUNK_ROWS = 4096
CHUNK_BYTES = 2**30  # of E [chunk, V]; 4,096 rows of a 131,072-entry vocabulary in bfloat16
STATISTICS_BYTES = 2**26  # of the partials of an online softmax
BLOCK = 16 if INTERPRETED else 128  # tokens of a program between the products
SLICE = 16 if INTERPRETED else 8  # partials that it adds at a time


@dataclass
class Head:
    """One call's hidden states [N, D], LM head [V, D] and targets [N], with what the kernels need to know of them."""

    hidden: Tensor
    weight: Tensor
    target_ids: Tensor
    bias: Tensor | None
    temperature: float
    softcap: float | None
    weight_grad: Tensor | None = None  # [V, D] float32, accumulated
    bias_grad: Tensor | None = None  # [V] float32, accumulated
    weight_grad_is_empty: bool = False  # the first chunk writes instead of adding
    _e: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.num_tokens, self.width = self.hidden.shape
        self.vocabulary = len(self.weight)
        self.hidden, self.weight = self.hidden.contiguous(), self.weight.contiguous()
        item = self.hidden.element_size()
        self.pitch = -(-self.vocabulary * item // 16) * 16 // item  # of a row of E: TMA wants multiples of 16 bytes
        aligned = self.width * item % 16 == 0 and all(x.data_ptr() % 16 == 0 for x in (self.hidden, self.weight))
        capability, self.processors = 0, 1
        if not INTERPRETED:
            properties = torch.cuda.get_device_properties(self.hidden.device)
            capability, self.processors = 10 * properties.major + properties.minor, properties.multi_processor_count
        plain = self.bias is None and self.softcap is None
        self.config = configs.choose(capability, self.width, aligned=aligned, plain=plain)
        limit = max(1, CHUNK_BYTES // (self.pitch * item))
        self.chunk_rows = min(CHUNK_ROWS, max(self.config.BM, limit // self.config.BM * self.config.BM))
        self.columns = triton.cdiv(self.vocabulary, self.config.BV)
        self.flags: dict[str, Any] = dict(HAS_BIAS=self.bias is not None, HAS_SOFTCAP=self.softcap is not None)
        self.cap = 1.0 if self.softcap is None else self.softcap

    def per_token(self) -> Tensor:
        return torch.empty(self.num_tokens, dtype=torch.float32, device=self.hidden.device)

    def chunks(self, start: int, stop: int, height: int) -> list[slice]:
        return [slice(i, min(i + height, stop)) for i in range(start, stop, height)]

    def target_logits(self, behavior: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """z_y, and with log q [N] the sampler's anchors and tops; else these two are left to be written."""
        target, anchor, top = self.per_token(), self.per_token(), self.per_token()
        if self.num_tokens:
            rows.target_logits[(triton.cdiv(self.num_tokens, 16),)](
                self.hidden,
                self.weight,
                self.bias,
                self.target_ids,
                behavior,
                target,
                anchor,
                top,
                self.num_tokens,
                self.width,
                self.vocabulary,
                self.width,
                self.width,
                1 / self.temperature,
                self.cap,
                ANCHORED=behavior is not None,
                BT=16,
                BD=32 if INTERPRETED else 128,
                **self.flags,
            )
        return target, anchor, top

    def statistics(self, target: Tensor, anchor: Tensor, top: Tensor, span: slice) -> None:
        """Online softmax of these rows: anchor = −lse, top = log π; no logits in memory."""
        height = max(self.config.BM, STATISTICS_BYTES // (8 * self.columns) // self.config.BM * self.config.BM)
        for chunk in self.chunks(span.start, span.stop, height):
            partials = self._partials(chunk, 2)
            self._product(chunk, partials, anchored=False)
            self._finish(chunk, partials, target, anchor, top)

    def anchored(self, target: Tensor, anchor: Tensor, top: Tensor, chunk: slice, *, guard: bool) -> Tensor:
        """E = exp(z + a) of these rows into the chunk's buffer; returns the partial row sums [V/BV, C].

        guard: rows whose sum leaves the range of float32 are done again around their own maximum, all on the device.
        """
        partials = self._partials(chunk, 2)
        self._product(chunk, partials, anchored=True, anchor=anchor)
        if guard:
            height = chunk.stop - chunk.start
            flag = torch.empty(triton.cdiv(height, self.config.BM), dtype=torch.int32, device=self.hidden.device)
            rows.find_unsafe_rows[(len(flag),)](
                partials[1],
                self.target_ids,
                flag,
                chunk.start,
                height,
                self.columns,
                BT=self.config.BM,
                BS=SLICE,
            )
            self._product(chunk, partials, anchored=False, flag=flag)
            self._finish(chunk, partials, target, anchor, top, flag=flag)
            self._product(chunk, partials, anchored=True, anchor=anchor, flag=flag)
        return partials[1]

    def gradients(
        self,
        chunk: slice,
        target: Tensor,
        top: Tensor,
        total: Tensor,
        gradient: Tensor,
        hidden_grad: Tensor | None,
        owner: Tensor | None = None,
        divisor: float = 1.0,
    ) -> None:
        """∇hidden of these rows, and their share of ∇head, out of the E of `anchored`; see `prepare_gradients`."""
        height = chunk.stop - chunk.start
        e = self._buffer(height)
        scaled = torch.empty(height, self.width, dtype=self.hidden.dtype, device=self.hidden.device)
        scale = torch.empty(height, dtype=torch.float32, device=self.hidden.device)
        depth = 32 if INTERPRETED else 128
        rows.prepare_gradients[(triton.cdiv(height, 32), triton.cdiv(self.width, depth))](
            self.hidden,
            scaled,
            e,
            self.target_ids,
            target,
            top,
            total,
            gradient,
            owner,
            scale,
            chunk.start,
            height,
            self.width,
            self.width,
            self.pitch,
            self.temperature,
            self.cap,
            divisor,
            HAS_SOFTCAP=self.softcap is not None,
            PER_SEQUENCE=owner is not None,
            BT=32,
            BD=depth,
        )
        f = e[:, : self.vocabulary]
        if hidden_grad is not None:
            torch.mul(_product(f, self.weight), scale[:, None], out=hidden_grad[chunk])
        if self.weight_grad is not None:
            _accumulate(self.weight_grad, f.T, scaled, first=self.weight_grad_is_empty)
            self.weight_grad_is_empty = False
        if self.bias_grad is not None:
            self.bias_grad += _product(scale.to(f.dtype)[None], f)[0]

    def _buffer(self, height: int) -> Tensor:
        if self._e is None or len(self._e) < height:
            self._e = torch.empty(height, self.pitch, dtype=self.hidden.dtype, device=self.hidden.device)
        return self._e[:height]

    def _partials(self, chunk: slice, count: int) -> Tensor:
        shape = (count, self.columns, chunk.stop - chunk.start)
        return torch.empty(shape, dtype=torch.float32, device=self.hidden.device)

    def _product(
        self,
        chunk: slice,
        partials: Tensor,
        *,
        anchored: bool,
        anchor: Tensor | None = None,
        flag: Tensor | None = None,
    ) -> None:
        config, height = self.config, chunk.stop - chunk.start
        x, w = self.hidden[chunk], self.weight
        e = self._buffer(height) if anchored else None
        operands: tuple[Any, ...] = (x, w, e)
        if config.tma:
            operands = (
                TensorDescriptor.from_tensor(x, [config.BM, config.BD]),
                TensorDescriptor.from_tensor(w, [config.BV, config.BD]),
                None
                if e is None
                else TensorDescriptor(e, [height, self.vocabulary], [self.pitch, 1], [config.BM, config.BV]),
            )
        programs = min(triton.cdiv(height, config.BM) * self.columns, self.processors * config.programs_per_sm)
        gemm.head_gemm[(programs,)](
            *operands,
            self.bias,
            None if anchor is None else anchor[chunk],
            partials[0],
            partials[1],
            flag,
            height,
            self.width,
            self.vocabulary,
            self.width,
            self.width,
            self.pitch,
            LOG2_E / self.temperature,
            self.cap,
            ANCHORED=anchored,
            RAGGED=self.vocabulary % config.BV != 0,
            GUARDED=flag is not None,
            TMA=config.tma,
            EVEN_D=self.width % config.BD == 0,
            UPCAST=INTERPRETED,
            BM=config.BM,
            BV=config.BV,
            BD=config.BD,
            GROUP_M=config.group_rows,
            PROGRAMS=programs,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **self.flags,
        )

    def _finish(
        self, chunk: slice, partials: Tensor, target: Tensor, anchor: Tensor, top: Tensor, flag: Tensor | None = None
    ) -> None:
        height = chunk.stop - chunk.start
        rows.finish_statistics[(triton.cdiv(height, self.config.BM),)](
            partials[0],
            partials[1],
            self.target_ids,
            target,
            anchor,
            top,
            flag,
            chunk.start,
            height,
            self.columns,
            GUARDED=flag is not None,
            BT=self.config.BM,
            BS=SLICE,
        )


def linear_logprob_forward(
    hidden: Tensor, weight: Tensor, target_ids: Tensor, bias: Tensor | None, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """log-probs [N] and −lse [N] in log₂ units, which the backward anchors with."""
    with _on(hidden):
        head = Head(hidden, weight, target_ids, bias, temperature, softcap)
        target, anchor, top = head.target_logits(None)
        head.statistics(target, anchor, top, slice(0, head.num_tokens))
    return top, anchor


def linear_logprob_backward(
    gradient: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    bias: Tensor | None,
    logprob: Tensor,
    anchor: Tensor,
    temperature: float,
    softcap: float | None,
    wants: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias; logits are formed again in row chunks."""
    with _on(hidden):
        head = Head(hidden, weight, target_ids, bias, temperature, softcap)
        hidden_grad = torch.empty_like(hidden) if wants[0] else None
        _allocate(head, wants[1], wants[2])
        # z_y is needed for the slope of the cap only
        target = head.target_logits(None)[0] if softcap is not None else logprob
        total = torch.ones_like(logprob)
        for chunk in head.chunks(0, head.num_tokens, head.chunk_rows):
            head.anchored(target, anchor, logprob, chunk, guard=False)
            head.gradients(chunk, target, logprob, total, gradient.contiguous(), hidden_grad)
    return hidden_grad, _like(head.weight_grad, weight), _like(head.bias_grad, bias)


def sequence_weights(
    policy: Tensor,
    behavior: Tensor,
    cu_seqlens: Tensor,
    score: Tensor,
    log_z: Tensor,
    *,
    divergence: Divergence,
    baseline: Tensor | float | None,
    ratio: str,
    ratio_cap: float | None,
    reward_cap: float | None,
) -> SequenceWeights:
    """One launch; float32, or float64 where the policy's log-probs are."""
    dtype = torch.float64 if policy.dtype == torch.float64 else torch.float32
    law = _Law(divergence, len(score), score, log_z, baseline, ratio, ratio_cap, reward_cap, dtype)
    with _on(policy):
        weights.weigh_sequences[(len(score),)](
            policy.contiguous(),
            behavior.contiguous(),
            cu_seqlens.contiguous(),
            *law.tensors,
            len(score),
            *law.strides,
            BT=BLOCK,
            **law.constants,
        )
        return law.result(0, len(score))


def fdpg_loss(
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
    wants: tuple[bool, bool, bool],
    options: dict[str, Any],
) -> tuple[Tensor, SequenceWeights, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """loss, weights (float64), recomputed [B], and the gradients of hidden, weight and bias.

    Where no gradient is wanted the online kernel alone runs and nothing [C, V] is allocated. A sequence longer than a
    chunk is passed over twice: its weight is known when its logits are formed again.
    """
    ends = cu_seqlens.tolist()
    num_sequences, device = len(ends) - 1, hidden.device
    with _on(hidden):
        head = Head(hidden, weight, target_ids, bias, temperature, softcap)
        law = _Law(score=score, log_z=log_z, num_sequences=num_sequences, dtype=torch.float64, **options)
        behavior = behavior.contiguous()
        hidden_grad = torch.empty_like(hidden) if wants[0] else None
        _allocate(head, wants[1], wants[2], weight_grad_out)
        packing = _Packing(ends, device)
        training = any(wants)
        target, anchor, top = head.target_logits(behavior if training else None)
        logprob, total = head.per_token(), head.per_token()
        twice = []
        for first, last in sequence_groups(ends, head.chunk_rows):
            span = slice(ends[first], ends[last])
            fits = training and span.stop - span.start <= head.chunk_rows
            sums = None
            if fits and span.stop > span.start:
                sums = head.anchored(target, anchor, top, span, guard=True)
            elif span.stop > span.start:
                head.statistics(target, anchor, top, span)
            twice += [training and not fits] * (last - first)
            packing.finish(head, law, first, last, sums, span, top, behavior, logprob, total)
            if not training:
                continue
            law.overwrite_with_users(first, last)
            for chunk in head.chunks(span.start, span.stop, head.chunk_rows):
                if not fits:
                    head.anchored(target, anchor, top, chunk, guard=False)
                weight_of = law.results[5]
                head.gradients(chunk, target, top, total, weight_of, hidden_grad, packing.owner, total_sequences)
        if not training:
            law.overwrite_with_users(0, num_sequences)
        found = law.result(0, num_sequences)
        loss = (-(found.weight * found.policy_logprob).sum() / total_sequences).float()
    if weight_grad_out is not None:
        if head.weight_grad is not None and head.weight_grad is not weight_grad_out:
            weight_grad_out += head.weight_grad
        head.weight_grad = None
    recomputed = torch.tensor(twice, dtype=torch.bool, device=device)
    return loss, found, recomputed, hidden_grad, _like(head.weight_grad, weight), _like(head.bias_grad, bias)


@dataclass
class _Law:
    """The divergence and its options as `weigh_sequence` takes them, and where it writes."""

    divergence: Divergence
    num_sequences: int
    score: Tensor
    log_z: Tensor
    baseline: Tensor | float | None
    ratio: str
    ratio_cap: float | None
    reward_cap: float | None
    dtype: torch.dtype

    def __post_init__(self) -> None:
        device = self.score.device
        self.log_z = torch.as_tensor(self.log_z, device=device)
        baseline = self.baseline
        if baseline is not None:
            baseline = torch.as_tensor(baseline, dtype=getattr(baseline, "dtype", torch.float64), device=device)
        self.results = torch.empty(6, self.num_sequences, dtype=self.dtype, device=device)
        self.clipped = torch.empty(self.num_sequences, dtype=torch.int8, device=device)
        self.tensors = (self.score.contiguous(), self.log_z, baseline, self.results, self.clipped)
        self.strides = tuple(int(x is not None and x.ndim == 1 and x.stride(0)) for x in (self.log_z, baseline))
        family = self.divergence.name if self.divergence.power is None else "power"
        self.is_users = family not in ("power", "reverse_kl", "total_variation", "jensen_shannon")
        exponent, factor = self.divergence.power or (0.0, 0.0)
        self.constants: dict[str, Any] = dict(
            FAMILY="reverse_kl" if self.is_users else family,  # a user's f: only the sums are used
            EXPONENT=exponent,
            FACTOR=factor,
            AT_INFINITY=self.divergence.f_prime_at_infinity,
            HAS_RATIO=self.ratio == "sequence",
            LOG_RATIO_CAP=None if self.ratio_cap is None else math.log(self.ratio_cap),
            REWARD_CAP=self.reward_cap,
            HAS_BASELINE=baseline is not None,
        )

    def overwrite_with_users(self, first: int, last: int) -> None:
        """A user's own f is a PyTorch function: the weights of these sequences by `weights_from_sums`."""
        if not self.is_users:
            return
        span = slice(first, last)
        log_z, baseline = (x[span] if isinstance(x, Tensor) and x.ndim else x for x in (self.log_z, self.baseline))
        made = weights_from_sums(
            self.results[0, span].double(),
            self.results[1, span].double(),
            self.score[span],
            torch.as_tensor(log_z),
            divergence=self.divergence,
            baseline=baseline,
            ratio=self.ratio,
            ratio_cap=self.ratio_cap,
            reward_cap=self.reward_cap,
        )
        self.results[:, span] = torch.stack(made[:6]).to(self.dtype)
        self.clipped[span] = made.clipped

    def result(self, first: int, last: int) -> SequenceWeights:
        clipped = self.clipped[first:last].bool()
        return SequenceWeights(*self.results[:, first:last].unbind(), clipped)  # type: ignore[call-arg]


class _Packing:
    """Which program of `finish_sequences` takes which block of which sequence; an empty sequence has one block too."""

    def __init__(self, ends: list[int], device: torch.device):
        lengths = [b - a for a, b in zip(ends, ends[1:], strict=False)]
        blocks = [max(1, -(-n // BLOCK)) for n in lengths]
        self.first_block = [0]
        for count in blocks:
            self.first_block.append(self.first_block[-1] + count)
        sequences = torch.arange(len(lengths), dtype=torch.int32)
        tables = [
            torch.repeat_interleave(sequences, torch.tensor(blocks)),
            torch.tensor(self.first_block, dtype=torch.int32),
            torch.tensor(ends, dtype=torch.int32),
            torch.repeat_interleave(sequences, torch.tensor(lengths)),
        ]
        if device.type == "cuda":
            tables = [x.pin_memory().to(device, non_blocking=True) for x in tables]
        self.block_sequence, self.first_block_of, self.cu_seqlens, self.owner = tables
        self.counter = torch.zeros(len(lengths), dtype=torch.int32, device=device)

    def finish(
        self,
        head: Head,
        law: _Law,
        first: int,
        last: int,
        sums: Tensor | None,
        span: slice,
        top: Tensor,
        behavior: Tensor,
        logprob: Tensor,
        total: Tensor,
    ) -> None:
        """log π of every token and the weights of sequences first:last; without row sums they are 1 (top = log π)."""
        begin, end = self.first_block[first], self.first_block[last]
        rows.finish_sequences[(end - begin,)](
            sums,
            top,
            head.target_ids,
            behavior,
            logprob,
            total,
            self.block_sequence,
            self.first_block_of,
            self.cu_seqlens,
            self.counter,
            *law.tensors,
            begin,
            span.start,
            span.stop - span.start,
            head.columns,
            law.num_sequences,
            *law.strides,
            HAS_SUMS=sums is not None,
            BT=BLOCK,
            BS=SLICE,
            **law.constants,
        )


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a·b with float32 accumulation and result."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _accumulate(into: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """into += a·b in float32; the first one writes."""
    if not (a.is_cuda and a.dtype != torch.float32):
        product = _product(a, b)
        into.copy_(product) if first else into.add_(product)
    elif first:
        torch.mm(a, b, out_dtype=torch.float32, out=into)
    else:
        torch.addmm(into, a, b, out_dtype=torch.float32, out=into)


def _allocate(head: Head, weight: bool, bias: bool, weight_grad_out: Tensor | None = None) -> None:
    if weight:
        head.weight_grad_is_empty = weight_grad_out is None or weight_grad_out.dtype != torch.float32
        head.weight_grad = weight_grad_out
        if head.weight_grad_is_empty:
            head.weight_grad = torch.empty(head.weight.shape, dtype=torch.float32, device=head.weight.device)
            if not head.num_tokens:
                head.weight_grad.zero_()
    if bias and head.bias is not None:
        head.bias_grad = torch.zeros(head.vocabulary, dtype=torch.float32, device=head.weight.device)


def _like(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if gradient is None or parameter is None else gradient.to(parameter.dtype)


def _on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launch where the tensors are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
