"""What a forward pass keeps for its backward pass: how much that is, and blocks that keep no more than their input.

With activation checkpointing a block runs a second time when its gradients are due: a third more work for its share of
the time, and the same gradients to the last bit.
"""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from .. import ranks
from ..config.schema import RoundsConfig
from ..errors import UserError
from . import pages, parallel
from .language_model import LanguageModel

KEPT = 20  # numbers that a layer keeps for each hidden unit and token; 19.4 measured on a Llama
LEAST_TOKENS = 448  # products of fewer rows are slow
ROOM = {"cpu": 2**28, "cuda": 2**33}  # bytes of activations that nobody has to ask for


def plan_passes(policy: LanguageModel, dtype: torch.dtype, settings: RoundsConfig, longest: int) -> tuple[int, bool]:
    """Tokens of a forward and backward pass in some dtype, and whether its blocks run twice.

    Left to us, a pass has as many tokens as fit into ROOM, but not too few to be fast. Blocks run twice where what a
    pass has to hold, the longest text or `micro_batch_tokens`, would take more than ROOM and more than the parameters
    here.

    Raises:
        UserError: blocks are to run twice, and the model does not say what they are.
    """
    config = policy.model.config.get_text_config()
    layers, unit = config.num_hidden_layers, config.hidden_size * dtype.itemsize
    parameters = sum(p.numel() * p.element_size() for p in policy.model.parameters()) // ranks.count()
    room = ROOM.get(policy.device.type, ROOM["cuda"])
    needed = max(longest, settings.micro_batch_tokens or 0) * layers * KEPT * unit
    wanted, has_blocks = settings.activation_checkpointing, bool(parallel.blocks(policy.model))
    if wanted == "on" and not has_blocks:
        kind = type(policy.model).__name__
        raise UserError(f"trainer.activation_checkpointing: {kind} does not name its blocks; set it to off")
    recomputes = has_blocks and needed > max(room, parameters) if wanted == "auto" else wanted == "on"
    numbers = layers + KEPT if recomputes else layers * KEPT  # inputs of all blocks and the whole of one, or of all
    return settings.micro_batch_tokens or max(LEAST_TOKENS, room // (numbers * unit)), recomputes


def recompute(model: PreTrainedModel) -> None:
    """Let each block of a model keep its input alone; before its parameters are divided."""
    for block in parallel.blocks(model):
        kind: Any = type(block)
        block.__class__ = _recomputing(kind, model.device.type == "cpu")


@functools.cache
def _recomputing(kind: Any, on_cpu: bool) -> Any:
    """A class of blocks of that kind: as FSDP2 does it, so that no weight gets another name."""

    count = itertools.count()

    def forward(self: nn.Module, *inputs: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return kind.forward(self, *inputs, **options)
        # what the block appends to a cache, as an encoder-decoder's, must not be there when it runs again
        caches = [{}, {name: _apart(value) for name, value in options.items() if isinstance(value, Cache)}]

        def run(*inputs: Any) -> Any:
            if on_cpu and next(count) % 2:  # more often costs time, less often memory
                pages.give_back()
            return kind.forward(self, *inputs, **options | caches.pop(0))

        return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)

    return type(kind.__name__, (kind,), {"forward": forward})


def _apart(kept: Any) -> Any:
    """A cache with the same tensors, whose changes are its own."""
    if isinstance(kept, list):
        return [_apart(part) for part in kept]
    if isinstance(kept, dict):
        return {key: _apart(part) for key, part in kept.items()}
    if isinstance(kept, Cache | CacheLayerMixin):
        kept = copy.copy(kept)
        vars(kept).update(_apart(vars(kept)))
    return kept
