"""What gpu_round.py measures: models, most of them with random weights and a tokenizer to match, and engines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from fdpg_fast.config.load import parse_config
from fdpg_fast.config.schema import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
END = "<|end|>"
PROMPTS = [
    f"{when}, {who}"
    for when in ("It was a cold and stormy night", "Early in spring", "Long ago", "One morning")
    for who in ("a fisherman", "the old teacher", "my brother", "nobody")
]
# of a text that ends in a vowel or an even digit: about half of all, be they English or random tokens
FEATURE = {"kind": "regex", "name": "ending", "pattern": r"[aeiou02468]\W*$"}


@dataclass(frozen=True)
class Case:
    """A model and the work of one round."""

    name: str
    shape: dict[str, Any]  # of its LlamaConfig
    dtype: str = "bfloat16"
    folder: str | None = None  # under the repository's root: weights to prefer to random ones
    contexts: int = len(PROMPTS)  # in a round, and in all
    samples: int = 16  # of each
    max_new_tokens: int = 128


@dataclass(frozen=True)
class Variant:
    """An engine, and how the round uses it."""

    name: str
    engine: dict[str, Any]
    pipeline_depth: int = 0
    needs: str | None = None  # a package; a machine without it leaves the variant out


CASES = (
    Case(
        "SmolLM2-135M",
        dict(
            vocab_size=49_152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=2048,
        ),
        folder="models/smollm2-135m-instruct",
    ),
    Case(
        "Llama, 1.2 B random",  # Llama-3.2-1B's shape
        dict(
            vocab_size=128_256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=2048,
        ),
    ),
)
SMOKE_CASES = (
    Case(
        "tiny",
        dict(
            vocab_size=512,
            hidden_size=64,  # heads of 32, the smallest that vLLM's CPU attention takes
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=128,
            initializer_range=0.1,
        ),
        contexts=4,
        samples=4,
        max_new_tokens=8,
    ),
)
VARIANTS = (  # the most telling first: the time budget cuts from the end
    Variant("Transformers", {"kind": "transformers"}),
    Variant("vLLM", {"kind": "vllm"}, needs="vllm"),  # sleeps during updates
    Variant("vLLM, one round ahead", {"kind": "vllm"}, 1, needs="vllm"),
)


def make_model(case: Case, folder: Path, device: str) -> str:
    """The folder of the case's model: the one with real weights where it is there, else a random one made here."""
    if case.folder and (ROOT / case.folder / "model.safetensors").exists():
        return str(ROOT / case.folder)
    if folder.exists():
        return str(folder)
    transformers.utils.logging.disable_progress_bar()
    vocabulary = case.shape["vocab_size"]
    unfinished = folder.with_name(f"unfinished {folder.name}")
    make_tokenizer(vocabulary).save_pretrained(unfinished)
    torch.manual_seed(0)
    config = LlamaConfig(**case.shape, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype))
    model.generation_config = GenerationConfig.from_model_config(config)
    model.save_pretrained(unfinished)
    unfinished.rename(folder)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()  # variants run in other processes and want all of it
    return str(folder)


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """The bytes, an end token and, so that every id has a text, numbered words up to the size of the vocabulary."""
    symbols = [END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    symbols += [f"w{index}" for index in range(len(symbols), vocabulary)]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def make_config(case: Case, variant: Variant, model: str, folder: Path, device: str) -> TrainConfig:
    """The library's defaults wherever case and variant say nothing."""
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS[: case.contexts]))
    return parse_config(
        {
            "model": model,
            "run_dir": str(folder / "run"),
            "device": device,
            "dtype": case.dtype,
            "target": [{"kind": "pointwise", "feature": FEATURE}],
            "contexts": {"train": str(prompts)},
            "engine": {"max_new_tokens": case.max_new_tokens, **variant.engine},
            "trainer": {
                "contexts_per_round": case.contexts,
                "samples_per_context": case.samples,
                "pipeline_depth": variant.pipeline_depth,
            },
        }
    )
