"""The LM head behind the fused ops: the [N, V] matrix of logits is never formed, but for tokens that are drawn."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdpg_kernels import FDPGLoss, fdpg_loss, linear_logprob

from . import parallel


class FusedHead(nn.Module):
    """A head whose forward is the loss. Its parameters are those of the model's own output layer, tied or not.

    Args:
        layer: with a weight [V, D], and perhaps a bias [V].
        bias: instead of the layer's, [V].
        temperature: logits are divided by it.
        softcap: c in c·tanh(logit/c), before that; None: no cap.
    """

    def __init__(
        self, layer: nn.Module, bias: Tensor | None = None, temperature: float = 1.0, softcap: float | None = None
    ):
        super().__init__()
        self.layer, self._bias, self.temperature, self.softcap = layer, bias, temperature, softcap

    @property
    def weight(self) -> Tensor:  # [V, D]
        return self.layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:  # [V]
        return getattr(self.layer, "bias", None) if self._bias is None else self._bias

    def forward(self, hidden: Tensor, token_ids: Tensor, *sequences: Tensor, **options: Any) -> FDPGLoss:
        """The loss of N tokens with hidden states [N, D]; cu_seqlens and what follows it are as in `fdpg_loss`."""

        def run(hidden: Tensor) -> FDPGLoss:
            settings: Any = options | self._scaling()
            return fdpg_loss(hidden, self.weight, token_ids, *sequences, **settings)

        return parallel.inside(self.layer, run, hidden)

    def logprob(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """log-probs of tokens [N] that states [N, D] predict, [N] float32; differentiable."""

        def run(hidden: Tensor) -> Tensor:
            return linear_logprob(hidden, self.weight, token_ids, **self._scaling())

        return parallel.inside(self.layer, run, hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """[B, D] → [B, V] float32, multiplied in float32: logits of 30 in bfloat16 are off by a tenth of a nat."""
        bias = None if self.bias is None else self.bias.float()
        logits = F.linear(hidden.float(), self.weight.float(), bias)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if self.temperature == 1.0 else logits / self.temperature

    def _scaling(self) -> dict[str, Any]:
        return {"bias": self.bias, "temperature": self.temperature, "softcap": self.softcap}
