"""An engine in each process: every one samples its share of the contexts, and gets what the others have sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from .. import ranks
from ..contexts import Context
from ..models.language_model import LanguageModel
from ..rollouts import Rollouts
from .engine import Engine


class PartialEngine(Engine, Protocol):
    """An engine that can draw a part of what it is asked for."""

    def sample(
        self, contexts: Sequence[Context], samples_per_context: int, seed: int, share: range | None = None
    ) -> Rollouts:
        """As `Engine.sample`; share: of these contexts alone, the same completions as when all are drawn."""
        ...


class DividedEngine:
    """The engines of all processes as one; what it draws does not depend on how many there are.

    width: consecutive processes that are one engine; they are asked the same and give the same.
    """

    def __init__(self, own: PartialEngine, width: int = 1):
        self.own, self._width = own, width

    @property
    def version(self) -> int:
        return self.own.version

    def sample(self, contexts: Sequence[Context], samples_per_context: int, seed: int) -> Rollouts:
        """As `Engine.sample`; all contexts on every process."""
        own = ranks.share(len(contexts), self._width)
        drawn = self.own.sample(contexts, samples_per_context, seed, own) if own else None
        parts = ranks.gathered(drawn, beside=True)
        found = [part for part in parts[:: self._width] if part is not None]
        columns = {name: [part.tensors()[name] for part in found] for name in found[0].tensors()}
        starts = torch.tensor([0] + [len(part.contexts) for part in found[:-1]]).cumsum(0)
        lengths = torch.cat([part.lengths for part in found])
        columns["context_index"] = [x + start for x, start in zip(columns["context_index"], starts, strict=True)]
        columns["cu_seqlens"] = [torch.zeros(1), lengths.cumsum(0)]
        tensors = {name: torch.cat(column) for name, column in columns.items()}
        tensors["cu_seqlens"] = tensors["cu_seqlens"].int()
        return Rollouts(contexts=tuple(contexts), **tensors)

    def sync_weights(self, policy: LanguageModel, version: int) -> None:
        self.own.sync_weights(policy, version)

    def sleep(self) -> None:
        self.own.sleep()

    def close(self) -> None:
        self.own.close()
