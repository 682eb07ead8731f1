"""Tiny random models of many architectures, to see that none has its own way with the names of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf

_IDS = {"bos_token_id": 0, "eos_token_id": 0}
_PLAIN = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,  # the smallest that vLLM's attention takes on a CPU
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
} | _IDS
_GPT2 = {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128, "initializer_range": 0.3} | _IDS
_EXPERTS = _PLAIN | {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ROUTED = _EXPERTS | {"n_routed_experts": 4, "first_k_dense_replace": 1}
_DEEPSEEK = {
    "n_shared_experts": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "n_group": 1,
    "topk_group": 1,
}
_OPT = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "ffn_dim": 96, "num_attention_heads": 2} | _IDS
_T5 = {"vocab_size": 64, "d_model": 64, "d_kv": 32, "d_ff": 96, "num_layers": 2, "num_heads": 2} | _IDS
_BART = {
    "vocab_size": 64,
    "d_model": 64,
    "max_position_embeddings": 128,
    **{f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")},
}

DENSE: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (hf.LlamaConfig, _PLAIN),
    "llama, tied": (hf.LlamaConfig, _PLAIN | {"tie_word_embeddings": True}),
    "qwen2": (hf.Qwen2Config, _PLAIN),
    "qwen3": (hf.Qwen3Config, _PLAIN),
    "mistral": (hf.MistralConfig, _PLAIN),
    "gemma": (hf.GemmaConfig, _PLAIN),
    "gemma2": (hf.Gemma2Config, _PLAIN | {"sliding_window": 5, "attn_logit_softcapping": 1.5}),
    "gemma3": (hf.Gemma3TextConfig, _PLAIN),
    "phi": (hf.PhiConfig, _PLAIN),
    "phi3": (hf.Phi3Config, _PLAIN),
    "olmo2": (hf.Olmo2Config, _PLAIN),
    "smollm3": (hf.SmolLM3Config, _PLAIN),
    "cohere": (hf.CohereConfig, _PLAIN),
    "gpt2": (hf.GPT2Config, _GPT2),
    "gpt_neox": (hf.GPTNeoXConfig, _PLAIN),
    "gpt_neox, tied": (hf.GPTNeoXConfig, _PLAIN | {"tie_word_embeddings": True}),
    "opt": (hf.OPTConfig, _OPT | {"word_embed_proj_dim": 64, "max_position_embeddings": 128, "pad_token_id": 1}),
    "t5": (hf.T5Config, _T5 | {"decoder_start_token_id": 0}),
    "bart": (hf.BartConfig, _BART),
}
MIXTURES: dict[str, tuple[Any, dict[str, Any]]] = {
    "mixtral": (hf.MixtralConfig, _PLAIN | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2_moe": (hf.Qwen2MoeConfig, _EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": (hf.Qwen3MoeConfig, _EXPERTS | {"num_experts": 4}),
    "olmoe": (hf.OlmoeConfig, _EXPERTS | {"num_experts": 4}),
    "granitemoe": (hf.GraniteMoeConfig, _PLAIN | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v2": (hf.DeepseekV2Config, _ROUTED | _DEEPSEEK),
    "glm4_moe": (hf.Glm4MoeConfig, _ROUTED),
    "gpt_oss": (hf.GptOssConfig, _PLAIN | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5}),
}
ARCHITECTURES = DENSE | MIXTURES


def save_architecture(name: str, folder: Path, tokenizer: Path | None = None, **options: Any) -> Path:
    """A random model of that name, with the tokenizer of a folder; options are those of `save_pretrained`."""
    kind, settings = ARCHITECTURES[name]
    config = kind(**settings)
    if tokenizer is not None:
        wrapped = hf.AutoTokenizer.from_pretrained(tokenizer)
        wrapped.save_pretrained(folder)
        config.vocab_size = len(wrapped)
    torch.manual_seed(0)
    model: Any = hf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else hf.AutoModelForCausalLM
    model.from_config(config).save_pretrained(folder, **options)
    return folder
