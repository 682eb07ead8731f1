"""The memory tables of docs/engines.md, by the function that plans a run.

    python -m benchmarks.memory_table            # prints them
    python -m benchmarks.memory_table --write    # and puts them into docs/engines.md

Nothing is measured here: shapes are multiplied out. `tests/engines/test_plan.py` fails when the page is stale.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from fdpg_fast.config.schema import LoRAConfig
from fdpg_fast.doctor import adapter_size
from fdpg_fast.engines.plan import MemoryPlan, plan_memory
from fdpg_fast.errors import UserError

PAGE = Path(__file__).resolve().parents[1] / "docs/engines.md"
BEGIN, END = "<!-- by python -m benchmarks.memory_table --write -->\n", "<!-- end of tables -->"
GPUS, LENGTHS = (24, 80, 141), (512, 2048, 8192)  # GiB, tokens
MICRO_BATCH_TOKENS, MAX_SEQUENCES, LORA_RANK = 4096, 1024, 16

_LLAMA = dict(vocab_size=128_256, num_key_value_heads=8)
MODELS: dict[str, PretrainedConfig] = {
    "Qwen2.5-0.5B": Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "Llama-3.2-1B": LlamaConfig(
        **_LLAMA,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        tie_word_embeddings=True,
    ),
    "Llama-3.2-3B": LlamaConfig(
        **_LLAMA,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        tie_word_embeddings=True,
    ),
    "Llama-3.1-8B": LlamaConfig(
        **_LLAMA, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32
    ),
}


def plan(config: PretrainedConfig, gpu: int, length: int, *, sleeps: bool, lora_rank: int = 0) -> MemoryPlan:
    """Of a bfloat16 model on a GPU of so many GiB; vLLM sleeps during the update, or shares the learner's weights.

    Raises:
        UserError: it does not fit.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    num_adapter = adapter_size(model, LoRAConfig(rank=lora_rank)) if lora_rank else 0
    return plan_memory(
        config,
        num_parameters=sum(p.numel() for p in model.parameters()) + num_adapter,
        num_adapter=num_adapter,
        dtype=torch.bfloat16,
        device_bytes=gpu * 2**30,
        max_length=length,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        max_sequences=MAX_SEQUENCES,
        shared_weights=not sleeps,
        sleeps=sleeps,
    )


def tables() -> str:
    """Two tables in Markdown: sequences side by side, and what takes the rest."""
    lines = [f"| model | tokens | {' | '.join(f'{gpu} GiB' for gpu in GPUS)} |", "|---|---|" + "---|" * len(GPUS)]
    for name, config, lora_rank in _cases():
        ways = [True] if lora_rank else [False, True]  # with LoRA vLLM always sleeps
        for length in LENGTHS:
            cells = [
                " / ".join(_sequences(config, gpu, length, sleeps=sleeps, lora_rank=lora_rank) for sleeps in ways)
                for gpu in GPUS
            ]
            lines.append(f"| {name} | {length:,} | {' | '.join('–' if c == '– / –' else c for c in cells)} |")
    lines += [
        "",
        "| GiB | policy | base | optimizer | gradients | activations | vLLM's weights | vLLM's work |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, config, lora_rank in _cases():
        p = plan(config, 10_000, MICRO_BATCH_TOKENS, sleeps=True, lora_rank=lora_rank)
        parts = [p.policy, p.base, p.optimizer, p.gradients, p.activations, p.engine_weights, p.engine_work]
        lines.append(f"| {name} | {' | '.join(f'{part / 2**30:.1f}' for part in parts)} |")
    return "\n".join(lines) + "\n"


def _cases() -> list[tuple[str, PretrainedConfig, int]]:
    trained = [(name, config, 0) for name, config in MODELS.items()]
    return trained + [(f"{name}, LoRA", MODELS[name], LORA_RANK) for name in ("Llama-3.2-3B", "Llama-3.1-8B")]


def _sequences(config: PretrainedConfig, gpu: int, length: int, **way: Any) -> str:
    try:
        return f"{plan(config, gpu, length, **way).sequences:,}"
    except UserError:
        return "–"


if __name__ == "__main__":
    text = tables()
    print(text)
    if "--write" in sys.argv[1:]:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{rest[rest.index(END) :]}", encoding="utf-8")
