"""Weights of the policy as it was, in a model of their own: of an adaptive proposal, or of a base that moves."""

from __future__ import annotations

import torch
from torch import Tensor

from .language_model import LanguageModel


class OlderPolicy:
    """A model and after how many rounds it took its weights from the policy; 0: it has those that it was made with."""

    def __init__(self, model: LanguageModel):
        self.model, self.version = model, 0

    def take(self, policy: LanguageModel, rounds: int) -> None:
        """Become the policy as it is now, after so many rounds."""
        self.model.take_weights(policy)
        self.version = rounds

    def state(self) -> dict[str, Tensor]:
        """What `load_state` takes; parts where the model is divided."""
        weights = {f"weights.{name}": tensor.clone() for name, tensor in self.model.model.state_dict().items()}
        return weights | {"version": torch.tensor(self.version)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.model.model.state_dict().items():
            tensor.copy_(state[f"weights.{name}"])
        self.version = int(state["version"])
