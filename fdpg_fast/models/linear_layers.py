"""A model's linear layers, multiplied by what is fastest on this processor."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from . import onednn


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return onednn.linear(x, self.weight, self.bias)


class _Conv1D(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return onednn.linear(x, self.weight.T, self.bias)


def use_fast_products(model: PreTrainedModel) -> None:
    """Change how layers multiply, in place; nothing else about them, and nothing where PyTorch is as fast."""
    if not onednn.SUITS_LAYERS or model.device.type != "cpu":
        return
    ours: dict[type, type] = {nn.Linear: _Linear, Conv1D: _Conv1D}
    for module in model.modules():
        module.__class__ = ours.get(type(module), type(module))
