"""Models whose layers have windows, soft caps and sinks: past its window each is what its own eager attention makes it.

As in test_language_model.py the yardstick is the plain model, one sequence at a time; here it runs eagerly, for SDPA
drops caps and sinks. Some of these models tell attention of a window, and some only mask what is outside.
"""

import pytest
import torch
import transformers as hf

from fdpg_fast.engines import TransformersEngine
from fdpg_fast.models.language_model import LanguageModel
from support.language import EOS, GROUPED, build, contexts_of, plain_logprobs, rollouts_of
from support.scored_models import CAPS, LOCAL, SLIDING, TABLE, beside_plain, table
from support.storages import extra_memory


@pytest.mark.parametrize("name", LOCAL)
def test_engine_scorer_and_plain_forward_agree_past_the_window(name):
    plain, language_model = beside_plain(LOCAL[name]())
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


@pytest.mark.parametrize("name", LOCAL)
def test_gradients_equal_those_of_the_plain_forward_pass(name):
    plain, language_model = beside_plain(LOCAL[name]())
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


def test_the_table_of_models_is_what_it_would_be_now():
    """Renew it by PYTHONPATH=.:kernels:tests python -m support.scored_models."""
    assert TABLE.read_text(encoding="utf-8") == table()
