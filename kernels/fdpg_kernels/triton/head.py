"""The head's products on row chunks: which buffers there are, and which kernel follows which."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import gemm, rows, tiles

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOG2_E = 1 / math.log(2)
CHUNK_ROWS = 4096
CHUNK_BYTES = 2**30  # of E [chunk, V]; 4,096 rows of a 131,072-entry vocabulary in bfloat16
STATISTICS_BYTES = 2**26  # of the partials of an online softmax
SLICE = 16 if INTERPRETED else 32  # partials that a program adds at a time


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
        self.target_ids = self.target_ids.contiguous()
        self.bias = None if self.bias is None else self.bias.contiguous()
        item = self.hidden.element_size()
        self.pitch = -(-self.vocabulary * item // 16) * 16 // item  # of a row of E: TMA wants multiples of 16 bytes
        self.aligned = self.width * item % 16 == 0 and all(x.data_ptr() % 16 == 0 for x in (self.hidden, self.weight))
        self.capability, self.processors = 0, 1
        if not INTERPRETED:
            properties = torch.cuda.get_device_properties(self.hidden.device)
            self.capability = 10 * properties.major + properties.minor
            self.processors = properties.multi_processor_count
        plain = self.bias is None and self.softcap is None
        self.config = tiles.choose(self.capability, self.width, aligned=self.aligned, plain=plain)
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
            self.vocabulary,
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
        if self._e is None:  # at once as high as a chunk can be: one that grows lies beside the one before
            rows = min(self.chunk_rows, self.num_tokens)
            self._e = torch.empty(rows, self.pitch, dtype=self.hidden.dtype, device=self.hidden.device)
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
            # a single row may have any stride
            operands = (
                TensorDescriptor(x, [height, self.width], [self.width, 1], [config.BM, config.BD]),
                TensorDescriptor(w, [self.vocabulary, self.width], [self.width, 1], [config.BV, config.BD]),
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
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,  # one FFMA for scale and shift of a logit; later Tritons leave it off
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
