"""What features read is what the model wrote, and is their own."""

import copy
import json
import shutil

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fdpg_fast.contexts import Context
from fdpg_fast.features import Completions, Feature, entities, python_parses, regex, word
from fdpg_fast.features.completions import GIVEN, ON_REQUEST
from fdpg_fast.imports import import_object
from fdpg_fast.rollouts import pack
from support import runs
from support.tokenizers import FAMILIES, MARKERS

TOKENIZERS = {name: make() for name, make in FAMILIES.items()}
FAMILY = st.sampled_from(list(TOKENIZERS))


def decode(tokenizer, prompt, *completions, **options):
    """Completions, lists of ids with their EOS, of one prompt, a list of ids or a context."""
    context = prompt if isinstance(prompt, Context) else Context(0, tokenizer.decode(prompt), tuple(prompt))
    drawn = [(ids, [0.0] * len(ids), ids[-1:] == [tokenizer.eos_token_id]) for ids in completions]
    return Completions.decode(pack([context], [drawn]), tokenizer, **options)


def draw_ids(data, tokenizer, min_size=0):
    tokens = [token for token in range(len(tokenizer)) if token != tokenizer.eos_token_id]
    few = st.sampled_from(tokens[-40:])  # among them pieces, bytes and special tokens: pairs that meet
    return data.draw(st.lists(st.sampled_from(tokens) | few, min_size=min_size, max_size=8))


@given(data=st.data(), family=FAMILY, keep=st.booleans())
def test_prompt_and_completion_together_are_the_text_of_all_ids(data, family, keep):
    tokenizer = TOKENIZERS[family]
    prompt = draw_ids(data, tokenizer, min_size=1)
    completions = [draw_ids(data, tokenizer) for _ in range(3)]
    seen = decode(tokenizer, prompt, *[[*ids, tokenizer.eos_token_id] for ids in completions], keep_special_tokens=keep)
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} if keep else set()
    options = {"skip_special_tokens": not keep, "clean_up_tokenization_spaces": False}
    kept = [[token for token in [*prompt, *ids] if token not in ends] for ids in completions]
    assert seen.texts == [tokenizer.decode(ids, **options) for ids in kept]
    assert [p + c for p, c in zip(seen.prompts, seen.completions, strict=True)] == seen.texts
    alone = tokenizer.decode([token for token in prompt if token not in ends], **options)
    for text, own in zip(seen.texts, seen.prompts, strict=True):
        assert own == alone or not text.startswith(alone)  # cut where the prompt ends, wherever it can be
    assert seen.completion_ids == completions


@given(data=st.data(), family=FAMILY)
def test_an_answer_is_a_text_of_its_own(data, family):
    """Of an encoder-decoder; its prompt is as in the data set, though the tokenizer may not know its characters."""
    tokenizer = TOKENIZERS[family]
    completion = draw_ids(data, tokenizer)
    context = Context(0, "Translate {this} \n é", tuple(tokenizer("Translate")["input_ids"]))
    seen = decode(tokenizer, context, completion, continues_prompt=False)
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    assert seen.texts == seen.completions == [tokenizer.decode(completion, **options)]
    assert seen.prompts == [context.text]


@given(text=st.text(), cut=st.integers(0, 99), family=st.sampled_from(["byte_level", "sentencepiece", "metaspace"]))
@example(text="漢", cut=1, family="byte_level")
@example(text="x = 1 if a else b", cut=15, family="sentencepiece")
def test_what_was_encoded_is_read_wherever_the_prompt_ends(text, cut, family):
    tokenizer = TOKENIZERS[family]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = tokenizer.bos_token_id
    seen = decode(tokenizer, [start, *ids[:cut]], ids[cut:])
    assert seen.texts == [tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)]
    if family == "byte_level" and not set(MARKERS) & {tokenizer.decode([i]) for i in ids}:
        assert seen.texts == [text]


SPACES = [
    ("byte_level", "x = 1 if a else", " b"),
    ("sentencepiece", "x = 1 if a else", " b"),
    ("metaspace", "x = 1 if a else", " b"),
    ("word_pieces", "x = a if a else", " b"),
]


@pytest.mark.parametrize(("family", "prompt", "completion"), SPACES)
def test_the_first_space_is_there(family, prompt, completion):
    tokenizer = TOKENIZERS[family]
    before, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + completion))
    assert ids[: len(before)] == before
    seen = decode(tokenizer, before, [*ids[len(before) :], tokenizer.eos_token_id])
    assert (seen.prompts, seen.completions) == ([prompt], [completion])
    assert python_parses()(seen).tolist() == [1] and regex("^ b$")(seen).tolist() == [1]


@pytest.mark.parametrize("family", TOKENIZERS)
def test_nothing_is_written_without_a_prompt_or_a_completion(family):
    tokenizer = TOKENIZERS[family]
    seen = decode(tokenizer, Context(0, "", (tokenizer.bos_token_id,)), [tokenizer.eos_token_id], [])
    assert seen.texts == seen.prompts == seen.completions == ["", ""]
    ids = tokenizer("a b", add_special_tokens=False)["input_ids"]
    assert decode(tokenizer, ids, []).completions == [""] and decode(tokenizer, ids, []).prompts == ["a b"]


def test_a_character_that_the_prompt_begins_belongs_to_the_completion():
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer("a漢b")["input_ids"]
    seen = [decode(tokenizer, ids[:2], [*ids[2:stop]]) for stop in (2, 3, len(ids))]
    assert [(s.prompts, s.completions) for s in seen] == [(["a�"], [""]), (["a�"], [""]), (["a"], ["漢b"])]


@pytest.mark.parametrize("family", TOKENIZERS)
def test_special_tokens_can_be_kept_all_but_ends_and_padding(family):
    tokenizer = TOKENIZERS[family]
    call = [*tokenizer("<tool>x</tool>", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    prompt = [tokenizer.pad_token_id, tokenizer.bos_token_id, *tokenizer("a", add_special_tokens=False)["input_ids"]]
    left_out, kept = (decode(tokenizer, prompt, call, keep_special_tokens=keep) for keep in (False, True))
    assert left_out.completions[0].split() == ["x"]
    assert kept.completions[0].replace(" ", "") == "<tool>x</tool>" and kept.prompts == ["a"]


def test_what_is_written_down_is_what_features_read(tiny_model, tmp_path):
    (tmp_path / "own.py").write_text(
        "seen = []\ndef own(texts, completions, prompts, tokenizer):\n"
        "    seen.extend(zip(prompts, completions))\n    tokenizer.eos_token = 'x'\n    prompts.clear()\n"
        "    return [1.0] * len(texts)\n"
    )
    term = {"kind": "rlhf", "beta": 1.0, "feature": {"kind": "import", "path": f"{tmp_path}/own.py:own"}}
    run_dir = runs.train(tiny_model, tmp_path, target=[term])
    seen = import_object(f"{tmp_path}/own.py:seen")
    assert {(row["prompt"], row["completion"]) for row in runs.rows(run_dir / "samples.jsonl")} <= set(seen)
    assert {prompt for prompt, _ in seen} == set(runs.PROMPTS)
    checkpoint = AutoTokenizer.from_pretrained(max((run_dir / "checkpoints").iterdir()))
    assert checkpoint.eos_token == AutoTokenizer.from_pretrained(tiny_model).eos_token


# --- each call has its own ---


def batch(**columns):
    chats = [({"role": "user", "content": "hi"},), None]
    return Completions(
        ["yes", "no"],
        ["hi\n", "p"],
        [[1], [2]],
        [True, False],
        columns,
        chats=chats,
        tokenizer=TOKENIZERS["byte_level"],
    )


def vandal(prompts, completions, texts, completion_ids, finished, tokenizer, prompt_texts, completion_texts, tags):
    prompts[0][0]["content"] = completions[0][0]["content"] = "changed"
    tags[0]["seen"].append("changed")
    completion_ids[0].append(9)
    tokenizer.eos_token = "<tool>"
    for values in (prompts, completions, texts, completion_ids, finished, prompt_texts, completion_texts, tags):
        values.clear()
    return [0.0, 0.0]


def test_what_a_feature_does_to_its_arguments_reaches_nobody():
    shared = {"seen": []}
    ours = batch(tags=[shared, shared])
    before = {name: copy.deepcopy(value) for name, value in vars(ours).items() if name != "tokenizer"}
    Feature("vandal", vandal)(ours)
    assert {name: value for name, value in vars(ours).items() if name != "tokenizer"} == before
    assert ours.tokenizer.eos_token == "</s>" and shared == {"seen": []}
    given = []
    Feature("next", lambda **columns: given.append(columns) or [0.0, 0.0])(ours)
    assert given[0]["tags"] == [{"seen": []}] * 2 and given[0]["tags"][0] is not given[0]["tags"][1]


def test_a_chat_comes_as_trl_gives_it_and_text_as_text():
    def score(prompts, completions, prompt_texts, completion_texts, texts):
        assert prompts == [[{"role": "user", "content": "hi"}], "p"]
        assert completions == [[{"role": "assistant", "content": "yes"}], "no"]
        assert (prompt_texts, completion_texts, texts) == (["hi\n", "p"], ["yes", "no"], ["hi\nyes", "pno"])
        return [float(completions[0][0]["content"] == "yes"), None]

    assert Feature("f", score)(batch()).tolist()[0] == 1
    assert word("yes")(batch()).tolist() == [1, 0] and regex("^no$")(batch()).tolist() == [0, 1]
    assert entities(1)(batch()).tolist() == [0, 0]


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
TRL = """
def own(prompts, completions, prompt_texts, completion_texts, **columns):
    assert prompts[0] == [{"role": "user", "content": "hi"}] and set(prompt_texts) == {"<user>hi>"}
    assert [completion[0]["role"] for completion in completions] == ["assistant"] * len(prompts)
    assert [completion[0]["content"] for completion in completions] == completion_texts
    return [float(len(completion[0]["content"])) for completion in completions]
"""


def test_a_reward_for_chats_of_trl_works_as_it_is(tiny_model, tmp_path, capsys):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "chats.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "hi"}]}) + "\n")
    (tmp_path / "conversational.py").write_text(TRL)
    term = {"kind": "rlhf", "beta": 9.0, "feature": {"kind": "import", "path": f"{tmp_path}/conversational.py:own"}}
    run_dir = runs.train(model, tmp_path, target=[term], contexts={"train": f"{tmp_path}/chats.jsonl"})
    for row in runs.rows(run_dir / "samples.jsonl"):
        assert row["prompt"] == "<user>hi>" and row["features"]["own"] == len(row["completion"])
    capsys.readouterr()
    message = json.dumps([{"role": "user", "content": "hi"}])
    assert runs.call("sample", run_dir, "--count=1", "--prompt", message) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "<user>hi>"
    runs.call("sample", run_dir, "--count=1", "--prompt=ho")  # which this feature cannot read
    assert "--prompt is continued as it stands, without the chat template" in capsys.readouterr().err


def test_the_tokenizer_is_for_whoever_asks_by_name():
    def asks(completion_ids, tokenizer, **others):
        assert not others.keys() & {"tokenizer", "completion_texts", "prompt_texts"}
        return [float(tokenizer.decode(ids) == TOKENIZERS["byte_level"].decode(ids)) for ids in completion_ids]

    assert Feature("f", asks)(batch()).tolist() == [1, 1]


# --- columns ---

ANSWERED = "def own(completions, answer, level=None): return [None if a is None else 1.0 for a in answer]\n"


def own_feature(tmp_path, *rows, evaluated=None):
    """The status of a run with a feature that asks for a column, on these rows."""
    for name, content in (("train.jsonl", rows), ("eval.jsonl", evaluated or rows)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    (tmp_path / "answered.py").write_text(ANSWERED)
    term = {"kind": "rlhf", "beta": 1.0, "feature": {"kind": "import", "path": f"{tmp_path}/answered.py:own"}}
    return {"target": [term], "contexts": {"train": f"{tmp_path}/train.jsonl", "eval": f"{tmp_path}/eval.jsonl"}}


def test_columns_are_those_of_the_whole_data_set(tiny_model, tmp_path):
    """A round that sees only rows without the answer too."""
    sections = own_feature(tmp_path, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c", "answer": "1"})
    run_dir = runs.train(tiny_model, tmp_path, **sections, trainer={"contexts_per_round": 1, "rounds": 3})
    found = {row["prompt"]: row["features"]["own"] for row in runs.rows(run_dir / "samples.jsonl")}
    assert found == {"a": None, "b": None, "c": 1.0}
    assert runs.call("sample", run_dir, "--prompt", "x", "--count", "1") == 0  # has no columns at all


@pytest.mark.parametrize("name", sorted(GIVEN | ON_REQUEST))
def test_a_column_with_the_name_of_an_argument_is_refused(name, tiny_model, tmp_path, capsys):
    sections = own_feature(tmp_path, {"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 1, name: "forged"})
    path = runs.write_config(tmp_path, runs.settings(tiny_model, tmp_path / "run", **sections))
    assert runs.call("train", path) == 2 and not (tmp_path / "run").exists()
    assert f"contexts.train: the column {name!r} has the name of" in capsys.readouterr().err


def test_a_column_that_a_feature_asks_for_must_be_there(tiny_model, tmp_path, capsys):
    rows = [{"prompt": "a", "answer": 1, "other": 2}]
    sections = own_feature(tmp_path, *rows, evaluated=[{"prompt": "b", "other": 2}])
    path = runs.write_config(tmp_path, runs.settings(tiny_model, tmp_path / "run", **sections))
    assert runs.call("train", path, "--dry-run") == runs.call("doctor", path) == 2
    assert runs.call("train", path) == 2 and not (tmp_path / "run").exists()
    message = "target: feature 'own' asks for 'answer', which contexts.eval has no column for; there are completion_ids"
    assert capsys.readouterr().err.count(message) == 3
