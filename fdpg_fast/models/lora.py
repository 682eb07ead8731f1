"""LoRA policies: trained matrices beside the frozen weights of the base model, which is the policy without them.

Peft does the work, inside the transformers module: the module keeps its class, so that packed rows and engines find
everything where it was. Head and embeddings stay frozen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config.schema import LoRAConfig
from ..errors import UserError
from .language_model import LanguageModel

ADAPTER, WEIGHTS_FILE, PREFIX = "default", "adapter_model.safetensors", "base_model.model."  # peft's names


class LoRAPolicy(LanguageModel):
    """A model with an adapter, which does nothing yet: B starts as 0.

    Args:
        base: gets the adapter put into its module; from then on it is this policy's `as_base`.
        config: rank, scale and layers.
        seed: of A; the global generators are left as they are.
        checkpoint: folder that `save` wrote, to go on from.

    Raises:
        UserError: peft is not installed, or a layer that is asked for is not there.
    """

    def __init__(self, base: LanguageModel, config: LoRAConfig, seed: int, checkpoint: Path | None = None):
        try:
            import peft
        except ImportError:
            raise UserError("lora: peft is not installed; pip install 'fdpg-fast[lora]'") from None
        model, modules = base.model, config.target_modules
        if not base.continues_prompt:
            raise UserError(f"lora: {type(model).__name__} is an encoder-decoder, of which all weights are trained")
        _refuse_unknown(model, modules)
        settings = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha or config.rank,  # type: ignore[arg-type]  # any number will do
            target_modules=modules,
            task_type="CAUSAL_LM",
            base_model_name_or_path=model.name_or_path,
        )
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(settings, model, ADAPTER)
        for parameter in model.parameters():
            if parameter.requires_grad:  # a step of AdamW is less than bfloat16 can tell apart
                parameter.data = parameter.data.float()
        self._peft_config: Any = model.peft_config[ADAPTER]
        self._peft_config.target_modules = sorted(self._peft_config.target_modules)  # equal runs write equal files
        if checkpoint is not None:
            saved = load_file(checkpoint / WEIGHTS_FILE)
            peft.set_peft_model_state_dict(model, {name.removeprefix(PREFIX): saved[name] for name in saved})
        super().__init__(model)

    @contextlib.contextmanager
    def as_base(self) -> Iterator[LanguageModel]:
        """This module with its adapter off: no second set of weights."""
        layers = [layer for layer in self._adapted_layers().values() if not layer.disable_adapters]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield self
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    @torch.no_grad()
    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """As of the model that this policy amounts to: base weight + alpha/rank · B·A, one layer at a time."""
        layers = self._adapted_layers().items()
        adapted = {f"{name}.base_layer.weight": layer for name, layer in layers if not layer.disable_adapters}
        for name, tensor in self.model.state_dict().items():
            if name in adapted:
                tensor = (tensor + adapted[name].get_delta_weight(ADAPTER)).to(tensor.dtype)
            if ".lora_" not in name:
                yield name.replace(".base_layer.", "."), tensor

    def save(self, folder: Path) -> None:
        """Write the adapter alone, as peft does."""
        import peft

        adapter = peft.get_peft_model_state_dict(self.model, adapter_name=ADAPTER, save_embedding_layers=False)
        tensors = {PREFIX + name: tensor.contiguous() for name, tensor in adapter.items()}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        self._peft_config.save_pretrained(folder)

    def _adapted_layers(self) -> dict[str, Any]:
        return {name: module for name, module in self.model.named_modules() if hasattr(module, "get_delta_weight")}


def _refuse_unknown(model: transformers.PreTrainedModel, modules: list[str] | str) -> None:
    """peft passes over a name that matches nothing, and adapts a head if it is told to."""
    linear = (nn.Linear, transformers.pytorch_utils.Conv1D)
    known = [f".{name}" for name, module in model.base_model.named_modules() if isinstance(module, linear)]
    for name in [] if modules == "all-linear" else modules:
        if not any(layer.endswith(f".{name}") for layer in known):
            names = sorted({layer.rsplit(".", 1)[1] for layer in known})
            raise UserError(
                f"lora.target_modules: {name!r} is no linear layer inside {type(model).__name__}; "
                f"there are {', '.join(names)}"
            )
