"""Packed rows: prompts and completions without padding through a model's layers, each prompt computed once.

C prompts and their B completions become one row of tokens, prompts first. Only attention has to know who belongs to
whom, so it is the one thing replaced, through transformers' attention registry. It asks a layout that the forward pass
is given; without one it is plain SDPA, so that the model stays an ordinary transformers model. A layout has

* `max_length`: tokens of the longest text, prompt and completion together, and
* `attend(query, key, value, scale)`: [R, H, T, d] each (fewer heads in key and value) → [R, T, H, d].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..errors import UserError
from ..rollouts import Rollouts

IMPLEMENTATION = "fdpg_packed"


def _attention(module, query, key, value, attention_mask, *, layout=None, scaling=None, **options):
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    window = options.get("sliding_window")
    if window is not None and layout.max_length > window:
        raise UserError(f"prompt and completion reach {layout.max_length} tokens, past the model's window of {window}")
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise UserError(f"{type(module).__name__}: attention with a soft cap or sinks is not supported")
    return layout.attend(query, key, value, scaling), None


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def run(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, layout: Any, cache: Cache | None = None
) -> Tensor:
    """Final hidden states of rows of tokens, [R, T] → [R, T, D]; layers add their keys and values to the cache."""
    output = model.base_model(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=torch.empty(1, 1, 1, 1, device=input_ids.device),  # 4-D: handed through as it is, and not read
        past_key_values=cache,
        use_cache=cache is not None,
        layout=layout,
    )
    return output.last_hidden_state


def sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float | None, **options: Any) -> Tensor:
    shared = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=shared, **options)


class PackedBatch:
    """The layout of a micro-batch of rollouts as one row of M tokens.

    Attributes:
        input_ids: every prompt once, then every completion without its last token, which predicts nothing, [1, M].
        position_ids: of each token in its text, [1, M].
        prompts, completions: the stretches of the row that are theirs.
        context_index: which prompt each completion continues, [B].
        target_rows: the row of the hidden states that predicts each completion token, [N].
    """

    def __init__(self, rollouts: Rollouts, device: torch.device, dtype: torch.dtype):
        prompts = [torch.tensor(context.token_ids) for context in rollouts.contexts]
        prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
        context_index, input_lengths = rollouts.context_index.cpu(), rollouts.lengths.cpu() - 1
        prompts_end, own_prompt_length = int(prompt_lengths.sum()), prompt_lengths[context_index]
        self.max_length = int((own_prompt_length + input_lengths).max()) + 1
        self.prompts, self.completions = Segments(prompt_lengths, device), Segments(input_lengths, device)
        self.context_index, self._prompts_end = context_index.to(device), prompts_end

        ends = rollouts.cu_seqlens.long().cpu()
        is_first, is_last = torch.zeros(2, rollouts.num_tokens, dtype=torch.bool)
        is_first[ends[:-1]], is_last[ends[1:] - 1] = True, True
        self.input_ids = torch.cat([*prompts, rollouts.token_ids.cpu()[~is_last]])[None].to(device)
        lengths = torch.cat([prompt_lengths, input_lengths])
        first_position = torch.cat([torch.zeros_like(prompt_lengths), own_prompt_length]) - _starts(lengths)
        positions = torch.arange(int(lengths.sum())) + first_position.repeat_interleave(lengths)
        self.position_ids = positions[None].to(device)
        target_rows = torch.empty(rollouts.num_tokens, dtype=torch.long)
        target_rows[is_first] = (prompt_lengths.cumsum(0) - 1)[context_index]
        target_rows[~is_first] = torch.arange(prompts_end, int(lengths.sum()))
        self.target_rows = target_rows.to(device)

        longest = self.completions.longest
        own = torch.ones(longest, longest, dtype=torch.bool, device=device).tril().expand(len(input_lengths), -1, -1)
        prompt = self.prompts.is_real[self.context_index][:, None].expand(-1, longest, -1)
        allowed = torch.cat([prompt, own], dim=2)[:, None]  # [B, 1, T, P+T]; padding of completions comes after all
        self._mask = torch.zeros(allowed.shape, device=device, dtype=dtype).masked_fill_(~allowed, float("-inf"))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attention in the one row, [1, H, M, d] each → [1, M, H, d]: a completion sees its prompt and itself."""
        lengths = [self._prompts_end, query.shape[2] - self._prompts_end]
        of_prompts, own = zip(*(x[0].split(lengths, dim=1) for x in (query, key, value)), strict=True)
        q, k, v = map(self.prompts.pad, of_prompts)
        rows = [self.prompts.unpad(sdpa(q, k, v, scale, is_causal=True))]
        if self.completions.longest:
            own_q, own_k, own_v = map(self.completions.pad, own)
            keys = torch.cat([k.index_select(0, self.context_index), own_k], dim=2)
            values = torch.cat([v.index_select(0, self.context_index), own_v], dim=2)
            attended = sdpa(own_q, keys, values, scale, attn_mask=self._mask.to(query.dtype))
            rows.append(self.completions.unpad(attended))
        return torch.cat(rows)[None]


class Segments:
    """S ragged stretches of tokens, one behind the other, and their padded view."""

    def __init__(self, lengths: Tensor, device: torch.device):
        self.longest = int(lengths.max()) if len(lengths) else 0
        offsets = torch.arange(self.longest)
        is_real = offsets < lengths[:, None]
        self.is_real = is_real.to(device)  # [S, T]
        self._rows = (_starts(lengths)[:, None] + offsets).masked_fill(~is_real, 0).to(device)  # [S, T]
        self._places = is_real.flatten().nonzero()[:, 0].to(device)  # [n]

    def pad(self, packed: Tensor) -> Tensor:
        """[H, n, d] → [S, H, T, d]; padding is 0."""
        by_row = packed.transpose(0, 1).reshape(packed.shape[1], -1)
        padded = _Move.apply(by_row, self._rows, self.is_real, self._places, True)
        return padded.view(*self._rows.shape, *packed.shape[::2]).transpose(1, 2)

    def unpad(self, padded: Tensor) -> Tensor:
        """[S, H, T, d] → [n, H, d], the real rows in packed order."""
        by_row = padded.transpose(1, 2).reshape(self._rows.numel(), -1)
        packed = _Move.apply(by_row, self._rows, self.is_real, self._places, False)
        return packed.view(-1, padded.shape[1], padded.shape[3])


class _Move(torch.autograd.Function):
    """[n, D] → [S·T, D] or back, which are each other's backward pass: index_select's own adds row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, is_real: Tensor, places: Tensor, pads: bool) -> Tensor:
        ctx.segments, ctx.pads = (rows, is_real, places), pads
        if pads:
            return x.index_select(0, rows.flatten()).masked_fill_(~is_real.view(-1, 1), 0.0)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _Move.apply(gradient, *ctx.segments, not ctx.pads), None, None, None, None


def _starts(lengths: Tensor) -> Tensor:
    return lengths.cumsum(0) - lengths
