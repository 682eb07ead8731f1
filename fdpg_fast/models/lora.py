"""LoRA policies: trained matrices beside the frozen weights of the base model, which is the policy without them.

Peft does the work, inside the transformers module: the module keeps its class, so that packed rows and engines find
everything where it was. Head and embeddings stay frozen.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import ranks
from ..config.schema import LoRAConfig
from ..errors import UserError, one_line
from . import parallel
from .language_model import LanguageModel

ADAPTER = "default"  # as peft calls the first


class LoRAPolicy(LanguageModel):
    """A model with an adapter that does nothing yet, for B starts as 0, or with one from a folder that `save` wrote.

    `base` gets it put into its module, and is this policy's `as_base` from then on; the seed is that of A.
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
        cuda = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(cuda), warnings.catch_warnings(action="ignore"):  # of peft's own settings
            torch.manual_seed(seed)
            try:
                peft.inject_adapter_in_model(settings, model, ADAPTER)
            except ValueError as error:  # of fused experts it adapts all projections or none
                raise UserError(f"lora.target_modules: {one_line(error)}") from None
        for parameter in model.parameters():
            if parameter.requires_grad:  # a step of AdamW is less than bfloat16 can tell apart
                parameter.data = parameter.data.float()
        self._peft_config: Any = model.peft_config[ADAPTER]
        for targets in ("target_modules", "target_parameters"):  # sets; equal runs write equal files
            setattr(self._peft_config, targets, sorted(getattr(self._peft_config, targets) or ()))
        if checkpoint is not None:
            tensors = peft.load_peft_weights(str(checkpoint), str(model.device))
            found: Any = peft.set_peft_model_state_dict(model, tensors)  # silent about what it does not find
            if missing := [name for name in found.missing_keys if ".lora_" in name]:
                raise UserError(f"checkpoint {checkpoint} lacks {missing[0]}, which this run trains")
        super().__init__(model)

    @property
    def saved_dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def is_plain(self) -> bool:
        """Whether linear layers alone are adapted, and no fused experts."""
        return not self._peft_config.target_parameters

    @contextlib.contextmanager
    def as_base(self) -> Iterator[LanguageModel]:
        """This module with its adapter off: no second set of weights."""
        with contextlib.ExitStack() as until_done:
            for layer in self._adapting_layers().values():
                layer.enable_adapters(False)
                until_done.callback(layer.enable_adapters, True)
            yield self

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """As of the model that this policy amounts to: base weight + alpha/rank · B·A, one at a time."""
        layers = self._adapting_layers()
        for name, tensor in self.model.state_dict().items():
            if ".lora_" not in name:
                name = name.replace(".base_layer", "")
                if layer := layers.get(name):
                    tensor = (tensor + layer.get_delta_weight(ADAPTER)).to(tensor.dtype)
                yield name, parallel.full(tensor)

    def save(self, folder: Path) -> None:
        """Write the adapter alone, as peft does."""
        import peft

        adapter = peft.get_peft_model_state_dict(self.model, adapter_name=ADAPTER, save_embedding_layers=False)
        tensors = {f"base_model.model.{k}": x.contiguous() for k, x in parallel.gathered(adapter.items()).items()}
        if not ranks.is_first():
            return
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        self._peft_config.save_pretrained(folder)

    def _adapting_layers(self) -> dict[str, Any]:
        """What adapts a parameter, by its name; fused experts have several, one around the other."""
        layers = [(name, m) for name, m in self.model.named_modules() if hasattr(m, "get_delta_weight")]
        names = [f"{name}.{getattr(m, 'parameter_name', 'weight')}".replace(".base_layer", "") for name, m in layers]
        return {name: m for name, (_, m) in zip(names, layers, strict=True) if not m.disable_adapters}


def _refuse_unknown(model: transformers.PreTrainedModel, modules: list[str] | str) -> None:
    """peft passes over a name that matches nothing, and adapts a head if it is told to."""
    linear = (nn.Linear, transformers.pytorch_utils.Conv1D)
    layers = [f".{name}" for name, module in model.base_model.named_modules() if isinstance(module, linear)]
    for name in [] if modules == "all-linear" else modules:
        if not any(layer.endswith(f".{name}") for layer in layers):
            names, kind = ", ".join(sorted({layer.rpartition(".")[2] for layer in layers})), type(model).__name__
            raise UserError(f"lora.target_modules: {name!r} is no linear layer inside {kind}; there are {names}")
