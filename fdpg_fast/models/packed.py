"""Packed rows: prompts and completions without padding through a model's layers, each prompt computed once.

C prompts and their B completions become one row of tokens, prompts first. A CUDA device computes its attention by
FlexAttention; a CPU by two flash parts, and blocks of queries where a layer has a window, a cap or sinks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rollouts import Rollouts
from . import blockwise, flash_parts, flex
from .attention import Kind
from .rows import Row


class PackedBatch(Row):
    """The layout of a micro-batch of rollouts as one row of M tokens.

    In the row comes every prompt once, then every completion without its last token, which predicts nothing.
    """

    def __init__(self, rollouts: Rollouts, device: torch.device):
        context_index = rollouts.context_index.cpu()
        texts = [torch.tensor(context.token_ids) for context in rollouts.contexts]
        texts += [tokens[:-1] for tokens in rollouts.token_ids.cpu().split(rollouts.lengths.tolist())]
        prompts: list[int | None] = [None] * len(rollouts.contexts) + context_index.tolist()
        if padding := -sum(map(len, texts)) % flex.BLOCK if device.type == "cuda" else 0:
            texts, prompts = [*texts, torch.zeros(padding, dtype=torch.long)], [*prompts, None]  # nothing reads it
        super().__init__([len(text) for text in texts], prompts)
        self.input_ids = torch.cat(texts)[None].to(device)  # [1, M]
        self.position_ids = self.positions()[None].to(device)  # [1, M]

        # a completion's first token is predicted by its prompt's last, the others by the token before each
        ends = torch.tensor([text.stop for text in self.texts[: len(rollouts.contexts)]])
        sequence = torch.arange(len(rollouts)).repeat_interleave(rollouts.lengths.cpu())
        target_rows = ends[-1] - 1 + torch.arange(rollouts.num_tokens) - sequence
        target_rows[rollouts.cu_seqlens[:-1].long().cpu()] = ends[context_index] - 1
        self.target_rows = target_rows.to(device)  # [N], of the hidden states that predict the completions' tokens

    def attend(self, query: Tensor, key: Tensor, value: Tensor, kind: Kind) -> Tensor:
        """Attention in the one row, [1, H, M, d] each → [1, M, H, d]."""
        kind = kind.over(self.longest)
        if query.is_cuda:
            return flex.attend(self, query, key, value, kind).transpose(1, 2)
        is_flash = kind.is_plain and query.shape[3] == value.shape[3] and query.device.type == "cpu"
        attend = flash_parts.attend if is_flash else blockwise.attend
        return attend(self, query[0], key[0], value[0], kind).transpose(0, 1)[None]
