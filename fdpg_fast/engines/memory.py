"""Memory: what this machine has, what a process took, and what vLLM's cache may have beside the learner.

Nothing is reckoned from a model's shape but the keys and values of a token: the learner is there already, and one
micro-batch has been run.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PretrainedConfig

from ..errors import UserError

BLOCKS = {"cpu": 128, "cuda": 16}  # tokens in a block of vLLM's cache, of which it keeps one for itself
CPU_SHARE = 4  # the cache takes a quarter of the machine's memory at most: weights and activations want the rest
ENGINE_WORK = 3 * 2**30  # bytes of a GPU for vLLM's CUDA graphs, its forward pass and its sampler


def machine_memory() -> int:
    """Memory of the whole machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux: ru_maxrss would count what the parent held when it started this process
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def kv_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Keys and values of a token in all layers; more than there is in layers with a sliding window."""
    c = config.get_text_config()
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return 2 * c.num_hidden_layers * heads * width * dtype.itemsize


def room_beside_learner(
    device: torch.device, step: Callable[[], None], optimizer_bytes: int, weight_bytes: int, sleeps: bool
) -> int:
    """Bytes of a GPU that vLLM's cache may take beside a learner that is loaded and has not stepped yet.

    Args:
        step: one forward and backward pass of the largest micro-batch; what it adds at most is measured.
        optimizer_bytes: what the optimizer will allocate at its first step.
        weight_bytes: vLLM's own copy of the weights.
        sleeps: vLLM gives back its memory before such a pass.

    Raises:
        UserError: the pass does not fit beside the learner itself.
    """
    try:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        peak = torch.cuda.max_memory_allocated(device) - before
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0] - optimizer_bytes
    except torch.OutOfMemoryError:
        free, peak = 0, 1
    if peak > free:
        raise UserError(
            f"trainer.micro_batch_tokens: a forward and backward pass does not fit on {device} beside model and "
            "optimizer; lower it, set trainer.activation_checkpointing: on or dtype: bfloat16, or train a LoRA adapter "
            "(lora.rank)"
        )
    return free - weight_bytes - ENGINE_WORK - (0 if sleeps else peak)


def cache_bytes(
    config: PretrainedConfig, dtype: torch.dtype, room: int, max_length: int, max_sequences: int, device_type: str
) -> int:
    """Memory for keys and values: all of `room` bytes, but no more than `max_sequences` of `max_length` tokens fill.

    Raises:
        UserError: not even one sequence fits; names what would help.
    """
    block = BLOCKS[device_type]
    block_bytes, blocks_of_one = block * kv_bytes_per_token(config, dtype), -(-max_length // block)
    if room < (blocks_of_one + 1) * block_bytes:
        raise UserError(
            f"engine.kind: {_gib(max(room, 0))} GiB are left for vLLM's keys and values, and a sequence of "
            f"{max_length:,} tokens takes {_gib((blocks_of_one + 1) * block_bytes)}; lower engine.max_new_tokens, "
            "train a LoRA adapter (lora.rank), or put vLLM on other GPUs (engine.kind: vllm_server)"
        )
    return min(room // block_bytes, max_sequences * blocks_of_one + 1) * block_bytes


def _gib(amount: float) -> str:
    return f"{amount / 2**30:.3g}"
