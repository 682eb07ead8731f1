"""The embedded engine: exact draws, the right distribution, and completions that do not depend on their neighbours."""

import random

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM

from fdpg_fast.contexts import Context
from fdpg_fast.engines import TransformersEngine
from fdpg_fast.engines.embedded import draw
from fdpg_fast.models.decoding import Decoding
from fdpg_fast.models.language_model import LanguageModel
from fdpg_fast.models.load import load_model
from support.language import p_value, split

F64 = torch.float64
EOS = 0
PROMPTS = ((5,), (80, 33, 0, 66, 72), (9, 200, 17))  # unequal lengths, one with an EOS inside


@pytest.fixture(scope="module")
def language_model(tiny_model):
    return load_model(str(tiny_model), "float32", "cpu", trust_remote_code=False)


@pytest.fixture(scope="module")
def plain(tiny_model):
    """The same weights behind transformers' own forward pass."""
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


def contexts_of(*prompts):
    return [Context(i, "", prompt) for i, prompt in enumerate(prompts)]


def some_logits(vocabulary, seed=0, spread=3.0):
    return spread * torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed))


def draw_one(logits, uniform, **options):
    """`draw` of one distribution [V] at many uniforms [n]."""
    return draw(logits.repeat(len(uniform), 1), uniform, **options)


# --- draw ---


@pytest.mark.parametrize("vocabulary", [2, 127, 128, 129, 300])
def test_draw_inverts_the_cumulative_distribution(vocabulary):
    """On an even grid of n uniforms a token of probability p is drawn n·p times, to one: its interval's length."""
    logits, points = some_logits(vocabulary), 5000
    uniform = (torch.arange(points, dtype=F64) + 0.5) / points
    token, logprob = draw_one(logits, uniform)
    assert bool((token.diff() >= 0).all())
    probability = logits.double().softmax(0)
    counts = torch.bincount(token, minlength=vocabulary)
    assert float((counts - points * probability).abs().max()) < 1 + 1e-2  # float32 weights move an end by 1e-6·n
    torch.testing.assert_close(logprob.double(), probability.log()[token], atol=1e-6, rtol=0)


def test_draw_never_takes_a_token_of_probability_zero():
    logits = some_logits(3 * 128 + 5)
    logits[:3] = -torch.inf  # first tokens, a whole block, a block's tail, the last tokens
    logits[128:256] = -torch.inf
    logits[300:384] = -torch.inf
    logits[-2:] = -torch.inf
    largest_below_one = 1 - 2**-53
    uniform = torch.rand(3000, generator=torch.Generator().manual_seed(0), dtype=F64)
    uniform[:2] = torch.tensor([0.0, largest_below_one])
    token, logprob = draw_one(logits, uniform)
    assert bool(torch.isfinite(logits[token]).all()) and bool(torch.isfinite(logprob).all())
    assert int(token[0]) == 3  # the first that is possible
    logits[:128] = -torch.inf  # not even its block is
    assert draw_one(logits, uniform[:1])[0].tolist() == [256]


def test_draw_is_exact_where_a_block_ends():
    """u within 1e-10 of the edge between two blocks: sums of a block must not be rounded to float32."""
    logits = some_logits(4 * 128, spread=1.0)
    logits[120:128] = -torch.inf
    edges = torch.exp(logits - logits.max()).double().cumsum(0)  # as draw sees the weights: exp in float32
    edges = edges / edges[-1]
    below, above = edges[[119, 255, 383]] - 1e-10, edges[[119, 255, 383]] + 1e-10
    assert draw_one(logits, below)[0].tolist() == [119, 255, 383]
    assert draw_one(logits, above)[0].tolist() == [128, 256, 384]


def test_draw_survives_extreme_logits():
    uniform = torch.tensor([0.0, 0.3, 0.999], dtype=F64)
    for logits in (torch.tensor([-3e38, 3e38, -3e38]), torch.tensor([-torch.inf, 8.0, -torch.inf])):
        token, logprob = draw_one(logits, uniform)
        assert token.tolist() == [1, 1, 1] and logprob.tolist() == [0.0, 0.0, 0.0]
    token, logprob = draw_one(torch.tensor([1e6, 1e6 + 1, -1e6]), torch.tensor([0.1, 0.9], dtype=F64))
    assert token.tolist() == [0, 1]
    torch.testing.assert_close(logprob, torch.tensor([-1.3132617, -0.3132617]))
    rare, logprob = draw_one(torch.tensor([0.0, -80.0]), torch.tensor([1 - 2**-53], dtype=F64))
    assert float(logprob) == (0.0 if int(rare) == 0 else -80.0)


def test_a_row_that_is_no_number_gets_some_token_and_no_log_prob():
    logits = some_logits(300).repeat(2, 1)
    logits[0] = torch.nan  # of a policy that has diverged: the scorer stops the run
    token, logprob = draw(logits, torch.tensor([0.5, 0.5], dtype=F64))
    assert bool(((token >= 0) & (token < 300)).all()) and logprob.isnan().tolist() == [True, False]


# --- the distribution of samples ---


def pair_probabilities(plain, prompt, temperature=1.0):
    """Exact probability of (first token, second token), [V·V]; after an EOS the second counts as EOS."""
    with torch.no_grad():
        first = (plain(torch.tensor([prompt])).logits[0, -1].double() / temperature).softmax(0)
        rows = torch.cat([torch.tensor(prompt).repeat(len(first), 1), torch.arange(len(first))[:, None]], dim=1)
        second = (plain(rows).logits[:, -1].double() / temperature).softmax(1)
    second[EOS] = torch.nn.functional.one_hot(torch.tensor(EOS), len(first)).double()
    return (first[:, None] * second).flatten()


def test_samples_follow_the_model_s_distribution(language_model, plain):
    """χ² of the first two tokens of 20,000 completions a prompt: p > 0.001, where 10 % of temperature gives < 1e-6."""
    contexts = contexts_of(*PROMPTS[:2])
    engine = TransformersEngine(language_model, [EOS], max_new_tokens=3, max_sequences=20_000)
    rollouts = engine.sample(contexts, 20_000, seed=0)
    pairs = torch.full((len(rollouts), 2), EOS)
    starts = rollouts.cu_seqlens[:-1].long()
    pairs[:, 0] = rollouts.token_ids[starts]
    longer = rollouts.lengths > 1
    pairs[longer, 1] = rollouts.token_ids[starts[longer] + 1]
    for i, context in enumerate(contexts):
        exact = pair_probabilities(plain, context.token_ids)
        vocabulary = round(len(exact) ** 0.5)
        cells = pairs[rollouts.context_index == i] @ torch.tensor([vocabulary, 1])
        counts = torch.bincount(cells, minlength=len(exact))
        assert p_value(counts, exact) > 1e-3
        assert p_value(counts, pair_probabilities(plain, context.token_ids, temperature=1.1)) < 1e-6


# --- completions and their bookkeeping ---


def reference_completions(plain, contexts, samples, eos, max_new_tokens, seed):
    """One completion at a time with the model's own forward pass and the same uniforms: (tokens, log-probs)."""
    total = len(contexts) * samples
    uniform = torch.rand(max_new_tokens, total, generator=torch.Generator().manual_seed(seed), dtype=F64)
    for i in range(total):
        prompt, tokens, logprobs = list(contexts[i // samples].token_ids), [], []
        while len(tokens) < max_new_tokens and not (tokens and tokens[-1] in eos):
            with torch.no_grad():
                logprob = plain(torch.tensor([prompt + tokens])).logits[0, -1].double().log_softmax(0)
            token = int(torch.searchsorted(logprob.exp().cumsum(0), uniform[len(tokens), i], right=True))
            tokens.append(token)
            logprobs.append(float(logprob[token]))
        yield tokens, logprobs


def test_every_completion_equals_one_decoded_alone(language_model, plain, monkeypatch):
    """Neighbours, padding and dropping the finished change nothing."""
    dropped = []
    select = Decoding.select
    monkeypatch.setattr(Decoding, "select", lambda self, rows: (dropped.append(len(rows)), select(self, rows)))
    contexts, eos = contexts_of(*PROMPTS), tuple(range(0, 257, 9))
    rollouts = TransformersEngine(language_model, eos, max_new_tokens=12).sample(contexts, 8, seed=5)
    assert len(dropped) >= 4  # prompts were copied to their completions, and the cache was compacted on the way
    expected = list(reference_completions(plain, contexts, 8, eos, 12, seed=5))
    assert split(rollouts, rollouts.token_ids) == [tokens for tokens, _ in expected]
    logprobs = torch.tensor([value for _, values in expected for value in values])
    torch.testing.assert_close(rollouts.behavior_logprob, logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("max_sequences", "calls"), [(4, [4, 4, 2] * 3), (10, [10] * 3), (25, [20, 10]), (256, [30])])
def test_max_sequences_bounds_what_is_decoded_side_by_side(language_model, monkeypatch, max_sequences, calls):
    sizes = []
    start = LanguageModel.start

    def spy(self, prompts, context_index, *rest):
        sizes.append(len(context_index))
        return start(self, prompts, context_index, *rest)

    monkeypatch.setattr(LanguageModel, "start", spy)
    contexts = contexts_of(*PROMPTS)
    engine = TransformersEngine(language_model, [EOS], max_new_tokens=6, max_sequences=max_sequences)
    rollouts = engine.sample(contexts, 10, seed=1)
    assert sizes == calls
    assert rollouts.contexts == tuple(contexts)
    assert rollouts.context_index.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    # each completion is booked to the prompt that it continues: only there it has this log-prob
    ours = language_model.token_logprobs(rollouts, 10_000)
    torch.testing.assert_close(rollouts.behavior_logprob, ours, atol=1e-5, rtol=0)
    texts = [tuple(tokens) for tokens in split(rollouts, rollouts.token_ids)]
    assert len(set(texts)) > 20  # batches of a call do not repeat each other's uniforms


def test_the_same_context_twice_stays_two(language_model):
    """A round that crosses an epoch's end may hold a context twice."""
    context = contexts_of(PROMPTS[0])[0]
    for max_sequences in (2, 3, 256):
        engine = TransformersEngine(language_model, [EOS], max_new_tokens=3, max_sequences=max_sequences)
        rollouts = engine.sample([context, context], 3, seed=0)
        assert rollouts.context_index.tolist() == [0, 0, 0, 1, 1, 1]


def test_completions_end_at_any_eos_or_at_the_limit(language_model):
    eos = {EOS, *range(3, 257, 7)}
    rollouts = TransformersEngine(language_model, eos, max_new_tokens=6).sample(contexts_of(*PROMPTS), 60, seed=3)
    assert rollouts.cu_seqlens.dtype == torch.int32 and int(rollouts.cu_seqlens[0]) == 0
    assert int(rollouts.cu_seqlens[-1]) == rollouts.num_tokens == len(rollouts.behavior_logprob)
    ends_seen, completions = set(), split(rollouts, rollouts.token_ids)
    for tokens, finished in zip(completions, rollouts.finished.tolist(), strict=True):
        assert not eos & set(tokens[:-1])  # once, and last
        assert finished == (tokens[-1] in eos)
        assert len(tokens) == 6 or finished
        ends_seen |= eos & {tokens[-1]}
    assert len(ends_seen) > 5
    at_limit = rollouts.lengths == 6
    assert bool(rollouts.finished[at_limit].any()) and bool((~rollouts.finished[at_limit]).any())


def test_seeds_and_global_generators(language_model):
    engine, contexts = TransformersEngine(language_model, [EOS], max_new_tokens=8), contexts_of(*PROMPTS)
    before = (torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy())
    first, again, other = (engine.sample(contexts, 4, seed).token_ids.tolist() for seed in (7, 7, 8))
    assert first == again and first != other
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert bool((numpy.random.get_state()[1] == before[2]).all())
    torch.manual_seed(123)  # nor does the sample depend on them
    assert engine.sample(contexts, 4, 7).token_ids.tolist() == first


def test_samples_follow_the_weights_and_no_generation_setting(tiny_model):
    model = load_model(str(tiny_model), "float32", "cpu", trust_remote_code=False)
    engine = TransformersEngine(model, [EOS], max_new_tokens=8)
    contexts = contexts_of(*PROMPTS)
    first = engine.sample(contexts, 8, seed=0)
    model.model.generation_config.update(do_sample=True, temperature=0.1, top_k=1, top_p=0.1, repetition_penalty=5.0)
    assert torch.equal(engine.sample(contexts, 8, seed=0).behavior_logprob, first.behavior_logprob)
    with torch.no_grad():
        model.model.get_input_embeddings().weight.mul_(0.5)  # an optimizer's step in place
    engine.sync_weights(model, 1)
    after = engine.sample(contexts, 8, seed=0)
    assert after.token_ids.tolist() != first.token_ids.tolist()
    torch.testing.assert_close(after.behavior_logprob, model.token_logprobs(after, 1000), atol=1e-5, rtol=0)
    assert not after.behavior_logprob.requires_grad
    assert all(parameter.requires_grad for parameter in model.model.parameters())
