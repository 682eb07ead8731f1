"""Decoding with transformers' cache: B completions grow side by side, and their C prompts are computed once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..contexts import Context
from . import attention, blockwise
from .attention import Kind
from .rows import Row


class Decoding:
    """B completions that grow, begun from a prompt's cache; a subclass says how its model is run."""

    first: Tensor  # the state that predicts each completion's first token, [B, D]

    def __init__(self, cache: Cache, **rows: Tensor):
        self._cache, self._rows = cache, rows  # what a pass is told of each completion besides its tokens, [B, …]

    def run(self, tokens: Tensor) -> Tensor:
        """Append T tokens to each completion, [B, T]; the states that predict what follows each, [B, T, D]."""
        raise NotImplementedError

    def select(self, rows: Tensor) -> None:
        """Keep only these completions, [b] indices into the present ones."""
        self._cache.batch_select_indices(rows)
        self._rows = {name: tensor.index_select(0, rows) for name, tensor in self._rows.items()}

    def _begin(self, states: Tensor, context_index: Tensor) -> None:
        """From C prompts, whose last states [C, D] these are, to B completions, [B] indices of their prompts."""
        context_index = context_index.to(states.device)
        self.first = states.index_select(0, context_index)
        self.select(context_index)


class ContinuedDecoding(Decoding):
    """Completions that continue their prompts, begun behind the prompts' padding; see `LanguageModel.start`."""

    def __init__(self, model: PreTrainedModel, contexts: Sequence[Context], context_index: Tensor, max_new_tokens: int):
        self._model = model
        input_ids, is_real = pad_prompts(contexts, model.device)
        lengths, width = is_real.sum(1, keepdim=True), is_real.shape[1]
        self._is_padded, self.longest = not bool(is_real.all()), width + max_new_tokens
        prompt, completion = (torch.arange(n, device=model.device) for n in (width, max_new_tokens))
        # of each place in the cache, [C, P + max_new_tokens]; −1: padding
        positions = torch.cat([torch.where(is_real, prompt, -1), lengths + completion], dim=1)
        super().__init__(roomy_cache(max_new_tokens), positions=positions, next_position=lengths)
        states = attention.run(model, input_ids, prompt[None], self, self._cache)  # [C, P, D]
        self._begin(states.take_along_dim(lengths[:, :, None] - 1, dim=1)[:, 0], context_index)

    def run(self, tokens: Tensor) -> Tensor:  # T = 1
        states = attention.run(self._model, tokens, self._rows["next_position"], self, self._cache)
        self._rows["next_position"] += 1
        return states

    def attend(self, query: Tensor, key: Tensor, value: Tensor, kind: Kind) -> Tensor:
        """Attention of whole prompts [C, H, P, d], or of one token [B, H, 1, d] to all before it; see `attention`."""
        kind = kind.over(self.longest)
        batch, heads, length, width = query.shape
        slots = key.shape[2]
        if length == slots:
            if kind.is_plain:
                return attention.sdpa(query, key, value, kind.scale, is_causal=True).transpose(1, 2)
            texts = Row([length] * batch, [None] * batch)
            query, key, value = (x.transpose(0, 1).flatten(1, 2) for x in (query, key, value))
            return blockwise.attend(texts, query, key, value, kind).unflatten(1, (batch, length)).permute(1, 2, 0, 3)
        visible = None
        if self._is_padded or kind.window is not None:
            window = self.longest if kind.window is None else kind.window
            oldest = (self._rows["next_position"] - window + 1).clamp_(min=0)  # [B, 1]
            visible = (self._rows["positions"][:, :slots] >= oldest)[:, None, None]  # [B, 1, 1, slots]
        if kind.softcap is not None or kind.sinks is not None:
            return attention.dense(query, key, value, visible, kind)
        # one query token: the query heads that share a key head are laid out as its queries
        grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], width)
        return attention.sdpa(grouped, key, value, kind.scale, attn_mask=visible).reshape(batch, 1, heads, -1)


def pad_prompts(contexts: Sequence[Context], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [C, P] of prompts, padded at their end, and which of them are real, [C, P] bool."""
    prompts = [torch.tensor(context.token_ids) for context in contexts]
    is_real = pad_sequence([torch.ones_like(prompt, dtype=torch.bool) for prompt in prompts], batch_first=True)
    return pad_sequence(prompts, batch_first=True).to(device), is_real.to(device)


def roomy_cache(room: int) -> DynamicCache:
    """A cache with room for this many tokens behind its first: they are appended without copying those before."""
    cache = DynamicCache()
    cache.layer_class_to_replicate = functools.partial(_RoomyLayer, room)  # type: ignore[assignment]
    return cache


class _RoomyLayer(DynamicLayer):
    def __init__(self, room: int):
        super().__init__()
        self._room, self._used = room, 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        start, self._used = self._used, self._used + key_states.shape[2]
        if (missing := self._used - self.keys.shape[2]) > 0:
            more = (0, 0, 0, missing + self._room)
            self.keys, self.values = F.pad(self.keys, more), F.pad(self.values, more)
        self.keys[:, :, start : self._used], self.values[:, :, start : self._used] = key_states, value_states
        return self.keys[:, :, : self._used], self.values[:, :, : self._used]

    def get_seq_length(self) -> int:
        return self._used
