"""One scoring path: engine, `token_logprobs` and a model's own plain forward pass give every token the same log-prob.

The yardstick is a copy of the model made before it was wrapped, run on one sequence at a time: no padding, no packing,
no cache. Models are random and peaked (initializer_range 0.2), so that a wrong position, mask or shift moves a log-prob
by whole nats against the 1e-5 that is allowed.
"""

import copy
import itertools

import pytest
import torch
import transformers as hf

from fdpg_fast.contexts import Context
from fdpg_fast.engines import TransformersEngine
from fdpg_fast.errors import UserError
from fdpg_fast.models.language_model import LanguageModel
from support.language import EOS, GROUPED, VOCABULARY, build, contexts_of, plain_logprobs, rollouts_of
from support.scored_models import CONFIGS, REFUSED


@pytest.mark.parametrize("name", CONFIGS)
def test_engine_scorer_and_plain_forward_agree_token_by_token(name):
    plain = build(CONFIGS[name]())
    language_model = LanguageModel(copy.deepcopy(plain))
    ends = (EOS, 7, 13, 20, 33, 41, 50)  # about one token in nine: early ends, cut-offs, and EOS as first token
    engine = TransformersEngine(language_model, ends, max_new_tokens=8)
    rollouts = engine.sample(contexts_of(1, 9, 4, 2), 16, seed=2)
    lengths, finished = rollouts.lengths, rollouts.finished
    assert bool((finished & (lengths == 1)).any()) and bool((finished & (lengths > 2)).any())
    assert bool((~finished).any()) and bool((lengths[~finished] == 8).all())
    with torch.no_grad():
        expected = plain_logprobs(plain, rollouts)
    torch.testing.assert_close(rollouts.behavior_logprob, expected, atol=1e-5, rtol=0)
    for micro_batch_tokens in (1, 30, 100_000):  # one sequence each, uneven cuts, all at once
        ours = language_model.token_logprobs(rollouts, micro_batch_tokens)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_probabilities_of_all_completions_sum_to_one():
    """A dropped, doubled or misplaced EOS could not hide here: vocabulary 5, EOS = pad = 0, at most 3 tokens."""
    language_model = LanguageModel(build(hf.LlamaConfig(**{**GROUPED, "vocab_size": 5})))
    words = range(1, 5)
    texts = [[*text, EOS] for length in range(3) for text in itertools.product(words, repeat=length)]
    texts += [list(text) for text in itertools.product(words, repeat=3)]
    contexts = [Context(0, "", (0,)), Context(1, "", (3, 0, 4, 0))]
    rollouts = rollouts_of(contexts, [texts, texts])
    tokens = language_model.token_logprobs(rollouts, micro_batch_tokens=64).double()
    sequence = torch.repeat_interleave(torch.arange(len(rollouts)), rollouts.lengths)
    probability = torch.zeros(len(rollouts), dtype=torch.float64).index_add(0, sequence, tokens).exp()
    per_context = probability.view(2, -1).sum(1)
    torch.testing.assert_close(per_context, torch.ones(2, dtype=torch.float64), atol=1e-5, rtol=0)


# these compute norms, routing or softmax in float32 whatever the dtype of the model; the others are float64 throughout
FLOAT32_INSIDE = {"llama": 5e-6, "gemma2: final soft cap": 5e-6, "mixtral": 5e-6}
FLOAT64 = {"gpt2: learned positions": 1e-12, "gpt_neox": 1e-12, "phi: bias in the head": 1e-12}


@pytest.mark.parametrize(("name", "tolerance"), {**FLOAT32_INSIDE, **FLOAT64}.items())
def test_gradients_equal_those_of_the_plain_forward_pass(name, tolerance):
    plain = build(CONFIGS[name](), torch.float64)
    language_model = LanguageModel(copy.deepcopy(plain))
    contexts = contexts_of(3, 1, 7)
    completions = [[[5, 6, 7, EOS], [EOS]], [[8, 9], [10, 11, 12, 13, 14]], [[15, EOS, EOS], [16]]]
    rollouts = rollouts_of(contexts, completions)
    weights = torch.randn(rollouts.num_tokens, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    plain_logprobs(plain, rollouts).mul(weights).sum().backward()
    ours = language_model.head.logprob(language_model.hidden(rollouts), rollouts.token_ids)
    ours.mul(weights).sum().backward()
    wrapped = dict(language_model.model.named_parameters())
    assert sum(parameter.grad is not None for parameter in wrapped.values()) > 10
    for parameter_name, parameter in plain.named_parameters():
        mine = wrapped[parameter_name].grad
        if parameter.grad is None:
            assert mine is None, parameter_name
        else:
            torch.testing.assert_close(mine, parameter.grad, atol=tolerance, rtol=0)


class DoubledLogits(hf.LlamaForCausalLM):
    def forward(self, *args, **options):
        output = super().forward(*args, **options)
        output.logits = output.logits * 2
        return output


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_would_be_scored_wrongly_are_refused(name):
    config, message = REFUSED[name]
    model = build(config())
    with pytest.raises(UserError, match=message) as refusal:
        LanguageModel(model)
    assert "\n" not in str(refusal.value)


def test_a_model_with_logits_of_its_own_is_refused():
    torch.manual_seed(0)
    with pytest.raises(UserError, match="differ from the model's own"):
        LanguageModel(DoubledLogits(hf.LlamaConfig(**GROUPED)))


def test_the_wrapped_model_stays_an_ordinary_transformers_model(tmp_path):
    plain = build(CONFIGS["llama"]())
    wrapped = LanguageModel(copy.deepcopy(plain)).model
    ids = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # left padding
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        before, after = (m(ids, attention_mask=mask, position_ids=positions).logits for m in (plain, wrapped))
    assert torch.equal(before[mask.bool()], after[mask.bool()])
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(*(m.generate(ids, attention_mask=mask, **options) for m in (plain, wrapped)))
    wrapped.save_pretrained(tmp_path)
    assert "fdpg" not in (tmp_path / "config.json").read_text()  # others can open it without this library
    reloaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert reloaded.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, plain(ids).logits)
