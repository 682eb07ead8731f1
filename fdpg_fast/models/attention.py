"""Running a transformers model on packed rows: no padding through its layers, each prompt computed once.

A batch of C prompts and their B completions becomes one row of tokens, prompts first. Only attention has to know
who belongs to whom, so it is the one thing replaced, through transformers' attention registry: `PackedBatch` for
scoring and training, `DecodeCache` for sampling. Without `packed=` the registered function is plain SDPA, so the
model stays an ordinary transformers model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..errors import UserError
from ..rollouts import Rollouts

IMPLEMENTATION = "fdpg_packed"


def _attention(module, query, key, value, attention_mask, *, packed=None, scaling=None, **options):
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    window = options.get("sliding_window")
    if window is not None and packed.max_length > window:
        raise UserError(f"prompt and completion reach {packed.max_length} tokens, past the model's window of {window}")
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise UserError(f"{type(module).__name__}: attention with a soft cap or sinks is not supported")
    return packed.attend(module.layer_idx, query[0], key[0], value[0], scaling), None  # query [1, H, N, d]


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def run(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, packed: Any) -> Tensor:
    """Final hidden states of a row of tokens, [N] → [N, D]; `packed` says who attends to whom."""
    no_mask = torch.empty(1, 1, 1, 1, device=input_ids.device)  # 4-D: transformers hands it through as it is
    output = model.base_model(
        input_ids=input_ids[None],
        position_ids=position_ids[None],
        attention_mask=no_mask,
        use_cache=False,
        packed=packed,
    )
    return output.last_hidden_state[0]


class _Segments:
    """S ragged stretches that make up some rows, one behind the other, and their padded view."""

    def __init__(self, lengths: Tensor):
        self.longest = int(lengths.max()) if len(lengths) else 0
        offsets = torch.arange(self.longest)
        self.real = offsets < lengths[:, None]  # [S, T]
        self.rows = (_starts(lengths)[:, None] + offsets).masked_fill(~self.real, 0)
        self.flat = self.real.flatten().nonzero()[:, 0]

    def to(self, device: torch.device) -> _Segments:
        self.real, self.rows, self.flat = (x.to(device) for x in (self.real, self.rows, self.flat))
        return self

    def pad(self, packed: Tensor) -> Tensor:
        """[H, n, d] → [S, H, T, d]; padding is 0."""
        by_row = packed.transpose(0, 1).reshape(packed.shape[1], -1)
        return _Pad.apply(by_row, self).view(*self.rows.shape, *packed.shape[::2]).transpose(1, 2)

    def unpad(self, padded: Tensor) -> Tensor:
        """[S, H, T, d] → [n, H, d], the real rows in packed order."""
        by_row = padded.transpose(1, 2).reshape(self.rows.numel(), -1)
        return _Unpad.apply(by_row, self).view(-1, padded.shape[1], padded.shape[3])


class _Pad(torch.autograd.Function):
    """[n, D] → [S·T, D]. It and `_Unpad` are each other's backward pass: index_select's own adds row by row."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, segments: _Segments) -> Tensor:
        ctx.segments = segments
        return packed.index_select(0, segments.rows.flatten()).masked_fill_(~segments.real.view(-1, 1), 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Unpad.apply(gradient, ctx.segments), None


class _Unpad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, padded: Tensor, segments: _Segments) -> Tensor:
        ctx.segments = segments
        return padded.index_select(0, segments.flat)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Pad.apply(gradient, ctx.segments), None


class PackedBatch:
    """The rollouts of a micro-batch laid out for one forward pass.

    Attributes:
        input_ids, position_ids: every prompt once, then every completion without its last token, [M].
        target_rows: the row of the hidden states that predicts each completion token, [N].
    """

    def __init__(self, rollouts: Rollouts, device: torch.device):
        prompts = [torch.tensor(context.token_ids) for context in rollouts.contexts]
        prompt_lengths = torch.tensor([len(p) for p in prompts])
        inputs = rollouts.lengths.cpu() - 1  # the last token predicts nothing
        owner = rollouts.context_index.cpu()
        prompt_starts = _starts(prompt_lengths)
        self._prompts, self._completions = _Segments(prompt_lengths), _Segments(inputs)
        self._parts = [int(prompt_lengths.sum()), int(inputs.sum())]  # of the row
        self.max_length = int((prompt_lengths[owner] + inputs).max()) + 1

        ends = rollouts.cu_seqlens.long().cpu()
        is_last = torch.zeros(rollouts.num_tokens, dtype=torch.bool)
        is_last[ends[1:] - 1] = True
        token_ids = rollouts.token_ids.cpu()
        self.input_ids = torch.cat([*prompts, token_ids[~is_last]]).to(device)
        positions = [*map(torch.arange, prompt_lengths.tolist())]
        positions += [torch.arange(n) + p for n, p in zip(inputs.tolist(), prompt_lengths[owner], strict=True)]
        self.position_ids = torch.cat(positions).to(device)

        last_of_prompt = prompt_starts + prompt_lengths - 1
        self.target_rows = torch.empty(rollouts.num_tokens, dtype=torch.long)
        is_first = torch.zeros_like(is_last)
        is_first[ends[:-1]] = True
        self.target_rows[is_first] = last_of_prompt[owner]
        self.target_rows[~is_first] = torch.arange(int(inputs.sum())) + int(prompt_lengths.sum())
        self.target_rows = self.target_rows.to(device)

        causal = torch.ones(self._completions.longest, self._completions.longest, dtype=torch.bool).tril()
        own = causal.expand(len(owner), -1, -1)  # padding comes after: no real query looks there
        before = self._prompts.real[owner][:, None].expand(-1, self._completions.longest, -1)
        allowed = torch.cat([before, own], dim=2)[:, None]  # [B, 1, T, P+T]
        self._mask = torch.zeros(allowed.shape).masked_fill_(~allowed, float("-inf")).to(device)
        self._owner = owner.to(device)
        self._prompts.to(device)
        self._completions.to(device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """[H, M, d] each (fewer heads in key and value) → [1, M, H, d]."""
        of_prompts, own = zip(*(x.split(self._parts, dim=1) for x in (query, key, value)), strict=True)
        q, k, v = map(self._prompts.pad, of_prompts)
        rows = [self._prompts.unpad(_sdpa(q, k, v, scale, is_causal=True))]
        if self._completions.longest:
            own_q, own_k, own_v = map(self._completions.pad, own)
            keys = torch.cat([k.index_select(0, self._owner), own_k], dim=2)
            values = torch.cat([v.index_select(0, self._owner), own_v], dim=2)
            attended = _sdpa(own_q, keys, values, scale, attn_mask=self._mask.to(query.dtype))
            rows.append(self._completions.unpad(attended))
        return torch.cat(rows)[None]


class PackedDecoding:
    """B completions that grow behind C prompts; see `language_model.Decoding`."""

    def __init__(self, model: PreTrainedModel, prompts: list[tuple[int, ...]], owner: Tensor, max_new_tokens: int):
        self._model, self._step = model, 0
        self._cache = DecodeCache(prompts, owner, max_new_tokens, model.device)
        states = run(model, self._cache.input_ids, self._cache.position_ids, self._cache)
        self.first = states.index_select(0, self._cache.last_rows)

    def advance(self, tokens: Tensor) -> Tensor:
        self._cache.advance()
        positions = self._cache.next_positions + self._step
        self._step += 1
        return run(self._model, tokens, positions, self._cache)

    def select(self, rows: Tensor) -> None:
        self._cache.select(rows)


class DecodeCache:
    """Keys and values of B growing completions; prompts are computed once and copied to their completions.

    Slots: prompts of different lengths end at slot P, so that step j of every completion sits in slot P + j.
    """

    def __init__(self, prompts: list[tuple[int, ...]], owner: Tensor, max_new_tokens: int, device: torch.device):
        lengths = torch.tensor([len(p) for p in prompts])
        self._prompts = _Segments(lengths).to(device)
        self._owner, self._steps = owner.to(device), max_new_tokens
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        longest = self._prompts.longest
        self.max_length = longest + max_new_tokens
        self._used = longest  # slots in use; the prompt's while it is being computed
        self._prefilling = True
        starts = (longest - lengths)[owner.cpu()].to(device)
        allowed = torch.arange(self.max_length, device=device) >= starts[:, None]  # [B, S]
        self._allowed = None if int(lengths.min()) == longest else allowed[:, None, None]
        self.input_ids = torch.tensor([token for p in prompts for token in p], device=device)
        self.position_ids = torch.cat([torch.arange(len(p)) for p in prompts]).to(device)
        self.last_rows = (lengths.cumsum(0) - 1).to(device)[self._owner]  # of each completion's prompt, [B]
        self.next_positions = lengths.to(device)[self._owner]

    def advance(self) -> None:
        """Open the slot for the next token of every completion."""
        self._prefilling = False
        self._used += 1

    def select(self, rows: Tensor) -> None:
        """Keep only these completions, [b] indices into the present ones."""
        for store in (self._keys, self._values):
            for layer, tensor in store.items():
                store[layer] = tensor.index_select(0, rows)
        if self._allowed is not None:
            self._allowed = self._allowed.index_select(0, rows)
        self.next_positions = self.next_positions.index_select(0, rows)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """[H, n, d] each → [1, n, H, d]; n is all prompt tokens at first, then one token a completion."""
        if self._prefilling:
            q, k, v = (self._prompts.pad(x) for x in (query, key, value))
            self._keys[layer], self._values[layer] = self._store(k), self._store(v)
            return self._prompts.unpad(_sdpa(q, k, v, scale, is_causal=True))[None]
        heads, batch, width = query.shape
        keys, values = self._keys[layer], self._values[layer]
        keys[:, :, self._used - 1] = key.transpose(0, 1)
        values[:, :, self._used - 1] = value.transpose(0, 1)
        # one query token: the query heads that share a key head are laid out as its queries
        grouped = query.transpose(0, 1).reshape(batch, keys.shape[1], heads // keys.shape[1], width)
        mask = None if self._allowed is None else self._allowed[..., : self._used]
        k, v = keys[:, :, : self._used], values[:, :, : self._used]
        attended = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale)
        return attended.reshape(1, batch, heads, -1)

    def _store(self, padded: Tensor) -> Tensor:
        """Right-align the prompts' [C, H, P, d] and give every completion its copy, [B, H, P + steps, d]."""
        longest = self._prompts.longest
        shift = longest - self._prompts.real.sum(1)
        source = (torch.arange(longest, device=padded.device) - shift[:, None]) % longest  # [C, P]
        aligned = padded.take_along_dim(source[:, None, :, None], dim=2)
        store = padded.new_zeros(len(self._owner), padded.shape[1], longest + self._steps, padded.shape[3])
        store[:, :, :longest] = aligned.index_select(0, self._owner)
        return store


def _starts(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0), (1, 0))[:-1]


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float | None, **options) -> Tensor:
    shared = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=shared, **options)
