"""A Llama of four tokens: every text that it can write in LONGEST tokens is in TEXTS."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END, LETTERS, LONGEST = "<|end|>", "abc", 3
TEXTS = [text for n in range(LONGEST + 1) for text in itertools.product((1, 2, 3), repeat=n)]


def save_model(folder: Path) -> Path:
    """A random Llama of four tokens, one of which ends a text."""
    vocabulary = {symbol: index for index, symbol in enumerate((END, *LETTERS))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
