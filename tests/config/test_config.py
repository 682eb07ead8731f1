"""The config: its keys are a promise to users, so they are written down once more here."""

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fdpg_fast import TrainConfig
from fdpg_fast.config.load import config_keys, dump_config, load_config, parse_config
from fdpg_fast.errors import UserError
from support import runs

FEATURE = (
    "name",
    "timeout",
    "kind",
    "word",
    "pattern",
    "min_entities",
    "model",
    "label",
    "batch_size",
    "url",
    "token_env",
    "concurrency",
    "attempts",
    "request_timeout",
    "template",
    "verdict",
    "no_verdict",
    "request",
    "read",
    "column",
    "definition",
    "score",
    "partial",
    "path",
)

PUZZLES = ("dataset", "size", "eval_size", "seed", "options", "template", "chat")

# adding a key is free; renaming or removing one breaks the configs that people have
KEYS = [
    "model",
    "base.model",
    "base.refresh_every",
    "divergence",
    "run_dir",
    "target",
    "target.N.kind",
    "target.N.feature",
    *(f"target.N.feature.{name}" for name in FEATURE),
    "target.N.beta",
    "target.N.features",
    *(f"target.N.features.N.{name}" for name in FEATURE),
    "target.N.moments",
    "target.N.kappa",
    "target.N.path",
    "target_fit_samples",
    "keep_special_tokens",
    "dtype",
    "device",
    "trust_remote_code",
    "contexts.train",
    "contexts.eval",
    "contexts.system_prompt",
    "contexts.chat_template_kwargs",
    "contexts.tools",
    *(f"contexts.reasoning_gym.{key}" for key in PUZZLES),
    "engine.kind",
    "engine.max_new_tokens",
    "engine.max_sequences",
    "engine.tensor_parallel",
    "engine.urls",
    "engine.weight_transfer",
    "engine.weights_dir",
    "engine.request_timeout",
    "engine.gap_warning",
    "engine.gap_limit",
    "partition.kind",
    "partition.per_context",
    "loss.baseline",
    "loss.ratio",
    "loss.ratio_cap",
    "loss.ratio_drop",
    "loss.reward_cap",
    "optimizer.kind",
    "optimizer.learning_rate",
    "optimizer.schedule",
    "optimizer.warmup_rounds",
    "optimizer.weight_decay",
    "optimizer.max_grad_norm",
    "proposal.kind",
    "proposal.every",
    "lora.rank",
    "lora.alpha",
    "lora.target_modules",
    "trainer.rounds",
    "trainer.seed",
    "trainer.contexts_per_round",
    "trainer.samples_per_context",
    "trainer.updates_per_round",
    "trainer.pipeline_depth",
    "trainer.micro_batch_tokens",
    "trainer.activation_checkpointing",
    "trainer.reshard_after_forward",
    "trainer.checkpoint_every",
    "evaluation.every",
    "evaluation.contexts",
    "evaluation.samples_per_context",
    "evaluation.base_samples",
    "checkpoint.best",
    "checkpoint.keep_best",
    "early_stop.metric",
    "early_stop.patience",
    "tracking",
]

WORD = {"kind": "pointwise", "feature": {"kind": "word", "word": "tea"}}
SMALLEST = {"model": "some/model", "run_dir": "runs/one", "target": [WORD]}
EVERYTHING = {
    **SMALLEST,
    "divergence": "alpha:0.25",
    "base": {"model": "a/teacher", "refresh_every": 3},
    "target": [
        {"kind": "pointwise", "feature": {"kind": "regex", "pattern": "^\\s*é", "name": "accent", "timeout": 2.5}},
        {"kind": "pointwise", "feature": {"kind": "python_parses"}},
        {"kind": "pointwise", "feature": {"kind": "pep8"}},
        {"kind": "pointwise", "feature": {"kind": "entities", "min_entities": 2}},
        {"kind": "rlhf", "beta": 0.1, "feature": {"kind": "import", "path": "rewards.py:helpful"}},
        {
            "kind": "distributional",
            "features": [{"kind": "classifier", "model": "c", "label": "joy", "batch_size": 4}],
            "moments": [0.5],
        },
        {"kind": "base_power", "kappa": 0.5},
        {"kind": "import", "path": "package.module:target"},
    ],
    "contexts": {"train": "prompts.jsonl", "eval": None},
    "optimizer": {"learning_rate": 3e-4, "schedule": "cosine"},
    "loss": {"ratio_cap": 5, "reward_cap": None},
    "tracking": ["tensorboard", "wandb"],
}


def test_keys_are_frozen():
    assert list(config_keys()) == KEYS


def test_every_key_is_documented_in_one_line():
    for key, text in config_keys().items():
        assert len(text.strip()) > 5 and "\n" not in text, key


@pytest.mark.parametrize("data", [SMALLEST, EVERYTHING], ids=["smallest", "everything"])
def test_dumped_config_reads_back_as_itself(data, tmp_path):
    config = parse_config(data)
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config


@given(text=st.text() | st.text("\x85\u2028\u2029\ufeff \n\r\t'\"é:#-", max_size=9), other=st.text())
@example(text="a\u2028b", other="\x85")
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_reads_back_as_itself(text, other, tmp_path):
    config = parse_config({**SMALLEST, "contexts": {"system_prompt": text, "chat_template_kwargs": {other: [text]}}})
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config
    assert "é" in dump_config(parse_config({**SMALLEST, "model": "é"}))  # as a person wrote it


def test_config_is_frozen():
    config = parse_config(SMALLEST)
    for section, name in [(config, "model"), (config.trainer, "rounds"), (config.target[0], "kind")]:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, "other")


def test_defaults_of_one_config_are_not_shared_with_another():
    parse_config(SMALLEST).tracking.append("wandb")
    assert parse_config(SMALLEST).tracking == []


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("model", "other/model", "other/model"),
        ("trainer.rounds", "20", 20),
        ("optimizer.learning_rate", "1e-3", 1e-3),  # YAML 1.1 takes this for a string
        ("optimizer.learning_rate", "2.5E-05", 2.5e-5),
        ("partition.per_context", "false", False),
        ("trust_remote_code", "true", True),
        ("loss.ratio_cap", "4", 4.0),
        ("loss.ratio_cap", "null", None),
        ("contexts.train", "data/p.jsonl", "data/p.jsonl"),
        ("tracking", "[tensorboard]", ["tensorboard"]),
        ("target.0.feature.word", "coffee", "coffee"),
        ("target.0.feature.word", "null", "null"),  # that there is none is said of keys alone that may have none
        ("target.0.feature.name", "null", None),
    ],
)
def test_override_sets_one_key(key, text, expected, tmp_path):
    config = overridden(tmp_path, {**SMALLEST, "loss": {"ratio_cap": 2.0}}, {key: text})
    value = config.model_dump()
    for part in key.split("."):
        value = value[int(part) if part.isdigit() else part]
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize("text", ["2024", "yes", "2024-01-31", "[a-z]", "a: b", "1e3"])
def test_text_stays_the_text_that_was_typed(text, tmp_path):
    """Of a key that holds text: a folder is called 2024 and a pattern [a-z], whatever YAML takes them for."""
    config = overridden(tmp_path, SMALLEST, {"run_dir": text, "target.0.feature.word": text})
    assert (config.run_dir, config.target[0].feature.word) == (text, text)


def test_override_replaces_a_whole_list_item(tmp_path):
    item = "{kind: rlhf, beta: 2, feature: {kind: word, word: milk}}"
    config = overridden(tmp_path, {**SMALLEST, "target": [WORD, WORD]}, {"target.1": item})
    assert [term.kind for term in config.target] == ["pointwise", "rlhf"]
    assert config.target[1].beta == 2.0 and config.target[0] == parse_config(SMALLEST).target[0]


@pytest.mark.parametrize(
    ("key", "complaint"),
    [
        ("target.3.kind", "'3' must be a number below 1"),
        ("target.first.kind", "'first' must be a number below 1"),
        ("model.name", "'model' holds a plain value"),
        ("model.name.first", "'name' is inside a plain value"),
    ],
)
def test_override_of_a_place_that_is_not_there(key, complaint, tmp_path):
    with pytest.raises(UserError, match=f"^--{key}: {complaint}"):
        overridden(tmp_path, SMALLEST, {key: "1"})


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("modle", "model"),
        ("trainer.round", "trainer.rounds"),
        ("trainer.seeds", "trainer.seed"),
        ("learning_rate", "optimizer.learning_rate"),
        ("rounds", "trainer.rounds"),
        ("seed", "trainer.seed"),
        ("engine.max_tokens", "engine.max_new_tokens"),
        ("contexts.training", "contexts.train"),
        ("evaluation.samples_per_contexts", "evaluation.samples_per_context"),
    ],
)
def test_unknown_key_is_answered_with_the_nearest(key, suggestion, tmp_path):
    with pytest.raises(UserError) as caught:
        overridden(tmp_path, SMALLEST, {key: "1"})
    assert str(caught.value) == f"{key}: there is no such key; did you mean {suggestion}?"


def test_unknown_key_like_no_other_gets_no_suggestion():
    with pytest.raises(UserError) as caught:
        parse_config({**SMALLEST, "zzzz": 1})
    assert str(caught.value) == "zzzz: there is no such key"


def test_dry_run_shows_the_config_and_what_would_be_done(tiny_model, tmp_path, capsys):
    path = runs.write_config(tmp_path, runs.settings(tiny_model, tmp_path / "run"))
    before = sorted(tmp_path.rglob("*"))
    assert runs.call("train", path, "--dry-run", "--trainer.rounds=7", "--target.0.feature.name=any letter") == 0
    config, plan = capsys.readouterr().out.split("\n\n")
    resolved = load_config(path, {"trainer.rounds": "7", "target.0.feature.name": "any letter"})
    assert parse_config(yaml.safe_load(config)) == resolved
    for part in (
        "7 rounds of 1 contexts × 4 samples",
        "at most 6 tokens",
        "any letter",
        "0.0 M",
        str(resolved.run_dir),
    ):
        assert part in plan
    assert sorted(tmp_path.rglob("*")) == before


def test_overrides_may_stand_before_the_file_and_without_an_equals_sign(tiny_model, tmp_path, capsys):
    path = runs.write_config(tmp_path, runs.settings(tiny_model, tmp_path / "run"))
    assert runs.call("train", "--trainer.rounds", "7", path, "--trainer.seed", "3", "--dry-run") == 0
    config = parse_config(yaml.safe_load(capsys.readouterr().out.split("\n\n")[0]))
    assert (config.trainer.rounds, config.trainer.seed) == (7, 3)


def test_keys_are_listed_with_their_documentation(capsys):
    assert runs.call("train", "--keys") == 0
    assert capsys.readouterr().out == "".join(f"{key}\n    {text}\n" for key, text in config_keys().items())


def overridden(folder, data: dict, overrides: dict[str, str]) -> TrainConfig:
    path = folder / "given.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return load_config(path, overrides)


def test_a_z_of_one_sample_is_refused(tmp_path):
    config = {"model": "m", "run_dir": "r", "target": [{"kind": "import", "path": "a.py:b"}]}
    config |= {"loss": {"baseline": "none"}, "trainer": {"samples_per_context": 1}}
    for partition in ({"kind": "batch", "per_context": False}, {"kind": "running"}, {"kind": "oracle"}):
        TrainConfig.model_validate(config | {"partition": partition})
    with pytest.raises(ValueError, match="batch needs trainer.samples_per_context ≥ 2.*per_context: false"):
        TrainConfig.model_validate(config | {"partition": {"kind": "batch"}})
