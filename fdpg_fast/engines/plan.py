"""How much memory learner and vLLM take when they share one GPU, reckoned from the model before anything is loaded.

Upper estimates from the shapes of the tensors; no GPU has confirmed them yet. docs/engines.md shows what they come to.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from transformers import PretrainedConfig

from ..errors import UserError

LOSS_ROWS, LOSS_BYTES = 4096, 2**30  # the fused loss's one block of logits in bfloat16: whichever of the two is less
CHUNKED_LOSS_BYTES = 2**25  # in float32 the loss is chunked PyTorch, with a block of this size
FORWARD_TOKENS = 16_384  # in one forward pass of vLLM: the largest of its defaults
# CUDA context 0.5 GiB, vLLM's CUDA graphs 1, workspaces of cuBLAS and NCCL and compiled kernels 0.5, and 1 for what
# two users of one allocator leave in pieces
RESERVE = 3 * 2**30
CPU_SHARE = 4  # there the cache takes a quarter of the memory: weights, optimizer and activations want the rest
GPU_BLOCK, CPU_BLOCK = 16, 128  # tokens in a block of vLLM's cache, of which it keeps one for itself


@dataclass(frozen=True)
class MemoryPlan:
    """What lies on one device, in bytes but for the last two."""

    device: int  # what there is
    policy: int = 0  # weights
    base: int = 0
    optimizer: int = 0  # AdamW's two float32 moments, and float32 master weights where the policy is bfloat16
    gradients: int = 0  # in the policy's dtype, and where that is bfloat16 the head's sum in float32 too
    activations: int = 0  # of one micro-batch, and the loss's block; or the gradients' float32 copies if those are more
    engine_weights: int = 0  # vLLM's own copy
    engine_work: int = 0  # of a forward pass of vLLM, or of the learner while it scores, and of the sampler
    reserve: int = 0
    kv_cache: int = 0  # keys and values: all that is left, but no more than max_sequences sequences fill
    tokens_cached: int = 0  # whose keys and values fit
    sequences: int = 0  # prompts with completions of full length, side by side

    def describe(self) -> str:
        """GiB: a line for the parts, if there are any, and one for the cache."""
        parts = {f.name.replace("engine_", "vLLM's "): getattr(self, f.name) for f in fields(self)[1:9]}
        lines = [", ".join(f"{name} {_gib(amount)}" for name, amount in parts.items() if amount)]
        if self.kv_cache:
            lines += [f"key-value cache {_gib(self.kv_cache)}: {self.tokens_cached:,} tokens, "]
            lines[-1] += f"{self.sequences:,} sequences of full length side by side"
        return "\n".join(filter(None, lines))


def plan_memory(
    config: PretrainedConfig,
    *,
    num_parameters: int,
    dtype: torch.dtype,
    device_bytes: int,
    max_length: int,
    micro_batch_tokens: int,
    max_sequences: int,
    shared_weights: bool,
    sleeps: bool,
    num_adapter: int = 0,
) -> MemoryPlan:
    """The memory of one GPU that trains every parameter of a model, or a LoRA adapter, and samples from it.

    Args:
        config: of the model.
        num_parameters: of the policy; tied ones count once.
        dtype: of policy, base and engine.
        device_bytes: of the GPU, less what other processes hold.
        max_length: longest prompt and completion together, in tokens.
        micro_batch_tokens: in one forward and backward pass; max_length if that is more.
        max_sequences: completions decoded side by side; 0: the engine is elsewhere.
        shared_weights: the policy's parameters are the engine's.
        sleeps: the engine gives back its cache, and weights of its own, before gradients and activations are made.
        num_adapter: how many of the parameters are a LoRA adapter's, in float32, which is all that is trained then.

    Raises:
        UserError: not even one sequence of max_length fits; it says how much is missing and what would help.
    """
    c, item, narrow = config.get_text_config(), dtype.itemsize, dtype != torch.float32
    head = c.vocab_size * c.hidden_size
    loss = min(LOSS_ROWS * c.vocab_size * item, LOSS_BYTES) if narrow else CHUNKED_LOSS_BYTES
    activations = max(micro_batch_tokens, max_length) * activation_bytes_per_token(c, dtype) + loss
    # of a layer: residual, normed, query, key and value, attended; gate, up, their product. Of the sampler: logits,
    # and in float32 their copy, log-softmax, softmax and noise
    forward_tokens = max(FORWARD_TOKENS, 4 * micro_batch_tokens)
    work = forward_tokens * (5 * c.hidden_size + 3 * _inner(c)) * item + max_sequences * c.vocab_size * (item + 16)
    plan = MemoryPlan(
        device_bytes,
        policy=num_parameters * item,
        base=num_parameters * item,
        optimizer=num_parameters * (12 if narrow else 8),
        gradients=num_parameters * item + (head * 4 if narrow else 0),
        activations=max(activations, num_parameters * (4 - item)),
        engine_weights=0 if shared_weights or not max_sequences else num_parameters * item,
        engine_work=work if max_sequences else 0,
        reserve=RESERVE,
    )
    if num_adapter:  # whose layers each keep their input of a token in float32
        inputs = c.num_hidden_layers * (5 * c.hidden_size + c.num_attention_heads * _head_dim(c) + _inner(c))
        activations += max(micro_batch_tokens, max_length) * inputs * (4 if narrow else 0)
        policy = plan.policy + num_adapter * (4 - item)
        moments, gradients = num_adapter * 8, num_adapter * 4
        plan = replace(plan, policy=policy, base=0, optimizer=moments, gradients=gradients, activations=activations)
    kept, updating = plan.policy + plan.base + plan.optimizer + plan.reserve, plan.gradients + plan.activations
    room = device_bytes - kept - plan.engine_weights - plan.engine_work - (0 if sleeps else updating)
    plan, one = _with_cache(plan, config, dtype, room, max_length, max_sequences, GPU_BLOCK)
    learner_fits = kept + updating <= device_bytes
    tokens_help = kept + plan.gradients + (0 if num_adapter else num_parameters * (4 - item)) <= device_bytes
    sleeping_fits = learner_fits and kept + plan.policy + plan.engine_work + one <= device_bytes
    missing = max(kept + updating - device_bytes, one - room if max_sequences else 0)
    if missing > 0:
        remedies = {
            "dtype: bfloat16": not narrow,
            "fewer trainer.micro_batch_tokens": tokens_help and micro_batch_tokens > max_length,
            "fewer engine.max_new_tokens": tokens_help and (learner_fits or max_length >= micro_batch_tokens),
            "a LoRA adapter (lora.rank)": not num_adapter and not learner_fits,
            "a smaller model": not learner_fits,
            "engine.share_weights: false with trainer.pipeline_depth: 0, for vLLM to sleep meanwhile": sleeping_fits,
            "engine.kind: vllm_server, with vLLM on other GPUs": learner_fits,
        }
        raise UserError(
            f"device: {_gib(device_bytes)} GiB of memory are {_gib(missing)} too few for sequences of {max_length:,} "
            f"tokens ({replace(plan, kv_cache=0).describe()}, keys and values of one {_gib(one)}); what helps: "
            f"{', '.join(remedy for remedy, helps in remedies.items() if helps)}"
        )
    return plan


def plan_cpu_cache(
    config: PretrainedConfig, *, dtype: torch.dtype, memory_bytes: int, max_length: int, max_sequences: int
) -> MemoryPlan:
    """The cache of an engine on the CPU, in at most a quarter of the machine's memory_bytes; nothing else is planned.

    Raises:
        UserError: not even one sequence of max_length fits.
    """
    room = memory_bytes // CPU_SHARE
    plan, one = _with_cache(MemoryPlan(memory_bytes), config, dtype, room, max_length, max_sequences, CPU_BLOCK)
    if not plan.sequences:
        raise UserError(
            f"engine.max_new_tokens: keys and values of {max_length:,} tokens take {_gib(one)} GiB, and a quarter of "
            f"this machine's memory is {_gib(room)}; ask for fewer"
        )
    return plan


def activation_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """What all layers keep of a token until their backward pass; Llama and Qwen 2 and 3 keep 75 to 99 % of this."""
    c = config.get_text_config()
    attention = c.num_hidden_layers * c.num_attention_heads * _head_dim(c) * dtype.itemsize
    outside = c.num_hidden_layers * (4 * _inner(c) + 6 * c.hidden_size) * dtype.itemsize
    return outside + 5 * (attention + kv_bytes_per_token(c, dtype))


def kv_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Keys and values of a token in all layers; more than there is in layers with a sliding window."""
    c = config.get_text_config()
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    return 2 * c.num_hidden_layers * heads * _head_dim(c) * dtype.itemsize


def _inner(config: PretrainedConfig) -> int:
    return getattr(config, "intermediate_size", None) or 4 * config.hidden_size


def _head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _with_cache(
    plan: MemoryPlan, config: PretrainedConfig, dtype: torch.dtype, room: int, max_length: int, most: int, block: int
) -> tuple[MemoryPlan, int]:
    """The plan with a cache in `room` bytes, and the bytes of the least cache that vLLM takes."""
    block_bytes, blocks_of_one = block * kv_bytes_per_token(config, dtype), -(-max_length // block)
    blocks = max(0, min(room // block_bytes, most * blocks_of_one + 1)) if most else 0
    usable = max(0, blocks - 1)
    cache = replace(
        plan, kv_cache=blocks * block_bytes, tokens_cached=usable * block, sequences=usable // blocks_of_one
    )
    return cache, (blocks_of_one + 1) * block_bytes


def _gib(amount: int) -> str:
    return f"{amount / 2**30:.3g}"
