"""An adaptive proposal: sample from frozen weights until the policy is nearer to the target (KL-adaptive DPG).

Khalifa, Elsahar, Dymetman 2021, "A Distributional Approach to Controlled Text Generation", algorithm 1. The importance
ratio π/q in the gradient keeps training exact meanwhile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .models.language_model import LanguageModel

_COLUMNS = ("log_weight", "log_ratio", "contexts")


class AdaptiveProposal:
    """The weights q that the engine samples with, and what their samples tell of p, q and π since the last decision.

    Args:
        every: rounds between decisions.
        model: its own; the weights of a checkpoint are loaded into it.
    """

    def __init__(self, every: int, model: LanguageModel):
        self.every, self.model, self.version = every, model, 0
        self._seen: list[dict[str, Tensor]] = []

    def observe(self, log_weight: Tensor, log_ratio: Tensor, contexts: Tensor) -> None:
        """Remember a round: log P/q and log π/q of B samples of q, and each one's context in the data set, [B]."""
        self._seen.append({"log_weight": log_weight, "log_ratio": log_ratio.double(), "contexts": contexts})

    def decide(self, policy: LanguageModel, rounds: int) -> float | None:
        """After `rounds` rounds: take the policy's weights if `kl_gain` > 0. The gain, None where none is due."""
        if rounds % self.every:
            return None
        gain = kl_gain(**self._joined())
        self._seen = []
        if gain > 0:
            self.model.take_weights(policy)
            self.version = rounds
        return gain

    def state(self) -> dict[str, Tensor]:
        """What `load_state` takes."""
        tensors = {f"weights.{name}": tensor.clone() for name, tensor in self.model.weights()}
        return tensors | self._joined() | {"version": torch.tensor(self.version)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.model.weights():
            tensor.copy_(state[f"weights.{name}"])
        self.version = int(state["version"])
        self._seen = [{name: state[name] for name in _COLUMNS}] if "contexts" in state else []

    def _joined(self) -> dict[str, Tensor]:
        columns = _COLUMNS if self._seen else ()
        return {name: torch.cat([seen[name] for seen in self._seen]) for name in columns}


def kl_gain(log_weight: Tensor, log_ratio: Tensor, contexts: Tensor) -> float:
    """KL(p‖q) − KL(p‖π) = E_p[log π − log q] in nats, from samples of q; positive where π is nearer to p.

    E_p by self-normalised weights P/q within each context, averaged over the contexts that have a sample with P > 0;
    0 where none has. Where the samples come from rounds of different π, it is their average.

    Args:
        log_weight: log P/q, [B] float64, −inf where P = 0.
        log_ratio: log π/q, [B] float64.
        contexts: which context each sample continues, [B] int64.
    """
    possible = ~log_weight.isneginf()
    if not bool(possible.any()):
        return 0.0
    log_weight, log_ratio = log_weight[possible], log_ratio[possible]
    _, owner, counts = contexts[possible].unique(return_inverse=True, return_counts=True)
    zeros = torch.zeros(len(counts), dtype=torch.float64)
    largest = (zeros - torch.inf).scatter_reduce(0, owner, log_weight, "amax")
    weight = (log_weight - largest[owner]).exp()
    gains = zeros.index_add(0, owner, weight * log_ratio) / zeros.index_add(0, owner, weight)
    return float(gains.mean())
