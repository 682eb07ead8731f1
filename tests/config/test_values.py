"""Values of a config: as they were written, or refused in one line; none is without effect."""

import contextlib
import copy
import math
import os
import re

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fdpg_fast.config.load import config_keys, load_config, parse_config, set_key
from fdpg_fast.errors import UserError

WORD = {"kind": "pointwise", "feature": {"kind": "word", "word": "tea"}}
SMALLEST = {"model": "some/model", "run_dir": "runs/one", "target": [WORD]}
SERVED = {"kind": "vllm_server", "urls": ["http://localhost:8000"], "weight_transfer": "disk", "weights_dir": "w"}

NUMBERS = st.integers() | st.floats() | st.sampled_from([2**32, 10**12, 1e10, -1, 0, 1, 2, 3])
ODD_TEXTS = ["policy", "adaptive", "disk", "oracle", "sequence", "none", "null", "cpu", "~/x", "~nobody/x", "a\0b", "("]
ODD_TEXTS += [
    "alpha:nan",
    "alpha:0.5..x",
    "a/" + "b" * 256,
    "http://h:8000",
    "http://h:abc",
    "",
    "\ud800",
    "2024-13-45",
]
TEXTS = st.text() | st.sampled_from(ODD_TEXTS)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS | st.dates() | st.binary(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(TEXTS, values, max_size=3),
    max_leaves=4,
)
YES, NO = ("true", "1", "1.0", "on", "y", "yes", "t"), ("false", "0", "0.0", "off", "n", "no", "f")


def get(config, key):
    value = config.model_dump()
    for part in key.split("."):
        value = value[int(part) if part.isdecimal() else part]
    return value


def changed(data, values):
    data = yaml.safe_load(yaml.safe_dump(data))
    for key, value in values.items():
        set_key(data, key, copy.deepcopy(value))
    return data


def overridden(folder, data, overrides):
    path = folder / "given.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return load_config(path, overrides)


def same(value, read):
    """Whether what was read is what was written: a number maybe as text, a path with ~, a switch as a word."""
    if isinstance(value, dict) and isinstance(read, dict):
        return all(key in read and same(value[key], read[key]) for key in value)
    if isinstance(value, list) and isinstance(read, list):
        return len(value) == len(read) and all(map(same, value, read))
    if isinstance(value, bool) and read in ("on", "off"):
        return value is (read == "on")
    if isinstance(read, bool) or isinstance(value, bool):
        return value is read or (isinstance(read, bool) and str(value).lower() in (YES if read else NO))
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        return math.isclose(float(value), float(read)) or math.isnan(float(value)) and math.isnan(float(read))
    if isinstance(value, bytes) and isinstance(read, str):
        value = value.decode()  # YAML's !!binary
    return value == read or (isinstance(value, str) and os.path.expanduser(value) == read)


@pytest.mark.parametrize("key", [key for key in config_keys() if ".N" not in key] + ["target.0.feature.word"])
@given(value=VALUES)
@settings(max_examples=25, deadline=None)
@example(value=True)
@example(value=[True])
@example(value="\ud800")
def test_a_value_is_what_was_written_or_refused_in_one_line(key, value):
    try:
        config = parse_config(changed(SMALLEST | {"lora": {"rank": 4}}, {key: value}))
    except UserError as refusal:
        assert str(refusal).isprintable() and len(str(refusal)) <= 600
    else:
        assert value is None or same(value, get(config, key))


YAML_TEXTS = ["2024-13-45", "!!int x", "!!timestamp x", 5000 * "1", 3000 * "[", "{a: 1, a: 2}", "0x" + 5000 * "f"]


@pytest.mark.parametrize("key", ["trainer.rounds", "target.0.feature.word", "target.0.feature", "contexts.tools", "²"])
@given(text=st.text() | st.sampled_from(YAML_TEXTS))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_of_an_override_is_taken_or_refused_in_one_line(key, text, tmp_path):
    with contextlib.suppress(UserError):
        assert overridden(tmp_path, SMALLEST, {key: text})
    with contextlib.suppress(UserError):
        assert overridden(tmp_path, SMALLEST, {f"target.{text}.kind": "word"})


@pytest.mark.parametrize("place", ["²", "9" * 5000, "1", "-1", ""])
def test_a_place_that_a_list_does_not_have(place, tmp_path):
    with pytest.raises(UserError, match="must be a number below 1, the length of the list"):
        overridden(tmp_path, SMALLEST, {f"target.{place}.kind": "word"})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("trainer: {seed: 1, rounds: 2, seed: 3}", "the key seed is there twice .*line 1, column 31"),
        ("model: a\nrun_dir: b\nmodel: c", "the key model is there twice .*line 3"),
        ("target: [{kind: a, kind: b}]", "the key kind is there twice"),
        ("seed: 2024-13-45", "is not YAML: month must be in"),
        ("seed: !!int x", "is not YAML: invalid literal"),
        ("seed: !!timestamp x", "is not YAML: "),
        ("seed: " + 5000 * "1", "is not YAML: .*digits"),
        ("seed: " + 3000 * "[", "is not YAML: .*recursion"),
        ("? {a: b}\n: c", "is not YAML: .*unhashable"),
        ("a: 1\n---\na: 2", "is not YAML: .*another document"),
        ("a: !!python/object/apply:os.system [ls]", "is not YAML: .*could not determine a constructor"),
        (
            "model: m\nrun_dir: r\ntarget: [{kind: import, path: a:b}]\ntrainer: {seed: 0x" + 5000 * "f" + "}",
            "^trainer",
        ),
    ],
)
def test_what_yaml_would_take_otherwise_than_it_reads_is_refused(text, complaint, tmp_path):
    (tmp_path / "given.yaml").write_text(text)
    with pytest.raises(UserError, match=complaint) as refusal:
        load_config(tmp_path / "given.yaml")
    assert str(refusal.value).isprintable()


def test_merged_keys_may_be_written_over(tmp_path):
    (tmp_path / "given.yaml").write_text(
        "model: m\nrun_dir: r\ntarget: [&t {kind: rlhf, beta: 1, feature: &f {kind: word, word: a}}, "
        "{<<: *t, beta: 2, feature: {<<: *f, word: b}}]\n"
    )
    first, second = load_config(tmp_path / "given.yaml").target
    assert (first.beta, first.feature.word, second.beta, second.feature.word) == (1, "a", 2, "b")


IMPORTS = {
    "target.0.feature.path": {"kind": "pointwise", "feature": {"kind": "import", "path": "a:b"}},
    "target.1.path": {"kind": "import", "path": "a:b"},
    "target.2.feature.model": {"kind": "pointwise", "feature": {"kind": "classifier", "model": "m", "label": "l"}},
}
PATHS = ["model", "run_dir", "contexts.train", "contexts.eval", "engine.weights_dir", *IMPORTS]


@pytest.mark.parametrize("key", PATHS)
def test_every_path_may_begin_with_the_home_folder(key, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    data = {**SMALLEST, "engine": SERVED, "target": [*IMPORTS.values()]}
    for text, expected in {"~/x:y": "/home/somebody/x:y", "x/~y": "x/~y", "./~": "./~"}.items():
        assert get(overridden(tmp_path, data, {key: text}), key) == expected
    for text in ("~nobody-of-this-name/x", "a\0b", "a\nb", "a\x1b[31m", 256 * "x", "a/" + 128 * "é" + "/b", ""):
        with pytest.raises(UserError, match="no file can have this name") as refusal:
            parse_config(changed(data, {key: text}))
        assert str(refusal.value).startswith(f"{key}: ")
    for text in ("$HOME/x", "${SCRATCH}/x", "runs/${oc.env:USER}"):
        with pytest.raises(UserError, match=rf"^{re.escape(key)}: .*variables are not put in here"):
            parse_config(changed(data, {key: text}))
    assert get(parse_config(changed(data, {key: "x/a$b"})), key) == "x/a$b"


def test_a_divergence_of_a_file_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text("from fdpg_kernels import divergences\nours = divergences.get('reverse_kl')\n")
    assert parse_config({**SMALLEST, "divergence": "~/mine.py:ours"}).divergence == f"{tmp_path}/mine.py:ours"


# setting, a config in which it has no effect, and what gives it one
MOMENTS = {"kind": "distributional", "features": [WORD["feature"]], "moments": [1]}
WITHOUT_EFFECT = [
    ("engine.urls", ["http://a:1"], {}, {"engine.kind": "vllm_server"}),
    ("engine.urls", ["http://a:1"], {"engine.kind": "vllm"}, {"engine.kind": "vllm_server"}),
    ("engine.request_timeout", 30.0, {"engine.kind": "transformers"}, {"engine": SERVED}),
    ("engine.weight_transfer", "ipc", {}, {"engine": {"kind": "vllm_server", "urls": ["http://a:1"]}}),
    ("engine.weights_dir", "w", {}, {"engine": SERVED}),
    (
        *("engine.weights_dir", "w", {"engine": {"kind": "vllm_server", "urls": ["http://a:1"]}}),
        {"engine.weight_transfer": "disk"},
    ),
    ("engine.max_sequences", 8, {"engine": SERVED}, {"engine": {"kind": "vllm"}}),
    ("proposal.every", 3, {}, {"proposal.kind": "adaptive"}),
    ("loss.ratio_cap", 2.0, {"loss.ratio": "none"}, {"loss.ratio": "sequence"}),
    ("loss.ratio_drop", 2.0, {"loss.ratio": "none"}, {"loss.ratio": "sequence"}),
    ("evaluation.base_samples", 9, {"target": [WORD, MOMENTS]}, {"target": [WORD]}),
    ("evaluation.base_samples", 9, {"base": {"model": "other"}}, {"base": None}),
    ("target_fit_samples", 99, {}, {"target.0": MOMENTS}),
    ("target_fit_samples", 99, {}, {"target.0": {"kind": "import", "path": "a:b"}}),
]


@pytest.mark.parametrize(("key", "value", "without", "needed"), WITHOUT_EFFECT)
def test_a_setting_without_effect_is_refused(key, value, without, needed):
    with pytest.raises(UserError, match=rf"^{key}: .* has an effect only with .*; leave it out"):
        parse_config(changed(SMALLEST, {**without, key: value}))
    assert get(parse_config(changed(SMALLEST, {**without, **needed, key: value})), key) == value


@pytest.mark.parametrize(
    ("url", "is_address"),
    [(url, True) for url in ("http://gpu-box:8000", "https://h", "http://10.0.0.1:1/", "http://[::1]:80", "http://h/a")]
    + [(url, False) for url in ("gpu-box:8000", "http://", "http://h:abc", "http://h:99999", "http://h:0", "ftp://h")]
    + [(url, False) for url in ("http://me:secret@h", "http://h?x=1", "http://[::1", "", "http://h\t:1", "http://h\n")],
)
def test_addresses_of_servers(url, is_address):
    data = {**SMALLEST, "engine": {**SERVED, "urls": [url]}}
    if is_address:
        assert parse_config(data).engine.urls == [url]
    else:
        with pytest.raises(UserError, match=r"^engine\.urls"):
            parse_config(data)


@pytest.mark.parametrize("url", ["http://h/v1", "http://h:8000/v1/", "https://h/proxy/v1"])
def test_the_address_that_clients_of_openai_use_is_answered_with_the_right_one(url):
    with pytest.raises(UserError, match=r"^engine\.urls\.0: .*leave /v1 out"):
        parse_config({**SMALLEST, "engine": {**SERVED, "urls": [url]}})


NO_JSON = ["{x: 2024-01-31}", "{x: 2024-01-31 10:00:00}", "{x: !!binary /w==}", "{x: !!set {a}}", "{x: {1: 2}}"]
NO_JSON += ["{x: .nan}", "&a {x: *a}", "&a {x: [*a]}"]


@pytest.mark.parametrize("key", ["chat_template_kwargs: ", "tools: [", "chat_template_kwargs: {a: "])
@pytest.mark.parametrize("value", NO_JSON)
def test_what_a_chat_template_gets_is_what_the_run_s_config_can_hold(key, value, tmp_path):
    text = (
        yaml.safe_dump(SMALLEST) + f"contexts: {{train: a.jsonl, {key}{value}{']' * ('[' in key)}{'}' * ('{' in key)}}}"
    )
    (tmp_path / "given.yaml").write_text(text)
    with pytest.raises(UserError, match=r"^contexts\."):
        load_config(tmp_path / "given.yaml")


def test_servers_need_what_they_are_reached_by():
    for engine in ({"kind": "vllm_server"}, {**SERVED, "weights_dir": None}):
        with pytest.raises(UserError, match="vllm_server needs engine.urls, and weight_transfer: disk engine.weights"):
            parse_config({**SMALLEST, "engine": engine})


@pytest.mark.parametrize("key", ["trainer.samples_per_context", "evaluation.samples_per_context", "trainer.rounds"])
def test_numbers_that_no_run_would_end_with_are_refused(key):
    with pytest.raises(UserError, match=f"^{key}: .*less than or equal to"):
        parse_config(changed(SMALLEST, {key: 10**12}))


def test_seeds_are_what_every_generator_takes():
    assert parse_config(changed(SMALLEST, {"trainer.seed": 2**32 - 1})).trainer.seed == 2**32 - 1
    with pytest.raises(UserError, match="^trainer.seed: .*less than 4294967296"):
        parse_config(changed(SMALLEST, {"trainer.seed": 2**32}))


@pytest.mark.parametrize("key", ["divergence", "contexts.system_prompt", "contexts.chat_template_kwargs.mode"])
def test_half_a_character_is_refused_for_no_file_can_hold_it(key):
    data = {"model": "m", "run_dir": "r", "target": [{"kind": "import", "path": "a:b"}]}
    set_key(data, key, "\ud800")
    with pytest.raises(UserError):
        parse_config(data)
