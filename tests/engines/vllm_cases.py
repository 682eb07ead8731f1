"""A model small enough for vLLM on two cores, contexts that hide traps, and how far two sets of log-probs are apart."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fdpg_fast.contexts import Context
from fdpg_fast.language_model import LanguageModel
from fdpg_fast.rollouts import Rollouts

VOCABULARY = 128
CONFIG_EOS = 5
EOS = (7, 11)  # not what the model's config says: a completion may run through that one
# one token; an EOS inside, twice; longer than a block of the prefix cache, 128 tokens on a CPU
PROMPTS = ((3,), (80, 33, 7, 66, 72), (80, 33, 7, 66, 72), tuple(range(20, 110)) * 2)
CONTEXTS = tuple(Context(i, "", prompt) for i, prompt in enumerate(PROMPTS))
TOLERANCE = 1e-4  # nats a token, float32


def save_model(folder: Path, *, tied: bool = True) -> Path:
    """A random 2-layer Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,  # heads of 32, the smallest that vLLM's attention takes on a CPU
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.3,  # peaked enough that texts differ and EOS happens
        bos_token_id=0,
        eos_token_id=CONFIG_EOS,
        pad_token_id=CONFIG_EOS,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def perturb(policy: LanguageModel, seed: int) -> None:
    """Move every weight by about a tenth of their spread."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((0.1 * parameter.float().std() + 0.02) * noise)


def gap(policy: LanguageModel, rollouts: Rollouts) -> Tensor:
    """|log q − log π| of each sampled token, [N]."""
    return (policy.token_logprobs(rollouts, 4096) - rollouts.behavior_logprob).abs()
