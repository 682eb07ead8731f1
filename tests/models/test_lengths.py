"""Texts of any lengths beside one another: either each has the log-probs that it has alone, or they are refused."""

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from fdpg_fast.engines import TransformersEngine
from fdpg_fast.errors import UserError
from fdpg_fast.models.language_model import LanguageModel
from support import runs
from support.language import EOS, GROUPED, build, contexts_of, plain_logprobs, rollouts_of
from support.scored_models import CHOOSING

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0, 5.0, 6.0, 7.0],
    "original_max_position_embeddings": 16,
    "factor": 4.0,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
MODELS = {
    "longrope": lambda: hf.Phi3Config(**GROUPED, rope_parameters=LONGROPE, original_max_position_embeddings=16),
    "dynamic": lambda: hf.LlamaConfig(**{**GROUPED, "max_position_embeddings": 16}, rope_parameters=DYNAMIC),
    "none": lambda: hf.LlamaConfig(**GROUPED),
    "none: window": lambda: hf.MistralConfig(**GROUPED, sliding_window=5),
    "none: window in some layers": lambda: hf.Gemma3TextConfig(
        **GROUPED, head_dim=8, sliding_window=9, sliding_window_pattern=2
    ),
}


@pytest.fixture(scope="module")
def models():
    """Each plain, and behind the scoring path; the changing state of one must not be the other's."""
    return {name: (build(config()), LanguageModel(build(config()))) for name, config in MODELS.items()}


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.tuples(st.integers(1, 24), st.integers(1, 8)), min_size=1, max_size=4))
def test_neighbours_change_nothing_or_are_refused(name, lengths, models):
    plain, language_model = models[name]
    contexts = contexts_of(*(prompt for prompt, _ in lengths))
    rollouts = rollouts_of(contexts, [[[7 + i for i in range(completion)]] for _, completion in lengths])
    longest, shortest = max(map(sum, lengths)), min(prompt for prompt, _ in lengths)
    could_reach = max(prompt for prompt, _ in lengths) + max(completion for _, completion in lengths)
    with torch.no_grad():
        try:
            ours = language_model.token_logprobs(rollouts, 10**6)
        except UserError as refusal:
            assert "lower engine.max_new_tokens" in str(refusal)
            assert could_reach > 16 and not name.startswith("none")
            assert shortest <= 16 or name != "longrope"
        else:
            assert longest <= 16 or name.startswith("none") or (name == "longrope" and shortest > 16)
            torch.testing.assert_close(ours, plain_logprobs(plain, rollouts), atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", CHOOSING)
def test_layers_that_choose_tokens_are_right_while_they_may_choose_all(name):
    language_model = LanguageModel(build(CHOOSING[name]()))
    fits, reaches_past = (rollouts_of(contexts_of(10), [[list(range(length))]]) for length in (6, 7))
    with torch.no_grad():
        ours, plain = language_model.token_logprobs(fits, 10**6), plain_logprobs(build(CHOOSING[name]()), fits)
        torch.testing.assert_close(ours, plain, atol=2e-5, rtol=0)
        with pytest.raises(UserError, match="reach 17 tokens, past the 16 up to which all layers see all"):
            language_model.token_logprobs(reaches_past, 10**6)


@pytest.mark.parametrize(("prompts", "is_allowed"), [((9, 8), True), ((9, 10), False), ((17, 30), True)])
def test_samples_of_longrope_stay_on_one_side(prompts, is_allowed, models):
    plain, language_model = models["longrope"]
    engine = TransformersEngine(language_model, [EOS], max_new_tokens=7)
    if not is_allowed:
        with pytest.raises(UserError, match=r"\(longrope\) is another one past 16 tokens.* of 9 tokens up.* of 17"):
            engine.sample(contexts_of(*prompts), 3, seed=0)
        return
    rollouts = engine.sample(contexts_of(*prompts), 3, seed=0)
    with torch.no_grad():
        torch.testing.assert_close(rollouts.behavior_logprob, plain_logprobs(plain, rollouts), atol=2e-5, rtol=0)


LONGROPE_20 = {"original_max_position_embeddings": 20, "rope_parameters": LONGROPE}
AT_20 = {
    "choice": (
        lambda sizes: hf.DogeConfig(**sizes, keep_window_size=20),
        "reach 21 tokens, past the 20 up to which all layers see all",
    ),
    "longrope": (
        lambda sizes: hf.Phi3Config(**sizes, **LONGROPE_20),
        "rotary scaling (longrope) is another one past 20",
    ),
}


@pytest.mark.parametrize("command", [["train"], ["train", "--dry-run"], ["doctor"]])
@pytest.mark.parametrize("name", AT_20)
@pytest.mark.parametrize("place", ["train", "eval"])
def test_what_the_data_can_reach_is_refused_at_the_start(
    command, name, place, tmp_path, tiny_model, monkeypatch, capsys
):
    monkeypatch.setattr("fdpg_fast.doctor.probe_vllm", lambda: ({"device": "cpu", "sleeps": False}, None))
    config, complaint = AT_20[name]
    hf.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "m")
    build(config({**GROUPED, "vocab_size": 257})).save_pretrained(tmp_path / "m")
    (tmp_path / "short.txt").write_text("a\nof 14 letters.\n")  # 14 and 6 tokens are 20
    (tmp_path / "long.txt").write_text("a\nof 15 letters..\n")
    contexts = {"train": str(tmp_path / "short.txt"), "eval": str(tmp_path / "short.txt")}
    path = runs.write_config(tmp_path, runs.settings(tmp_path / "m", tmp_path / "run", contexts=contexts))
    assert runs.call("train", path, "--dry-run") == 0
    assert runs.call(command[0], path, *command[1:], f"--contexts.{place}={tmp_path / 'long.txt'}") == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
