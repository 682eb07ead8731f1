"""Models whose layers have windows, soft caps and sinks: past its window each is what its own eager attention makes it.

As in test_language_model.py the yardstick is the plain model, one sequence at a time; here it runs eagerly, for SDPA
drops caps and sinks. Some of these models tell attention of a window, and some only mask what is outside.
"""

import copy

import pytest
import torch
import transformers as hf

from fdpg_fast.engines import TransformersEngine
from fdpg_fast.models.language_model import LanguageModel
from support.language import EOS, GROUPED, build, contexts_of, plain_logprobs, rollouts_of
from support.storages import extra_memory

WINDOW = 7
SLIDING = {**GROUPED, "head_dim": 8, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EVERYWHERE = {**GROUPED, "sliding_window": WINDOW}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
CAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 4.0}
MIMO = {"num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS = {
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


def pair(name, dtype=torch.float32):
    """The plain model, and another one behind the scoring path."""
    plain = build(MODELS[name](), dtype)
    for parameter_name, parameter in plain.named_parameters():
        if parameter_name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    wrapped = LanguageModel(copy.deepcopy(plain))
    plain.set_attn_implementation("eager")
    return plain, wrapped


@pytest.mark.parametrize("name", MODELS)
def test_engine_scorer_and_plain_forward_agree_past_the_window(name):
    plain, language_model = pair(name)
    engine = TransformersEngine(language_model, (EOS, 7, 13), max_new_tokens=20)
    rollouts = engine.sample(contexts_of(1, 21, 9, 4), 6, seed=2)
    assert int(rollouts.lengths.max()) == 20
    with torch.no_grad():
        expected = plain_logprobs(plain, rollouts)
        torch.testing.assert_close(rollouts.behavior_logprob, expected, atol=2e-5, rtol=0)
        for micro_batch_tokens in (40, 100_000):
            ours = language_model.token_logprobs(rollouts, micro_batch_tokens)
            torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)
        for part in ("sliding_window", "attn_logit_softcapping"):  # else nothing has been tested
            if getattr(plain.config, part, None) is not None:
                setattr(plain.config, part, type(getattr(plain.config, part))(64))
                for module in plain.modules():
                    if hasattr(module, part):
                        setattr(module, part, 64)
                assert float((plain_logprobs(plain, rollouts) - expected).abs().max()) > 1e-2, part


@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_those_of_the_plain_forward_pass(name):
    plain, language_model = pair(name)
    completions = [[[*range(5, 25)], [EOS]], [[8, 9, 10], [*range(30, 45)]], [[15, EOS, EOS], [16] * 9]]
    rollouts = rollouts_of(contexts_of(3, 1, 17), completions)
    weights = torch.randn(rollouts.num_tokens, generator=torch.Generator().manual_seed(3))
    plain_logprobs(plain, rollouts).mul(weights).sum().backward()
    ours = language_model.head.logprob(language_model.hidden(rollouts), rollouts.token_ids)
    ours.mul(weights).sum().backward()
    wrapped = dict(language_model.model.named_parameters())
    assert any(key.endswith("sinks") for key in wrapped) == (name in ("gpt_oss", "granite_swa"))
    for parameter_name, parameter in plain.named_parameters():
        if parameter.grad is None:
            assert wrapped[parameter_name].grad is None, parameter_name
            continue
        size = max(1.0, float(parameter.grad.abs().max()))
        torch.testing.assert_close(wrapped[parameter_name].grad, parameter.grad, atol=1e-4 * size, rtol=0)


NARROW = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
NARROW |= {"num_hidden_layers": 1, "max_position_embeddings": 10_000}
LONG = {
    "flash parts": lambda: hf.LlamaConfig(**{**GROUPED, **NARROW}),
    "blocks": lambda: hf.Gemma2Config(
        **{**SLIDING, **CAPS, **NARROW, "sliding_window": 200, "num_hidden_layers": 2}, hidden_activation="gelu"
    ),
}


@pytest.mark.parametrize("name", LONG)
def test_memory_is_linear_in_tokens_forward_and_backward(name):
    language_model = LanguageModel(build(LONG[name]()))
    weights = [*language_model.model.base_model.parameters()]
    per_token = []
    for length in (512, 2048, 8192):
        rollouts = rollouts_of(contexts_of(256), [[[7] * (length - 256), [8] * (length // 2)]])

        def step(rollouts=rollouts):
            return torch.autograd.grad(language_model.hidden(rollouts).sum(), weights)

        per_token.append(extra_memory(step, weights)["peak_extra_bytes"] / (256 + rollouts.num_tokens))
    assert max(per_token) < 1.1 * min(per_token), per_token
