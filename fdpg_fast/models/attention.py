"""Attention as transformers' models ask for it: who sees whom is the layout's, how, is the layer's own choice.

Prompts and completions lie in a model's input in some layout: `packed.PackedBatch`, or the cache of `decoding`. Only
attention has to know it, so it is the one thing replaced, through transformers' attention registry. Of the masks that a
model builds, through its mask registry, no tensor is left: a layer is handed what the model has for it as a `Local`, or
nothing. Without a layout both registries do what they do for SDPA, and the model stays an ordinary transformers model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..errors import UserError

IMPLEMENTATION = "fdpg_packed"
UNLIMITED = 2**31  # tokens
# keys of configs: how many tokens the layers choose from all, of which only texts that are no longer can be computed
CHOSEN = ("attention_chunk_size", "index_topk", "keep_window_size")


class Kind(NamedTuple):
    """How a layer turns scores of queries and keys into weights."""

    scale: float
    window: int | None = None  # tokens that a query sees, itself the last; None: all before it
    softcap: float | None = None  # c in c·tanh(score/c); None: no cap
    sinks: Tensor | None = None  # a score beside the keys' in every head, whose value is 0, [H]

    @property
    def is_plain(self) -> bool:
        return self.window is None and self.softcap is None and self.sinks is None

    def over(self, longest: int) -> Kind:
        """The same for texts of at most so many tokens: a window that none reaches past is no window."""
        return self if self.window is None or self.window < longest else self._replace(window=None)


class Layout(Protocol):
    """Where tokens of texts lie in rows; attention within them is [R, H, T, d] each → [R, T, H, d]."""

    longest: int  # tokens of the longest text

    def attend(self, query: Tensor, key: Tensor, value: Tensor, kind: Kind) -> Tensor: ...


class Local:
    """What a layer is handed as its mask that sees some of the tokens before: the last so many, or those of a chunk."""

    def __init__(self, tokens: int, is_window: bool):
        self.tokens, self.is_window = tokens, is_window


class _Pass:
    """A forward pass of a model with a layout, which builds its masks and asks for attention in it."""

    def __init__(self, layout: Layout):
        self.layout, self.has_asked = layout, False


_pass: ContextVar[_Pass | None] = ContextVar("_pass", default=None)


def _attention(module, query, key, value, attention_mask, *, layout=None, scaling=None, **options):
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kind = Kind(scale, None, options.get("softcap"), options.get("s_aux"))
    if (current := _pass.get()) is not None:  # else layers are computed again for a backward pass
        current.has_asked = True
    if layout is not None:
        if options.get("position_bias") is not None:
            raise UserError(f"model: {type(module).__name__} adds a bias to its scores, which is not supported")
        if isinstance(attention_mask, Local):
            if not attention_mask.is_window and layout.longest > (limit := attention_mask.tokens):
                reach = f"a text has {layout.longest:,}"
                raise UserError(f"model: its attention sees chunks of {limit:,} tokens, and {reach}: not supported")
            kind = kind._replace(window=attention_mask.tokens)
        return layout.attend(query, key, value, kind), None
    if kind.is_plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    if attention_mask is None and query.shape[2] > 1:  # SDPA would be told to be causal
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    return dense(query, key, value, attention_mask, kind), None


def _mask(*, mask_function, local_size=None, use_vmap=False, allow_is_causal_skip=True, device="cpu", **sizes):
    current = _pass.get()
    if current is None:
        sizes |= {"use_vmap": use_vmap, "allow_is_causal_skip": allow_is_causal_skip, "device": device}
        return sdpa_mask(mask_function=mask_function, local_size=local_size, **sizes)
    if use_vmap or _sees(mask_function, 0, 1):
        raise UserError("model: its attention is not causal, or its mask is of a kind that is not supported")
    if local_size is not None:
        is_window = _sees(mask_function, local_size, 1) and not _sees(mask_function, local_size, 0)
        return Local(local_size, is_window)
    # a layer that chooses some of the tokens combines its choice with this; it may choose all
    return None if allow_is_causal_skip else torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def _sees(mask_function: Callable[..., Any], query: int, key: int) -> bool:
    return bool(mask_function(0, 0, torch.tensor(query), torch.tensor(key)))


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)


def longest_text(config: PretrainedConfig) -> int:
    """Tokens up to which layers that choose what they see, by chunks or by an index, see all."""
    return min(getattr(config, key, None) or UNLIMITED for key in CHOSEN)


def rotary_limits(config: PretrainedConfig) -> Iterator[tuple[str, int]]:
    """Rotary scalings of which a forward pass takes one by its longest text, and the length up to which it is one."""
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):  # of all layers, or of each kind of them
        kind = parameters.get("rope_type") if isinstance(parameters, dict) else None
        if kind == "longrope":
            yield kind, parameters["original_max_position_embeddings"]
        elif kind == "dynamic":
            yield kind, config.max_position_embeddings


def run(
    model: PreTrainedModel, tokens: Tensor, positions: Tensor, layout: Layout, cache: Cache | None = None
) -> Tensor:
    """Final hidden states of rows of tokens, [R, T] → [R, T, D]; layers add their keys and values to the cache."""
    seen = tokens.shape[1] + (0 if cache is None else cache.get_seq_length())
    current = _Pass(layout)
    before = _pass.set(current)
    try:
        output = model.base_model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=torch.ones(1, 1, dtype=torch.bool, device=tokens.device).expand(len(tokens), seen),
            past_key_values=cache,
            use_cache=cache is not None,
            layout=layout,
        )
    finally:
        _pass.reset(before)
    if not current.has_asked:
        raise UserError(f"model: {type(model).__name__} computes its attention itself, which knows no packed rows")
    return output.last_hidden_state


def sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float, **options: Any) -> Tensor:
    shared = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=shared, **options)


def dense(query: Tensor, key: Tensor, value: Tensor, is_visible: Tensor | None, kind: Kind) -> Tensor:
    """Attention by its definition, with all scores at once: [R, H, T, d], [R, K, S, d] → [R, T, H, d].

    is_visible: which keys a query sees, bool, broadcast to [R, 1, T, S]; None: all.
    """
    rows, heads, length, _ = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, query.shape[3])  # [R, K, H/K·T, d]
    scores = (grouped @ key.transpose(2, 3)).float().view(rows, heads, length, -1) * kind.scale
    if kind.softcap is not None:
        scores = kind.softcap * torch.tanh(scores / kind.softcap)
    if is_visible is not None:
        scores = scores.masked_fill(~is_visible, float("-inf"))
    if kind.sinks is not None:
        sinks = kind.sinks.float().view(-1, 1, 1).expand(rows, -1, length, -1)
        scores = torch.cat([scores, sinks], dim=3)
    weights = scores.softmax(3)[..., : key.shape[2]].to(value.dtype)
    attended = weights.reshape(rows, key.shape[1], -1, key.shape[2]) @ value
    return attended.view(rows, heads, length, -1).transpose(1, 2)
