"""The head's products on row chunks: which buffers there are, and which kernel follows which."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..arguments import IGNORED, Gradients, Head, LogitGradients, Logprobs, Wants, is_ignored
from ..chunks import CHUNK_ROWS, Sums, card_bytes, even_chunks, plan
from . import entries, gemm, rows, tiles
from .precision import INTERPRETED, Operand, accumulate, as_two, product, stored_as, summands

LOG2_E = 1 / math.log(2)
STATISTICS_BYTES = 2**26  # of the partials of an online softmax
ROWS = 8 if INTERPRETED else 32  # that a program adds the partials of
SLICE = 16 if INTERPRETED else 128  # partials of a row that it adds at a time
WHOLE = 16 if INTERPRETED else 64  # hidden units: a multiple of every tile's BD
DEPTH = 32 if INTERPRETED else 128  # hidden units that a program of a row kernel takes at a time


class Products:
    """The products of one call: hidden states [N, D], an LM head [V, D] and target ids [N, K].

    ends: of sequences that chunks are cut between.

    Attributes, [N] float32, written as the kernels of `rows` get to them:
        target: z_y, the logit of each target, [N, K].
        anchor: a in E = exp(z + a), in log₂ units.
        top: z_y + a, the exponent of the target's entry of E; log π where a = −lse.
        total: s, the sum of a row of E.
        logprob: log π(y) = top − log s.
    Where K > 1 there is no one target for top and logprob to be of.
    """

    def __init__(
        self,
        hidden: Tensor,
        target_ids: Tensor,
        head: Head,
        wants: Wants = (False, False, False),
        ends: list[int] | None = None,
    ):
        self.head = head
        self.weight, self.target_ids = head.weight.contiguous(), target_ids.contiguous()
        ignored = is_ignored(target_ids)
        self.row_ids = torch.where(ignored, IGNORED, 0)  # [N]
        # an ignored row may hold anything, and both gradients' products would take 0·NaN for NaN
        self.hidden = hidden.masked_fill(ignored[:, None], 0.0).contiguous()
        self.bias = None if head.bias is None else head.bias.contiguous()
        self.temperature = None if head.row_temperature is None else head.row_temperature.contiguous()
        self.num_tokens, self.width = hidden.shape
        self.vocabulary = len(self.weight)
        self.stored = dtype, count = stored_as(hidden.dtype)
        item, split = dtype.itemsize, count > 1
        self.pitch = -(-self.vocabulary * item // 16) * 16 // item  # of a row of E: TMA wants multiples of 16 bytes
        aligned = self.width * item % 16 == 0 and all(x.data_ptr() % 16 == 0 for x in (self.hidden, self.weight))
        capability, self.processors, l2_bytes = 0, 1, 0
        if not INTERPRETED:
            properties = torch.cuda.get_device_properties(hidden.device)
            capability = 10 * properties.major + properties.minor
            self.processors, l2_bytes = properties.multi_processor_count, properties.L2_cache_size
        plain = self.bias is None and head.softcap is None and self.temperature is None and not split
        # a summand of float32 has whole tiles, for the next one follows, and the product runs through three
        self.depth = triton.cdiv(self.width, WHOLE) * WHOLE if split else self.width
        wide, aligned = self.depth * (2 * split + 1), aligned or split
        self.config = tiles.choose(capability, wide, aligned=aligned, plain=plain, l2_bytes=l2_bytes)
        self.operands = [Operand(x, self.stored, self.depth) for x in (self.hidden, self.weight)]
        limit = (head.chunk_bytes or card_bytes(hidden.device)) // (self.pitch * item * count)
        if head.chunk_bytes is None:
            limit = min(limit, CHUNK_ROWS)
        self.chunk_rows = max(self.config.BM, limit // self.config.BM * self.config.BM)
        self.groups = plan(ends or [0, self.num_tokens], self.chunk_rows, self.config.BM)
        heights = [chunk.stop - chunk.start for group in self.groups for chunk in group.chunks]
        self.height = max(heights, default=0)  # of the buffer of E
        self.columns = triton.cdiv(self.vocabulary, self.config.BV)
        self.flags: dict[str, Any] = dict(HAS_BIAS=self.bias is not None, HAS_SOFTCAP=head.softcap is not None)
        self.cap = 1.0 if head.softcap is None else head.softcap
        self.target = self._floats(*target_ids.shape)
        self.anchor, self.top, self.total, self.logprob = (self._floats(self.num_tokens) for _ in range(4))
        self._e: Tensor | None = None
        # a single chunk's share of the head's gradient is all of it: no detour by a float32 sum
        wanted = head.weight_grad_dtype or head.weight.dtype
        wanted = wanted if len(heights) == 1 and wanted == dtype else torch.float32
        self.sums = Sums(
            torch.empty_like(hidden) if wants[0] else None,
            torch.empty_like(self.weight, dtype=wanted) if wants[1] else None,
            self._floats(self.vocabulary).zero_() if wants[2] and self.bias is not None else None,
        )

    def chunks(self, start: int, stop: int) -> list[slice]:
        """Rows start:stop in chunks of one height."""
        return even_chunks(start, stop, self.chunk_rows, self.config.BM)

    def find_targets(self, behavior: Tensor | None = None) -> None:
        """Write `target`, and with the log q [N] of a sampler its anchors and tops."""
        if not self.num_tokens:
            return
        rows.target_logits[(triton.cdiv(self.target.numel(), 16),)](
            self.hidden, self.weight, self.bias, self.target_ids, behavior, self.temperature,
            self.target, self.anchor, self.top,
            self.target.numel(), self.target.shape[1], self.width, self.vocabulary, self.width, self.width,
            1 / self.head.temperature, self.cap,
            ANCHORED=behavior is not None, BT=16, BD=DEPTH, **self.flags,
        )  # fmt: skip

    def statistics(self, span: slice, entropy: Tensor | None = None) -> None:
        """Online softmax of these rows: anchor = −lse, top = log π, and entropy [N]; no logits in memory."""
        kinds = 2 if entropy is None else 3
        fits = STATISTICS_BYTES // (4 * kinds * self.columns)
        height = max(self.config.BM, fits // self.config.BM * self.config.BM)
        for chunk in even_chunks(span.start, span.stop, height, self.config.BM):
            partials = self._partials(chunk, kinds)
            self._multiply(chunk, partials, anchored=False)
            self._finish_statistics(chunk, partials, entropy=entropy)

    def anchored(self, chunk: slice) -> None:
        """E = exp(z + a) of these rows into the chunk's buffer, and their `total`.

        Rows where that leaves the range of float32 are done again around their own maximum, all on the device.
        """
        partials, height = self._partials(chunk), chunk.stop - chunk.start
        self._multiply(chunk, partials, anchored=True)
        flag = torch.empty(triton.cdiv(height, ROWS), dtype=torch.int32, device=self.hidden.device)
        rows.sum_rows[(len(flag),)](
            partials[1], self.target_ids, self.total, flag, chunk.start, height, self.columns, BT=ROWS, BS=SLICE
        )
        self._multiply(chunk, partials, anchored=False, flag=flag)
        self._finish_statistics(chunk, partials, flag)
        self._multiply(chunk, partials, anchored=True, flag=flag)

    def add_gradients(
        self, chunk: slice, weight: Tensor, sequence_index: Tensor, divisor: float, into: Sums | None = None
    ) -> None:
        """∇hidden of these rows, and their share of ∇head, out of the E of `anchored`; see `prepare_gradients`.

        weight: of each sequence [B], whose index sequence_index [N] is.
        """
        into = into or self.sums
        height = chunk.stop - chunk.start
        e, scale = self._buffer(height), self._floats(height)
        dtype, count = self.stored
        scaled, depth = torch.empty(count, height, self.width, dtype=dtype, device=self.hidden.device), DEPTH // count
        entries.prepare_gradients[(triton.cdiv(height, 32), triton.cdiv(self.width, depth))](
            self.hidden, *as_two(scaled), *as_two(e), self.target_ids, self.target, self.top, self.total,
            weight, sequence_index, scale, self.temperature,
            chunk.start, height, self.width, self.vocabulary, self.width, self.pitch,
            self.head.temperature, self.cap, divisor,
            HAS_SOFTCAP=self.head.softcap is not None, BT=32, BD=depth,
        )  # fmt: skip
        f = e[..., : self.vocabulary]
        if into.hidden is not None:
            torch.mul(product(f, self.operands[1].matrices()), scale[:, None], out=into.rows(chunk))
        if into.weight is not None:
            accumulate(into.weight, f.mT, scaled, first=into.is_first)
        if into.bias is not None:
            into.bias += product(summands(scale[None], *self.stored).unbind(1), f)[0]
        into.is_first = False

    def add_logit_gradients(self, chunk: slice, results: Logprobs, given: LogitGradients) -> None:
        """∇hidden of these rows, and their share of ∇head, from the gradient of the logits, as the anchor is −lse."""
        height, ids = chunk.stop - chunk.start, self.target_ids.shape[1]
        beta = None if given.beta is None else given.beta[chunk] / LOG2_E  # the product's log π has base 2
        self._multiply(chunk, (), anchored=True, slant=(given.alpha[chunk], beta))
        f, into = self._buffer(height)[..., : self.vocabulary], self.sums
        entries.write_targets[(triton.cdiv(height * ids, 128),)](
            *as_two(f), self.target_ids, results.logprob, results.lse, *given, self.temperature,
            chunk.start, height * ids, ids, self.vocabulary, self.pitch, self.head.temperature, self.cap,
            HAS_SOFTCAP=self.head.softcap is not None, BT=128,
        )  # fmt: skip
        if into.hidden is not None:
            accumulate(into.hidden[chunk], f, self.operands[1].matrices(), first=True)
        if into.weight is not None:
            accumulate(into.weight, f.mT, self.operands[0].matrices(chunk), first=into.is_first)
        if into.bias is not None:
            into.bias += product(f.new_ones(1, 1, height), f)[0]
        into.is_first = False

    def gradients(self) -> Gradients:
        if self.sums.weight is not None and self.sums.is_first:  # no rows came
            self.sums.weight.zero_()
        return self.head.gradients(self.sums.hidden, self.sums.weight, self.sums.bias)

    def _floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.hidden.device)

    def _buffer(self, height: int) -> Tensor:
        if self._e is None:  # at once as high as any chunk: one that grows lies beside the one before
            dtype, count = self.stored
            self._e = torch.empty(count, self.height, self.pitch, dtype=dtype, device=self.hidden.device)
        return self._e[:, :height]

    def _partials(self, chunk: slice, kinds: int = 2) -> Tensor:
        """Of each row and column of tiles: maximum, sum and, for the entropy, moment of the exponentials."""
        return self._floats(kinds, self.columns, chunk.stop - chunk.start)

    def _multiply(
        self,
        chunk: slice,
        partials: Any,
        *,
        anchored: bool,
        flag: Tensor | None = None,
        slant: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> None:
        config, height = self.config, chunk.stop - chunk.start
        x, w = (operand.rows for operand in self.operands)
        pitch = x.shape[1]
        operands: tuple[Any, ...] = x[chunk], w, *(as_two(self._buffer(height)) if anchored else (None, None))
        if config.tma:
            shapes = (height, pitch), (self.vocabulary, pitch), *[(height, self.vocabulary)] * 2
            pitches = pitch, pitch, self.pitch, self.pitch  # a single row may have any stride
            tiles = (config.BM, config.BD), (config.BV, config.BD), *[(config.BM, config.BV)] * 2
            operands = tuple(
                x if x is None else TensorDescriptor(x, [*shape], [pitch, 1], [*tile])
                for x, shape, pitch, tile in zip(operands, shapes, pitches, tiles, strict=True)
            )
        programs = min(triton.cdiv(height, config.BM) * self.columns, self.processors * config.programs_per_sm)
        gemm.head_gemm[(programs,)](
            *operands, self.bias, None if self.temperature is None else self.temperature[chunk],
            self.anchor[chunk] if anchored else None, *slant, *partials, *[None] * (3 - len(partials)), flag,
            height, self.depth, self.vocabulary, pitch, pitch, self.pitch,
            LOG2_E / self.head.temperature, self.cap,
            ANCHORED=anchored, RAGGED=self.vocabulary % config.BV != 0 and slant[0] is None,  # what lies past V adds up
            GUARDED=flag is not None, TMA=config.tma, EVEN_D=self.depth % config.BD == 0, UPCAST=INTERPRETED,
            **self.flags, BM=config.BM, BV=config.BV, BD=config.BD, GROUP_M=config.group_rows, FLAG_ROWS=ROWS,
            SPLIT=self.stored[1] > 1, num_warps=config.num_warps, num_stages=config.num_stages,
            maxnreg=config.registers,
            enable_fp_fusion=True,  # one FFMA for scale and shift of a logit; later Tritons leave it off
        )  # fmt: skip

    def _finish_statistics(
        self, chunk: slice, partials: Tensor, flag: Tensor | None = None, entropy: Tensor | None = None
    ) -> None:
        height = chunk.stop - chunk.start
        rows.finish_statistics[(triton.cdiv(height, ROWS),)](
            *partials, *[None] * (3 - len(partials)), self.row_ids, self.target,
            self.anchor, self.top, self.total, entropy, flag,
            chunk.start, height, self.columns, GUARDED=flag is not None, BT=ROWS, BS=SLICE,
        )  # fmt: skip
