"""The real vLLM in this process, on the CPU: exact log-probs, weights that arrive whole, seeds, ends, failures."""

import builtins
import contextlib
import math
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from unittest import mock

import numpy
import pytest
import torch

from fdpg_fast.engines import vllm_patches
from fdpg_fast.engines.vllm import VLLMEngine, _make_llm
from fdpg_fast.errors import RunError, UserError
from fdpg_fast.models.load import load_model
from fdpg_fast.seeds import own_generators
from support.vllm_cases import CONFIG_EOS, CONTEXTS, EOS, TOLERANCE, VOCABULARY, gap, perturb, save_model, vllm_engine

MAX_NEW_TOKENS = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {tied: save_model(root / f"tied-{tied}", tied=tied) for tied in (True, False)}


def make_engine(folder, *, dtype="float32", max_length=256, policy=None, beside_learner=False):
    policy = policy or load_model(str(folder), dtype, "cpu", trust_remote_code=False)
    engine = vllm_engine(
        policy, folder, max_new_tokens=MAX_NEW_TOKENS, max_length=max_length, beside_learner=beside_learner
    )
    return policy, engine


@pytest.fixture(scope="module")
def running(folders):
    """Engine and policy by name; started once, and what one test changes the next one syncs."""
    made = {}

    def get(name):
        if name not in made:
            settings = {
                "tied": dict(),
                "untied": dict(),
                "ahead": dict(beside_learner=True),
                "bfloat16": dict(dtype="bfloat16"),
            }
            made[name] = make_engine(folders[name != "untied"], **settings[name])
        return made[name]

    yield get
    for _, engine in made.values():
        engine.close()


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_log_probs_are_the_learners_after_every_sync_and_only_then(running, name):
    policy, engine = running(name)
    engine.sync_weights(policy, 0)
    assert gap(policy, engine.sample(CONTEXTS, 8, seed=1)).max() < TOLERANCE
    for version in (1, 2):
        perturb(policy, version)
        stale = gap(policy, engine.sample(CONTEXTS, 8, seed=1))
        assert stale.max() > 0.1 and stale.mean() > 0.01
        engine.sync_weights(policy, version)
        assert engine.version == version
        assert gap(policy, engine.sample(CONTEXTS, 8, seed=1)).max() < TOLERANCE


@pytest.mark.parametrize("part", ["embed_tokens", "q_proj", "v_proj", "up_proj", "down_proj", "norm"])
def test_each_kind_of_weight_arrives(running, part):
    policy, engine = running("tied")
    engine.sync_weights(policy, 2)
    changed = [parameter for name, parameter in policy.model.named_parameters() if part in name]
    with torch.no_grad():
        torch._foreach_mul_(changed, 1.3)
        assert gap(policy, engine.sample(CONTEXTS, 4, seed=1)).max() > 0.01
        engine.sync_weights(policy, 3)
        assert gap(policy, engine.sample(CONTEXTS, 4, seed=1)).max() < TOLERANCE
        torch._foreach_div_(changed, 1.3)


def test_bfloat16_agrees_as_well_as_bfloat16_can(running):
    policy, engine = running("bfloat16")
    engine.sync_weights(policy, 0)
    agreeing = gap(policy, engine.sample(CONTEXTS, 16, seed=1))
    perturb(policy, 1)
    stale = gap(policy, engine.sample(CONTEXTS, 16, seed=1))
    engine.sync_weights(policy, 1)
    again = gap(policy, engine.sample(CONTEXTS, 16, seed=1))
    assert agreeing.mean() < 0.1 and again.mean() < 0.1 < stale.mean()


def test_what_nobody_reads_of_log_probs_is_left_out_here_and_still_there_elsewhere(running):
    from torch._dynamo.utils import counters
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.sample import sampler

    kept = LogprobsProcessor._update_sample_logprobs, sampler.batched_count_greater_than
    counters.clear()
    policy, engine = running("tied")
    engine.sync_weights(policy, 0)
    engine.sample(CONTEXTS, 8, seed=1)
    assert not counters["stats"]  # the count of ranks alone takes 20 s to compile
    assert (LogprobsProcessor._update_sample_logprobs, sampler.batched_count_greater_than) == kept


@pytest.mark.parametrize(
    ("module", "name", "shown"),
    [
        ("vllm.v1.sample.sampler", "batched_count_greater_than", "batched_count_greater_than"),
        ("vllm.v1.engine.logprobs", "LogprobsProcessor", "LogprobsProcessor._update_sample_logprobs"),
    ],
)
def test_a_patch_whose_name_is_gone_says_so_once_and_is_done_without(module, name, shown, monkeypatch, caplog):
    monkeypatch.setattr(vllm_patches, "_said", set())
    monkeypatch.delattr(f"{module}.{name}")
    for _ in range(2):
        with vllm_patches.sampled_logprobs_only():
            pass
    said = [record.getMessage() for record in caplog.records if record.name == vllm_patches.__name__]
    assert said == [f"this vLLM has no {module}.{shown}: it goes on without the patch"]


def test_an_engine_without_its_patches_samples_the_same(running, monkeypatch):
    policy, engine = running("tied")
    engine.sync_weights(policy, 0)
    expected = engine.sample(CONTEXTS, 8, seed=1)
    for patch in ("without_ranks", "without_lists"):  # as where their names are gone
        monkeypatch.setattr(vllm_patches, patch, contextlib.nullcontext)
    plain = engine.sample(CONTEXTS, 8, seed=1)
    assert torch.equal(plain.token_ids, expected.token_ids)
    assert torch.equal(plain.behavior_logprob, expected.behavior_logprob)


def test_completions_end_as_they_say(running):
    policy, engine = running("untied")
    engine.sync_weights(policy, 0)
    rollouts = engine.sample(CONTEXTS, 32, seed=2)
    ends = rollouts.cu_seqlens.tolist()
    lengths = []
    for first, last, finished in zip(ends, ends[1:], rollouts.finished.tolist(), strict=False):
        tokens = rollouts.token_ids[first:last].tolist()
        assert sum(token in EOS for token in tokens) == finished == (tokens[-1] in EOS)
        assert finished or len(tokens) == MAX_NEW_TOKENS
        lengths.append(len(tokens))
    assert {1, MAX_NEW_TOKENS} <= set(lengths)  # an EOS at once, and a completion that was cut
    assert CONFIG_EOS in rollouts.token_ids.tolist()  # the config's own EOS is a token like any other
    assert rollouts.context_index.tolist() == [i for i in range(4) for _ in range(32)]


def test_first_tokens_follow_the_policy(running):
    policy, engine = running("untied")
    engine.sync_weights(policy, 0)
    rollouts = engine.sample(CONTEXTS[1:2], 2000, seed=3)
    with torch.no_grad():
        probability = policy.model(torch.tensor([CONTEXTS[1].token_ids])).logits[0, -1].double().softmax(0)
    counts = torch.bincount(rollouts.token_ids[rollouts.cu_seqlens[:-1].long()], minlength=VOCABULARY).double()
    expected = 2000 * probability
    rare = expected < 5
    cells, wanted = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected))
    statistic = ((cells - wanted) ** 2 / wanted).sum()
    assert float(torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2).double(), statistic / 2)) > 1e-3


@pytest.mark.parametrize("name", ["untied", "ahead"])
def test_equal_seeds_give_equal_samples_and_nothing_else_does(running, name):
    policy, engine = running(name)
    engine.sync_weights(policy, 0)
    first, other, again = (engine.sample(CONTEXTS, 4, seed=seed) for seed in (5, 6, 5))
    assert torch.equal(first.token_ids, again.token_ids)
    assert torch.equal(first.behavior_logprob, again.behavior_logprob)
    assert first.token_ids.tolist() != other.token_ids.tolist()
    texts = [tuple(ids) for ids in first.completion_ids()]
    assert texts[4:8] != texts[8:12]  # two contexts of one prompt
    assert max(Counter(texts).values()) < 4  # nor are the samples of one context copies


def test_rounds_ahead_are_the_same_whatever_features_draw_meanwhile(running):
    policy, engine = running("ahead")
    engine.sync_weights(policy, 0)
    expected = engine.sample(CONTEXTS, 16, seed=5)
    done = threading.Event()

    def feature():
        while not done.is_set():
            torch.manual_seed(0)

    with ThreadPoolExecutor(1) as beside:
        beside.submit(feature)
        try:
            found = engine.sample(CONTEXTS, 16, seed=5)
        finally:
            done.set()
    assert torch.equal(found.token_ids, expected.token_ids)


def test_rounds_ahead_draw_nothing_from_the_global_generators(running):
    """Not even what is thrown away: features that draw meanwhile would get other numbers in each run."""
    policy, engine = running("ahead")
    engine.sync_weights(policy, 0)
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    engine.sample(CONTEXTS, 16, seed=5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == before[1:]


def test_whichever_generator_vllm_draws_from_starts_from_the_seed():
    def draws(seed):
        with own_generators(torch.device("cpu"), seed):
            return torch.rand(4).tolist(), numpy.random.randint(2**62), random.random()

    first, other, again = (draws(seed) for seed in (5, 2**62 - 6, 5))
    assert first == again and all(ours != theirs for ours, theirs in zip(first, other, strict=True))


def test_stale_weights_are_not_sampled_from(running):
    policy, engine = running("untied")
    engine.sync_weights(policy, 5)
    engine._llm.update_weight_version("4")
    with pytest.raises(RunError, match="weights of version {'4'}, not 5"):
        engine._generate(CONTEXTS, 1, 0, range(len(CONTEXTS)))
    engine.sync_weights(policy, 5)


# engines of their own: closing one ends the others of this process


def test_the_global_generators_are_left_alone(folders):
    def states():
        return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    policy = load_model(str(folders[True]), "float32", "cpu", trust_remote_code=False)
    random.seed(1), numpy.random.seed(2), torch.manual_seed(3)
    before = states()
    _, engine = make_engine(folders[True], policy=policy)
    engine.sync_weights(policy, 0)
    engine.sample(CONTEXTS, 2, seed=1)
    engine.close()
    assert states() == before


def test_an_engine_of_a_vllm_without_the_patched_names_samples_right(folders, monkeypatch, caplog):
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.sample import sampler

    monkeypatch.setattr(vllm_patches, "_said", set())
    update = LogprobsProcessor._update_sample_logprobs
    monkeypatch.delattr(LogprobsProcessor, "_update_sample_logprobs")
    monkeypatch.delattr(sampler, "batched_count_greater_than")
    # vLLM itself goes on to find both, in places where the patches do not look
    monkeypatch.setattr(LogprobsProcessor, "__getattr__", lambda self, _: partial(update, self), raising=False)
    monkeypatch.setattr(builtins, "batched_count_greater_than", lambda x, y: (x >= y).sum(-1), raising=False)
    policy, engine = make_engine(folders[True])
    for version in (0, 1):
        perturb(policy, version)
        engine.sync_weights(policy, version)
        assert gap(policy, engine.sample(CONTEXTS, 8, seed=1)).max() < TOLERANCE
    engine.close()
    said = [record.getMessage() for record in caplog.records if record.name == vllm_patches.__name__]
    assert len(said) == 2 and "batched_count_greater_than" in said[0] and "_update_sample_logprobs" in said[1]


def test_an_engine_that_fails_is_started_again(folders, monkeypatch, caplog):
    policy, engine = make_engine(folders[True])
    perturb(policy, 1)
    engine.sync_weights(policy, 4)
    expected = engine.sample(CONTEXTS, 4, seed=1)

    runner = engine._llm.llm_engine.model_executor.driver_worker.worker.model_runner
    monkeypatch.setattr(runner, "execute_model", lambda *_, **__: 1 / 0)
    again = engine.sample(CONTEXTS, 4, seed=1)
    assert torch.equal(again.token_ids, expected.token_ids) and engine.version == 4
    (said,) = (record.getMessage() for record in caplog.records if record.name.startswith("fdpg_fast"))
    assert "division by zero" in said and "starting it again" in said

    monkeypatch.setattr(VLLMEngine, "_generate", lambda *_: math.sqrt(-1))
    with pytest.raises(RunError, match="failed a second time: math domain error; continue with --resume"):
        engine.sample(CONTEXTS, 4, seed=1)
    engine.close()  # twice is once


def test_nothing_is_sampled_before_the_first_sync(folders):
    _, engine = make_engine(folders[True])
    with pytest.raises(RunError, match="without the weights that a sync brings"):
        engine.sample(CONTEXTS, 1, 0)
    engine.close()


def test_another_gpu_than_the_first_is_refused_with_what_to_do():
    with pytest.raises(UserError, match="first GPU, not cuda:1; set CUDA_VISIBLE_DEVICES=1 and device: cuda"):
        _make_llm({}, torch.device("cuda:1"))


def test_a_model_that_vllm_cannot_run(folders):
    with pytest.raises(UserError, match=r"engine.kind: vLLM cannot run .*max_model_len \(4000\) is greater"):
        make_engine(folders[True], max_length=4000)


@pytest.mark.parametrize("error", [KeyError("rope_type"), TypeError("\x1b[2J\nodd"), OSError("no such file")])
def test_whatever_vllm_raises_at_the_start_is_one_line(error, monkeypatch):
    import vllm

    monkeypatch.setattr(vllm, "LLM", mock.Mock(side_effect=error))
    with pytest.raises(UserError, match="engine.kind: vLLM cannot run 'm': ") as caught:
        _make_llm({"model": "m"}, torch.device("cpu"))
    assert str(caught.value).isprintable()
