"""A tiny random language model with a byte-level tokenizer, made once a session: tests need no download."""

from __future__ import annotations

import os
from pathlib import Path

from fdpg_fast.cli import prepare_environment

prepare_environment()  # before torch is imported
os.environ.setdefault("TRITON_INTERPRET", "1")  # read where kernels are defined; "auto" stays chunked on a CPU

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fdpg_fast import progress

END = "<|end|>"


@pytest.fixture(autouse=True)
def _nothing_on_what_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine must not add lines to what a test reads."""
    monkeypatch.setattr(progress, "AFTER", 3600.0)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random 2-layer Llama (257 tokens: the bytes and an end token that is BOS, EOS and pad)."""
    return save_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def vllm_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with heads of 32, the smallest that vLLM's attention takes on a CPU."""
    return save_model(tmp_path_factory.mktemp("vllm-model"), head_dim=32)


def save_model(folder: Path, **settings: int) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([END, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)
    wrapped.save_pretrained(folder)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        tie_word_embeddings=True,
        initializer_range=0.3,  # peaked enough that texts differ and EOS happens
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **settings,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
