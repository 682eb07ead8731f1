"""Tiny random models by what their attention is, and the table of docs/models.md, which `python -m` this writes.

PYTHONPATH=.:kernels:tests python -m support.scored_models
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers as hf

from fdpg_fast.errors import UserError
from fdpg_fast.models.attention import Kind
from fdpg_fast.models.language_model import LanguageModel
from fdpg_fast.models.packed import PackedBatch

from .language import COMMON, GROUPED, VOCABULARY, build, contexts_of, plain_logprobs, rollouts_of

TABLE = Path(__file__).resolve().parents[2] / "docs/models.md"
HEAD = """\
# Models that can be scored

Tiny random models of each kind: what their layers ask of attention beside causality, and whether log-probs of packed
rows are those of the model's own eager attention, on texts of up to 33 tokens with windows of 7 (float32, to 2e-5).
Written by `PYTHONPATH=.:kernels:tests python -m support.scored_models`; a test compares it.

| model_type | layers with | log-probs |
|---|---|---|
"""
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
OPT = {**COMMON, "ffn_dim": 40, "word_embed_proj_dim": 24, "pad_token_id": 1}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "qk_nope_head_dim": 8}
DEEPSEEK = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, **EXPERTS, **LATENT}
NO_SOFTCAP = {"attn_logit_softcapping": None, "final_logit_softcapping": 2.0}

CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**GROUPED),
    "qwen3": lambda: hf.Qwen3Config(**GROUPED, head_dim=16),
    "gpt2: learned positions": lambda: hf.GPT2Config(**GPT2),
    "gpt_bigcode: one key head": lambda: hf.GPTBigCodeConfig(**GPT2),
    "gemma3: local and global rope": lambda: hf.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window_pattern=2),
    "gemma2: final soft cap": lambda: hf.Gemma2Config(**GROUPED, head_dim=8, **NO_SOFTCAP),
    "mistral": lambda: hf.MistralConfig(**GROUPED),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**COMMON),
    "opt: position offset, projections": lambda: hf.OPTConfig(**OPT),
    "phi3": lambda: hf.Phi3Config(**GROUPED),
    "phi: bias in the head": lambda: hf.PhiConfig(**COMMON),
    "mixtral": lambda: hf.MixtralConfig(**GROUPED, num_local_experts=4),
    "cohere: logit_scale": lambda: hf.CohereConfig(**GROUPED, logit_scale=0.3),
    "granite: logits_scaling": lambda: hf.GraniteConfig(**GROUPED, logits_scaling=4.0, attention_multiplier=0.2),
    "deepseek: values narrower than keys": lambda: hf.DeepseekV3Config(**COMMON, **DEEPSEEK, num_key_value_heads=4),
}


WINDOW = 7
SLIDING = {**GROUPED, "head_dim": 8, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EVERYWHERE = {**GROUPED, "sliding_window": WINDOW}
CAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 4.0}
LOCAL = {  # windows, soft caps and sinks
    "gemma2": lambda: hf.Gemma2Config(**SLIDING, **CAPS),
    "gemma3": lambda: hf.Gemma3TextConfig(**SLIDING),
    "vaultgemma": lambda: hf.VaultGemmaConfig(**SLIDING, **CAPS),
    "mistral": lambda: hf.MistralConfig(**EVERYWHERE),
    "ministral": lambda: hf.MinistralConfig(**SLIDING),
    "mixtral": lambda: hf.MixtralConfig(**EVERYWHERE, num_local_experts=4),
    "phimoe": lambda: hf.PhimoeConfig(**EVERYWHERE, num_local_experts=4),
    "phi3": lambda: hf.Phi3Config(**EVERYWHERE),
    "starcoder2": lambda: hf.Starcoder2Config(**EVERYWHERE),
    "gpt_oss": lambda: hf.GptOssConfig(**SLIDING, num_local_experts=4),
    "qwen2": lambda: hf.Qwen2Config(**SLIDING, use_sliding_window=True),
    "qwen3": lambda: hf.Qwen3Config(**SLIDING, use_sliding_window=True),
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(
        **SLIDING, **EXPERTS, use_sliding_window=True, num_experts=4, shared_expert_intermediate_size=16
    ),
    "cohere2": lambda: hf.Cohere2Config(**SLIDING),
    "olmo3": lambda: hf.Olmo3Config(**SLIDING),
    "smollm3": lambda: hf.SmolLM3Config(**SLIDING, use_sliding_window=True, no_rope_layers=[0, 1]),
    "exaone4": lambda: hf.Exaone4Config(**SLIDING),
    "granite_swa": lambda: hf.GraniteSWAConfig(**SLIDING),
}


INDEXED = {**COMMON, **EXPERTS, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "v_head_dim": 8}
INDEXED |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
INDEXED |= {"first_k_dense_replace": 1, "n_shared_experts": 1, "index_n_heads": 2, "index_head_dim": 8}
CHOOSING = {  # layers that see all up to 16 tokens
    "doge": lambda: hf.DogeConfig(**GROUPED, keep_window_size=16),
    "deepseek_v32": lambda: hf.DeepseekV32Config(**INDEXED, index_topk=16),
    "glm_moe_dsa": lambda: hf.GlmMoeDsaConfig(**INDEXED, index_topk=16),
}


NEO = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8}
RECURRENT = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
HYBRID = {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 4}
REFUSED = {
    "gpt_neo: attention of its own": (
        lambda: hf.GPTNeoConfig(vocab_size=VOCABULARY, hidden_size=32, **NEO, initializer_range=0.2),
        "computes its attention itself",
    ),
    "mamba: no attention": (lambda: hf.MambaConfig(**RECURRENT), "computes its attention itself|let its attention"),
    "jamba: attention and recurrence": (lambda: hf.JambaConfig(**GROUPED, **HYBRID), "packed rows"),
    "bloom: alibi": (
        lambda: hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
        "computes its attention itself",
    ),
}


def beside_plain(config: Any) -> tuple[Any, LanguageModel]:
    """The plain model, eager, and the same one behind the scoring path; sinks are random too."""
    plain = build(config)
    for name, parameter in plain.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    wrapped = LanguageModel(copy.deepcopy(plain))
    plain.set_attn_implementation("eager")
    return plain, wrapped


def row(config: Any) -> str:
    kinds: set[str] = set()

    def attend(batch: PackedBatch, query: Any, key: Any, value: Any, kind: Kind) -> Any:
        asked = kind.over(batch.longest)
        parts = {"windows": asked.window, "soft caps": asked.softcap, "sinks": asked.sinks}
        kinds.update(name for name, part in parts.items() if part is not None)
        return computed(batch, query, key, value, kind)

    computed = PackedBatch.attend
    try:
        plain, wrapped = beside_plain(config)
        rollouts = rollouts_of(contexts_of(3, 21), [[[*range(5, 17)], [9]], [[*range(30, 42)]]])
        with torch.no_grad(), mock.patch.object(PackedBatch, "attend", attend):
            apart = float((wrapped.token_logprobs(rollouts, 10**6) - plain_logprobs(plain, rollouts)).abs().max())
        assert apart < 2e-5, config.model_type
        found = "exact"
    except UserError as error:
        reason = str(error).removeprefix("model: ")
        past = " past the " in reason
        found = "exact for texts that its layers see whole, else refused" if past else f"refused: {kind_of(reason)}"
    return f"| {config.model_type} | {', '.join(sorted(kinds)) or '–'} | {found} |"


def kind_of(reason: str) -> str:
    """A refusal without numbers, which may be others elsewhere."""
    known = ("computes its attention itself", "does not let its attention be chosen", "cannot be scored on packed rows")
    return next((words for words in known if words in reason), "cannot run on packed rows")


def table() -> str:
    models: list[Callable[[], Any]] = [*CONFIGS.values(), *LOCAL.values(), *CHOOSING.values()]
    configs = [config() for config in models] + [config() for config, _ in REFUSED.values()]
    rows = sorted({row(config) for config in configs})
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
