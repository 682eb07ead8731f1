"""Packed rows: prompts and completions without padding through a model's layers, each prompt computed once.

C prompts and their B completions become one row of tokens, prompts first. Only attention has to know who belongs to
whom, so it is the one thing replaced, through transformers' attention registry. It asks a layout that the forward pass
is given; without one it is plain SDPA, so that the model stays an ordinary transformers model. A layout has
`attend(query, key, value, scale)`: [R, H, T, d] each (fewer heads in key and value) → [R, T, H, d].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..errors import UserError
from ..rollouts import Rollouts

IMPLEMENTATION = "fdpg_packed"
UNLIMITED = 2**31  # tokens
# keys of configs: windows of layers that are not full attention, and how many tokens others choose from all
SLIDING, MASKED = ("sliding_window", "sliding_window_size"), ("attention_chunk_size", "index_topk", "keep_window_size")


def _attention(module, query, key, value, attention_mask, *, layout=None, scaling=None, **options):
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise UserError(f"{type(module).__name__}: attention with a soft cap or sinks is not supported")
    return layout.attend(query, key, value, scaling), None


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def window(config: PretrainedConfig) -> int:
    """Tokens of the longest text of which every layer sees all that precedes: none needs a mask beside the causal one.

    Models differ in whether they tell attention of a window or only mask what is outside it, so the config is asked.
    """
    layers = set(getattr(config, "layer_types", None) or ())
    keys = MASKED if layers == {"full_attention"} else MASKED + SLIDING
    return min(getattr(config, key, None) or UNLIMITED for key in keys)


def rotary_limits(config: PretrainedConfig) -> Iterator[tuple[str, int]]:
    """Rotary scalings of which a forward pass takes one by its longest text, and the length up to which it is one."""
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):  # of all layers, or of each kind of them
        kind = parameters.get("rope_type") if isinstance(parameters, dict) else None
        if kind == "longrope":
            yield kind, parameters["original_max_position_embeddings"]
        elif kind == "dynamic":
            yield kind, config.max_position_embeddings


def run(model: PreTrainedModel, tokens: Tensor, positions: Tensor, layout: Any, cache: Cache | None = None) -> Tensor:
    """Final hidden states of rows of tokens, [R, T] → [R, T, D]; layers add their keys and values to the cache."""
    output = model.base_model(
        input_ids=tokens,
        position_ids=positions,
        attention_mask=torch.empty(1, 1, 1, 1, device=tokens.device),  # 4-D: handed through as it is, and not read
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

    In the row comes every prompt once, then every completion without its last token, which predicts nothing.
    """

    def __init__(self, rollouts: Rollouts, device: torch.device, dtype: torch.dtype):
        context_index = rollouts.context_index.cpu()
        prompts = [torch.tensor(context.token_ids) for context in rollouts.contexts]
        inputs = [tokens[:-1] for tokens in rollouts.token_ids.cpu().split(rollouts.lengths.tolist())]
        prompt_lengths, input_lengths = (torch.tensor([len(text) for text in texts]) for texts in (prompts, inputs))
        starts = [0] * len(prompts) + prompt_lengths[context_index].tolist()
        positions = [torch.arange(i, i + len(text)) for i, text in zip(starts, prompts + inputs, strict=True)]
        self.input_ids = torch.cat(prompts + inputs)[None].to(device)  # [1, M]
        self.position_ids = torch.cat(positions)[None].to(device)  # [1, M], in each text

        # a completion's first token is predicted by its prompt's last, the others by the token before each
        self._prompts_end = int(prompt_lengths.sum())
        sequence = torch.arange(len(rollouts)).repeat_interleave(rollouts.lengths.cpu())
        target_rows = self._prompts_end - 1 + torch.arange(rollouts.num_tokens) - sequence
        target_rows[rollouts.cu_seqlens[:-1].long().cpu()] = (prompt_lengths.cumsum(0) - 1)[context_index]
        self.target_rows = target_rows.to(device)  # [N], of the hidden states that predict the completions' tokens

        self._prompts, self._completions = Segments(prompt_lengths, device), Segments(input_lengths, device)
        self._context_index, longest = context_index.to(device), self._completions.longest
        own = torch.ones(longest, longest, dtype=torch.bool, device=device).tril().expand(len(rollouts), -1, -1)
        prompt = self._prompts.is_real[self._context_index][:, None].expand(-1, longest, -1)
        allowed = torch.cat([prompt, own], dim=2)[:, None]  # [B, 1, T, P+T]; padding of completions comes after all
        self._mask = torch.zeros(allowed.shape, device=device, dtype=dtype).masked_fill_(~allowed, float("-inf"))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attention in the one row, [1, H, M, d] each → [1, M, H, d]: a completion sees its prompt and itself."""
        lengths = [self._prompts_end, query.shape[2] - self._prompts_end]
        of_prompts, own = zip(*(x[0].split(lengths, dim=1) for x in (query, key, value)), strict=True)
        q, k, v = map(self._prompts.pad, of_prompts)
        rows = [self._prompts.unpad(sdpa(q, k, v, scale, is_causal=True))]
        if self._completions.longest:
            own_q, own_k, own_v = map(self._completions.pad, own)
            keys = torch.cat([k.index_select(0, self._context_index), own_k], dim=2)
            values = torch.cat([v.index_select(0, self._context_index), own_v], dim=2)
            attended = sdpa(own_q, keys, values, scale, attn_mask=self._mask.to(query.dtype))
            rows.append(self._completions.unpad(attended))
        return torch.cat(rows)[None]


class Segments:
    """S ragged stretches of tokens, one behind the other, and their padded view."""

    def __init__(self, lengths: Tensor, device: torch.device):
        self.longest = int(lengths.max())
        is_real = torch.arange(self.longest) < lengths[:, None]
        self.is_real = is_real.to(device)  # [S, T]
        self._places = is_real.flatten().nonzero()[:, 0].to(device)  # [n], in the flat padded view

    def pad(self, packed: Tensor) -> Tensor:
        """[H, n, d] → [S, H, T, d]; padding is 0."""
        padded = _spread(packed.transpose(0, 1).flatten(1), self._places, self.is_real.numel())
        return padded.view(*self.is_real.shape, *packed.shape[::2]).transpose(1, 2)

    def unpad(self, padded: Tensor) -> Tensor:
        """[S, H, T, d] → [n, H, d], the real rows in packed order."""
        packed = _Gather.apply(padded.transpose(1, 2).reshape(self.is_real.numel(), -1), self._places)
        return packed.view(-1, padded.shape[1], padded.shape[3])


def _spread(rows: Tensor, places: Tensor, size: int) -> Tensor:
    """[n, D] → [size, D], each row at its place and zeros between."""
    return rows.new_zeros(size, rows.shape[1]).index_copy_(0, places, rows)


class _Gather(torch.autograd.Function):
    """`index_select` of rows that are taken once each: its own backward pass adds row by row, which is slow."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor) -> Tensor:
        ctx.places, ctx.size = places, len(rows)
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _spread(gradient, ctx.places, ctx.size), None
