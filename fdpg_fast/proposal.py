"""An adaptive proposal: sample from frozen weights until the policy is nearer to the target (KL-adaptive DPG).

Khalifa, Elsahar, Dymetman 2021, "A Distributional Approach to Controlled Text Generation", algorithm 1. The importance
ratio π/q in the gradient keeps training exact meanwhile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import by_context
from .models.language_model import LanguageModel
from .models.older import OlderPolicy


class AdaptiveProposal(OlderPolicy):
    """The weights q that the engine samples with, and q's samples since the last decision."""

    def __init__(self, every: int, model: LanguageModel):
        super().__init__(model)
        self.every = every
        self._samples = torch.zeros(3, 0, dtype=torch.float64)  # log P/q, log π/q, the data set's index of the context

    def observe(self, log_weight: Tensor, log_ratio: Tensor, dataset_index: Tensor) -> None:
        """Remember a round: log P/q and log π/q of samples of q, and each one's context in the data set, [B]."""
        samples = torch.stack([log_weight, log_ratio.double(), dataset_index.double()])
        self._samples = torch.cat([self._samples, samples], dim=1)

    def decide(self, policy: LanguageModel, rounds: int) -> float | None:
        """After every `every` rounds take the policy's weights if `kl_gain` > 0. The gain; None in other rounds."""
        if rounds % self.every:
            return None
        gain = kl_gain(*self._samples)
        self._samples = self._samples[:, :0]
        if gain > 0:
            self.take(policy, rounds)
        return gain

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"samples": self._samples.clone()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        self._samples = state["samples"]


def kl_gain(log_weight: Tensor, log_ratio: Tensor, context_index: Tensor) -> float:
    """KL(p‖q) − KL(p‖π) = E_p[log π − log q] in nats, from samples of q; positive where π is nearer to p.

    E_p by self-normalised weights P/q within each context, averaged over the contexts that have a sample with P > 0;
    0 where none has. Where the samples come from rounds of different π, it is their average.
    `log_weight` log P/q and `log_ratio` log π/q, [B] float64 each; `context_index` [B], any numbers.
    """
    possible = ~log_weight.isneginf()
    if not bool(possible.any()):
        return 0.0
    context_index, counts = by_context.renumber(context_index[possible])
    weight, _ = by_context.scaled_exp(log_weight[possible], context_index, len(counts))
    gains = by_context.sums(weight * log_ratio[possible], context_index, len(counts))
    return float((gains / by_context.sums(weight, context_index, len(counts))).mean())
