"""Features: what each one counts, how a user's own is called, and that a bad one ends in one clear line."""

import asyncio
import json
import signal
import sys
import threading
import time
import unicodedata
import warnings

import numpy
import pycodestyle
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from fdpg_fast.contexts import Context
from fdpg_fast.errors import RunError, UserError
from fdpg_fast.features import (
    Completions,
    Feature,
    classifier,
    entities,
    feature,
    import_feature,
    pep8,
    python_parses,
    regex,
    sentiment,
    word,
)
from fdpg_fast.features.code import PythonParsesFeature
from fdpg_fast.features.entities import named
from fdpg_fast.rollouts import Rollouts


def batch_of(*completions, prompts=None, finished=None, **columns):
    return Completions(
        completions=list(completions),
        prompts=prompts or [""] * len(completions),
        completion_ids=[list(text.encode(errors="surrogatepass")) for text in completions],
        finished=finished or [True] * len(completions),
        columns=columns,
    )


def values(feature, *completions, **options):
    return feature(batch_of(*completions, **options)).tolist()


# --- built-in features ---


def test_word_is_whole_and_in_any_case():
    texts = ["An AMAZING day", "amazing", "amazingly", "unamazing", "so amazing!", '"amazing"', "amazing_thing", ""]
    assert values(word("amazing"), *texts) == [1, 1, 0, 0, 1, 1, 0, 0]
    assert values(word(" Café "), "un CAFÉ.", "cafés", "cafe", "le café,") == [1, 0, 0, 1]
    assert values(word("C++"), "in C++.", "C+", "c++11", "(C++)") == [1, 0, 0, 1]  # its own punctuation is literal
    for nothing in ("  ", "\ufe0f"):  # the second only chooses a glyph
        with pytest.raises(UserError, match="the word is empty"):
            word(nothing)


SPELLINGS = [
    ("東京", "東京 へ", 1),
    ("東京", "東京都へ", 1),
    ("東京", "京東", 0),
    ("AI", "私はAIです。", 1),  # between characters that need no space
    ("AI", "私はAI2です", 0),
    ("ไม่", "ผมไม่รู้", 1),
    ("ไม", "ไม้", 0),  # another vowel or tone is another word
    ("が", "か\u3099", 1),
    ("か", "が", 0),
    ("ភាសា", "ភាសាខ្មែរ", 1),
    ("हिन्दी", "यह हिन्दी है", 1),
    ("हिन्द", "हिन्दी", 0),
    ("서울", "서울 이다", 1),
    ("서울", unicodedata.normalize("NFD", "서울"), 1),
    ("café", unicodedata.normalize("NFD", "un CAFÉ."), 1),
    (unicodedata.normalize("NFD", "café"), "un CAFÉ.", 1),
    ("cafe", unicodedata.normalize("NFD", "café"), 0),
    ("Nguyễn", unicodedata.normalize("NFD", "họ NGUYỄN"), 1),
    ("straße", "STRASSE", 1),
    ("istanbul", "İstanbul'da", 1),
    ("σοφός", "ΣΟΦΌΣ", 1),
    ("❤", "I ❤\ufe0f you", 1),
    ("naïve", "naïvely", 0),
]


@pytest.mark.parametrize(("wanted", "text", "found"), SPELLINGS)
def test_words_of_all_scripts_are_found_however_they_are_composed(wanted, text, found):
    assert values(word(wanted), text) == [found]


NAMED = {
    "Return the size of `x` as int8.": {"x", "int8"},
    "Raise TypeError if os.path is missing.": {"TypeError", "os.path"},
    "Tensors of the CUDA backend. Their max_length is 3.5.": {"CUDA", "max_length", "3.5"},
    "Print a text, e.g. one that Python reads, as I do.": {"Python"},
    'Warning: Deprecated. (Use `new name`!) "Yes"': {"new", "name"},
    "Sort __init__ and _private: nothing else": {"__init__", "_private"},
    "": set(),
}


@pytest.mark.parametrize("text", NAMED)
def test_entities_are_names_numbers_and_code(text):
    assert named(text) == NAMED[text]


def test_a_capital_at_the_start_of_a_sentence_names_something_only_in_the_prompt():
    assert named("Tensors grow. Python too") == set()
    assert named("Tensors grow. Python too", first_words=True) == {"Tensors", "Python"}


def test_entities_of_the_completion_must_all_stand_in_the_prompt():
    prompt = "copy(out): Python raises TypeError if `out` is longer than 3. Lists of any kind are fine."
    texts = ["Make Python Lists.", "Make lists.", "Make Python NumPy lists.", "Raise TypeError after 3.", "Out of 4."]
    prompts = [prompt] * len(texts)
    assert values(entities(1), *texts, prompts=prompts) == [1, 0, 0, 1, 0]
    assert values(entities(2), "Make 3.", "Make 3 `out`.", "Make 3 and 3.", prompts=[prompt] * 3) == [0, 1, 0]
    assert values(entities(1), "Make Python", prompts=[prompt], finished=[False]) == [0]


def test_word_and_regex_look_at_the_completion_only():
    assert values(word("yes"), "no", prompts=["yes"]) == [0]
    assert values(regex(r"\d{2,}$"), "1 12", "12 1", "x", "é42", prompts=["99"] * 4) == [1, 0, 0, 1]
    assert values(regex("^b"), "ab", "a\nb") == [0, 0]
    with pytest.raises(UserError, match=r"'\(a' is not a regular expression"):
        regex("(a")
    for pattern in ("a{99999999999}", "(" * 5000 + ")" * 5000):
        with pytest.raises(UserError, match=r"is not a regular expression: ") as refusal:
            regex(pattern)
        assert len(str(refusal.value)) < 300


def test_python_parses_takes_prompt_and_completion_together():
    sources = ["    return x\n", "return x\n", "    return (x\n", "", "    pass\n    # é\n"]
    assert values(python_parses(), *sources, prompts=["def f(x):\n"] * 5) == [1, 0, 0, 0, 1]
    assert values(python_parses(), "x = 1", "x = 1", finished=[True, False]) == [1, 0]  # cut off counts as 0


def test_python_parses_survives_hostile_source():
    depth = 50_000
    hostile = ["x = 1\0", "(" * depth, "-" * depth + "1", "x" + ".y" * depth, "\ud800", "'\ud800'", "lambda:" * depth]
    assert values(python_parses(), *hostile) == [0] * len(hostile)


def test_python_parses_says_nothing_about_dubious_source():
    """Whatever the user does about warnings: "\\d" and `1 is 1` are valid Python."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert values(python_parses(), "x = '\\d'", "1 is 1", "assert (1, 2)") == [1, 1, 1]
        warnings.simplefilter("error")
        assert values(python_parses(), "x = '\\d'", "1 is 1", "assert (1, 2)") == [1, 1, 1]
    assert not caught


@pytest.mark.parametrize("letter", ["\u2028", "\x0b", "\x1c", "\x85"])
def test_lines_of_source_end_where_python_ends_them(letter):
    assert values(pep8(), f"x = 'a{letter}b'\n", f"x=1  # {letter}\n", "x = 1\r\ny = 2\r\n") == [1, 0, 1]


def test_source_is_never_executed(tmp_path, capfd):
    target = tmp_path / "executed"
    source = f"print('ran')\nopen({str(target)!r}, 'w')\n"
    assert values(python_parses(), source) == [1]
    pep8()(batch_of(source))
    assert not target.exists() and capfd.readouterr() == ("", "")


def test_pep8():
    assert values(pep8(), "x = 1 1\n", "s = 'abc\n") == [0, 0]  # no fault of style, but no Python either
    sources = ["x = 1\n", "x=1\n", "import os, sys\n", "x = (\n", "def f():\n  return 1\n"]
    assert values(pep8(), *sources) == [1, 0, 0, 0, 0]
    assert values(pep8(), "    return 1", "   return 1", prompts=["def f():\n"] * 2) == [1, 0]
    assert values(pep8(), "x = 1", finished=[False]) == [0]


def test_pep8_does_not_depend_on_the_user_s_own_configuration(tmp_path, monkeypatch):
    (tmp_path / "pycodestyle").write_text("[pycodestyle]\nselect = E101\n")
    monkeypatch.setattr(pycodestyle, "USER_CONFIG", str(tmp_path / "pycodestyle"))
    assert values(pep8(), "x=1\n") == [0]


def test_sentiment_is_in_the_unit_interval_and_one_half_where_nothing_is_felt():
    good, neutral, bad, empty, negated = values(
        sentiment(), "What a WONDERFUL day!!!", "A chair and a table.", "I hate this horrible mess.", "", "not good"
    )
    assert 0 <= bad < 0.2 and 0.8 < good <= 1 and neutral == empty == 0.5 and negated < 0.5
    # VADER's rule for one lexicon word of valence v: compound = v / √(v² + 15); "good" has 1.9
    assert values(sentiment(), "good") == pytest.approx([(1 + 1.9 / (1.9**2 + 15) ** 0.5) / 2], abs=1e-4)


def test_sentiment_names_the_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(UserError, match="needs vaderSentiment; pip install vaderSentiment"):
        sentiment()


@pytest.fixture
def make_classifier(tiny_model, tmp_path):
    def make(**options):
        tokenizer = AutoTokenizer.from_pretrained(tiny_model, model_max_length=20)
        sizes = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        torch.manual_seed(0)
        config = BertConfig(
            **sizes, num_attention_heads=2, max_position_embeddings=20, pad_token_id=0, initializer_range=0.5, **options
        )
        network = BertForSequenceClassification(config).eval()
        for saved in (network, tokenizer):
            saved.save_pretrained(tmp_path)
        return str(tmp_path), lambda text: network(**tokenizer(text[:20], return_tensors="pt")).logits[0].detach()

    return make


TEXTS = ["short", "a longer text here", "x", "far longer than the twenty positions there are", "mid size"]
LABELS = {"id2label": {0: "Negative", 1: "neutral", 2: "POSITIVE"}, "label2id": {"Negative": 0}}


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_classifier_gives_the_label_s_probability(make_classifier, batch_size):
    """Batched, padded, sorted and cut to the classifier's length: as every text alone."""
    path, logits = make_classifier(**LABELS)
    expected = [float(logits(text).softmax(0)[2]) for text in TEXTS]
    assert max(expected) - min(expected) > 0.05
    scores = classifier(path, "positive", batch_size=batch_size)
    assert values(scores, *TEXTS, prompts=["not looked at"] * 5) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"num_labels": 1}, {**LABELS, "problem_type": "multi_label_classification"}],
    ids=["one logit", "several labels at once"],
)
def test_labels_that_do_not_exclude_each_other_are_yes_no_scores(make_classifier, options):
    path, logits = make_classifier(**options)
    label = list(BertConfig.from_pretrained(path).id2label.values())[0]
    expected = [float(logits(text).sigmoid()[0]) for text in TEXTS]
    assert values(classifier(path, label), *TEXTS) == pytest.approx(expected, abs=1e-5)


def test_classifier_refusals(make_classifier, tiny_model, tmp_path):
    path, _ = make_classifier(**LABELS)
    with pytest.raises(UserError, match="no label 'joy', only negative, neutral, positive"):
        classifier(path, "joy")
    with pytest.raises(UserError, match="feature classifier: there is no folder"):
        classifier(str(tmp_path / "nothing"), "joy")


@pytest.mark.parametrize("damage", ["model", "tokenizer", "weights", "config"])
def test_a_classifier_s_repository_is_neither_run_nor_trusted(damage, make_classifier, tmp_path, monkeypatch):
    """Whatever its files ask for, and whoever sits at the terminal: one line."""
    path, _ = make_classifier(**LABELS)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    mapped = {"auto_map": {name: "evil.Evil" for name in ("AutoConfig", "AutoModelForSequenceClassification")}}
    if damage == "model":
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", **mapped}))
    if damage == "tokenizer":
        named = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
        (tmp_path / "tokenizer.json").unlink()
    if damage == "weights":
        (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    if damage == "config":
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": "many"}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match="feature classifier: cannot load") as refusal:
        classifier(path, "positive")
    assert "\n" not in str(refusal.value) and not (tmp_path / "ran").exists()


def test_a_model_without_a_classification_head_is_refused(tiny_model):
    """transformers would give it a random head, another one in every run."""
    with pytest.raises(UserError, match="classifier"):
        classifier(str(tiny_model), "LABEL_1")


# --- a user's own feature ---


def test_decorator_with_and_without_arguments():
    @feature
    def length(completions):
        return [len(text) for text in completions]

    @feature(name="size", timeout=3.0)
    def other(completions):
        return [len(text) for text in completions]

    assert (length.name, length.timeout, other.name, other.timeout) == ("length", 60.0, "size", 3.0)
    assert values(length, "ab", "") == values(other, "ab", "") == [2, 0]
    assert feature(length) == length
    assert (feature(length, name="l").name, feature(length, timeout=2.0).timeout) == ("l", 2.0)  # nothing is dropped
    assert values(feature(lambda completions: [1] * len(completions)), "a") == [1]


def test_arguments_come_by_name_as_in_trl():
    batch = batch_of("a", "b", prompts=["p", "q"], finished=[True, False], answer=[4, None])
    seen = {}

    def score(completions, prompts, completion_ids, answer, **columns):
        seen.update(columns, completions=completions, prompts=prompts, ids=completion_ids, answer=answer)
        return [0.0] * len(completions)

    feature(score)(batch)
    assert seen == {
        "completions": ["a", "b"],
        "prompts": ["p", "q"],
        "texts": ["pa", "qb"],
        "ids": [[97], [98]],
        "answer": [4, None],
        "finished": [True, False],
    }
    assert feature(lambda finished, answer=None, nothing=5: [nothing, answer[0]])(batch).tolist() == [5, 4]


def test_a_column_cannot_replace_what_the_policy_wrote():
    batch = batch_of("a", completions=["forged"], finished=[False], answer=[1])
    assert feature(lambda completions, **_: [float(completions == ["a"])])(batch).tolist() == [1]


@pytest.mark.parametrize(
    "returned",
    [
        [1, 0.5, None],
        (True, 0.5, None),
        [numpy.float32(1), numpy.float64(0.5), None],
        [torch.tensor(1), torch.tensor(0.5), None],
    ],
)
def test_numbers_of_any_kind_and_none(returned):
    result = feature(lambda completions: returned)(batch_of("a", "b", "c"))
    assert result.dtype == torch.float64 and result[:2].tolist() == [1, 0.5] and bool(result[2].isnan())


def test_arrays():
    for array in (numpy.array([1, 0]), numpy.array([True, False]), torch.tensor([1.0, 0.0])):
        assert values(feature(lambda completions, array=array: array), "a", "b") == [1, 0]
    assert values(feature(lambda completions: torch.tensor([[1.0], [0.0]])), "a", "b") == [1, 0]


def test_async_features():
    async def one(text):
        await asyncio.sleep(0.001)
        return len(text)

    async def score(completions):
        return await asyncio.gather(*map(one, completions))

    assert values(feature(score), "ab", "c") == [2, 1]

    async def notebook():  # where a loop is running already
        return values(feature(score), "ab", "c")

    assert asyncio.run(notebook()) == [2, 1]


def test_import_paths(tmp_path, monkeypatch):
    source = "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
    source += "@dataclass\nclass Scale:\n    by: float = 2.0\n\n"  # dataclasses look their module up
    source += "def double(completions):\n    return [Scale().by * len(text) for text in completions]\n"
    (tmp_path / "my_features.py").write_text(source)
    for path in (f"{tmp_path}/my_features.py:double", "my_features:double"):
        monkeypatch.chdir(tmp_path)
        found = import_feature(path)
        assert found.name == "double" and values(found, "ab") == [4]


INSTANCES = """
import functools
class Longer:
    def __init__(self, limit): self.limit = limit
    def __call__(self, completions): return [len(text) > self.limit for text in completions]
short, long = Longer(1), Longer(3)
def make(limit):
    def score(completions): return short(completions) if limit == 1 else long(completions)
    return score
made_short, made_long = make(1), make(3)
part = functools.partial(Longer.__call__, short)
anonymous = lambda completions: short(completions)
"""


def test_a_feature_of_a_file_is_called_as_it_is_there(tmp_path):
    """Two instances of a class, or two functions that one function made, are two features."""
    (tmp_path / "instances.py").write_text(INSTANCES)
    names = ("short", "long", "made_short", "made_long", "part", "anonymous")
    found = [import_feature(f"{tmp_path}/instances.py:{name}") for name in names]
    assert [feature.name for feature in found] == list(names)
    assert [values(feature, "ab")[0] for feature in found] == [1, 0, 1, 0, 1, 1]
    with pytest.raises(UserError, match="leads to a type, not a function"):
        import_feature(f"{tmp_path}/instances.py:Longer")


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[31mred", "\u202eevil", "\ud800", "a\x00"])
def test_names_that_a_terminal_would_obey_are_refused(name):
    with pytest.raises(UserError, match="a feature cannot be called") as refusal:
        Feature(name, len)
    assert str(refusal.value).isprintable()
    with pytest.raises(UserError, match="a feature cannot be called"):
        PythonParsesFeature(kind="python_parses", name=name).build("cpu")


@pytest.mark.parametrize("function", [max, dict, len, lambda completions, /: [1.0]])
def test_what_cannot_be_called_by_name_is_refused_when_it_is_made(function):
    with pytest.raises(UserError, match="^feature 'f' takes no arguments by name; "):
        Feature("f", function)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 1e10])
def test_a_timeout_is_a_number_of_seconds(timeout):
    """No clock could hold the others: the limit would be silently lost."""
    with pytest.raises(UserError, match=r"^feature 'f': its timeout is .*, not in \(0, 1e\+06\] seconds"):
        Feature("f", lambda completions: [1.0], timeout)


def test_patterns_and_words_that_are_not_printable_get_printable_names():
    for made in (regex("a\n\tb\x1b"), word("a\x1bb"), regex("(?x) a\n# comment\n b")):
        assert made.name.isprintable()
    assert regex("é  東京").name == "regex:é  東京"


BROKEN = "raise ValueError('at import')\n"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("my_features", "write package.module:name or file.py:name"),
        ("no_such_module:f", "no_such_module"),
        ("missing.py:f", "missing.py"),
        ("math:no_such_name", "no_such_name"),
        ("math:pi", "leads to a float, not a function"),
        ("syntax.py:f", "SyntaxError"),
        ("broken.py:f", "ValueError: at import"),
    ],
)
def test_bad_import_paths_are_refused(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "syntax.py").write_text("def f(:\n")
    (tmp_path / "broken.py").write_text(BROKEN)
    with pytest.raises(UserError, match=message) as refusal:
        import_feature(path)
    assert "\n" not in str(refusal.value)


# --- bad features ---


def raises(completions):
    raise KeyError("answer")


def raises_lines(completions):
    raise ValueError("first\nsecond")


async def raises_in_a_group(completions):
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.to_thread(raises, completions))


class Panic(BaseException):
    """As a library in Rust raises it."""


def panics(completions):
    raise Panic("index out\nof bounds")


async def panics_in_a_group(completions):
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.to_thread(panics, completions))


class Hostile(list):
    def __len__(self):
        raise ValueError("no\x1b[2J\nlength")

    def __float__(self):
        raise ZeroDivisionError

    def __repr__(self):
        raise ValueError("no\ntext")


BAD = {
    "raises in a group": (raises_in_a_group, "'f' raised KeyError: 'answer'"),
    "panics": (panics, "'f' raised Panic: index out of bounds"),
    "panics in a group": (panics_in_a_group, "'f' raised Panic: index out of bounds"),
    "bytes of the right length": (lambda completions: b"12", "'f' returned bytes, not one number"),
    "hostile values": (lambda completions: [Hostile(), 0], "'f' raised ValueError: no text"),
    "hostile list": (lambda completions: Hostile(), r"'f' raised ValueError: no\\x1b\[2J length"),
    "generator": (
        lambda completions: (1.0 for _ in completions),
        "'f' returned generator, not one number",
    ),
    "verdicts": (lambda completions: [{"score": 1.0}] * 2, "'f' returned {'score': 1.0} for 'a', not a number"),
    "raises": (raises, "'f' raised KeyError: 'answer'"),
    "raises several lines": (raises_lines, "'f' raised ValueError: first"),
    "wrong arguments": (lambda completions, missing: [0, 0], "'f' raised TypeError.*missing"),
    "too few": (lambda completions: [1.0], "'f' returned 1 values for 2 completions"),
    "too many": (lambda completions: [1.0] * 3, "'f' returned 3 values for 2"),
    "one number": (lambda completions: 0.5, "'f' returned float"),
    "one numpy number": (lambda completions: numpy.float64(0.5), "'f' returned float64"),
    "one tensor": (lambda completions: torch.tensor(0.5), "'f' returned Tensor"),
    "nothing": (lambda completions: None, "'f' returned NoneType"),
    "dict": (lambda completions: {0: 1, 1: 2}, "'f' returned dict"),
    "NaN": (lambda completions: [0, float("nan")], "'f' returned nan for 'bb'.*finite number, or None"),
    "inf": (lambda completions: torch.tensor([torch.inf, 0]), "'f' returned inf for 'a'"),
    "words": (lambda completions: ["good", "bad"], "'f' returned 'good' for 'a', not a number"),
    "text of the right length": (lambda completions: "12", "'f' returned str"),
    "two columns": (lambda completions: torch.zeros(2, 2), r"'f' returned .* not a number"),
    "too large": (lambda completions: [10**400, 0], "'f' returned"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_features_end_in_one_line(name):
    score, message = BAD[name]
    with pytest.raises(RunError, match=message) as failure:
        Feature("f", score)(batch_of("a", "bb"))
    assert "\n" not in str(failure.value)


async def sleeps_async(completions):
    await asyncio.sleep(20)


def stubborn(completions):
    for _ in range(20):
        try:
            time.sleep(1)
        except Exception:
            time.sleep(20)


def swallows(completions):
    scores = []
    for _ in completions:
        try:
            time.sleep(10)
            scores.append(1.0)
        except:  # noqa: E722  (reward functions do this)
            scores.append(0.0)
    return scores


HANGS = {
    "sleeps": lambda completions: time.sleep(20),
    "busy": lambda completions: sum(i for i in range(10**10)),
    "async": sleeps_async,
    "catches Exception": stubborn,
    "catches everything": swallows,
    "regular expression": regex("(a+)+$").score,
}


@pytest.mark.parametrize("name", HANGS)
def test_a_feature_that_hangs_is_stopped(name):
    handler, started = signal.getsignal(signal.SIGALRM), time.monotonic()
    with pytest.raises(RunError, match="'f' did not return within its timeout of 0.2 s for 2 completions"):
        Feature("f", HANGS[name], timeout=0.2)(batch_of("a" * 40 + "!", "b"))
    assert time.monotonic() - started < 3  # 0.2 s on a free machine; a busy one may stall the process
    assert signal.getsignal(signal.SIGALRM) is handler and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_feature_in_time_is_left_alone():
    assert values(Feature("f", lambda completions: [1], timeout=0.05), "a") == [1]
    time.sleep(0.1)  # no late alarm
    results = []
    thread = threading.Thread(target=lambda: results.append(values(feature(lambda completions: [1]), "a")))
    thread.start()
    thread.join()
    assert results == [[1]]  # another thread gets no signal, and still gets its values


# --- from rollouts to text ---


def test_decode_gives_text_without_eos_and_columns_by_row(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    contexts = (
        Context(0, "p", tuple(tokenizer("p")["input_ids"]), {"answer": 1}),
        Context(1, "q", tuple(tokenizer("q")["input_ids"]), {"level": "x"}),
    )
    texts = [tokenizer(text)["input_ids"] for text in (" a , b .", "é", "c")]
    packed = [texts[0] + [0], [0], texts[1] + [0], texts[2]]
    lengths = torch.tensor([len(tokens) for tokens in packed])
    rollouts = Rollouts(
        contexts=contexts,
        context_index=torch.tensor([0, 0, 1, 1]),
        token_ids=torch.tensor([token for tokens in packed for token in tokens]),
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        behavior_logprob=torch.zeros(int(lengths.sum())),
        finished=torch.tensor([True, True, True, False]),
    )
    decoded = Completions.decode(rollouts, tokenizer)
    assert decoded.completions == [" a , b .", "", "é", "c"]  # to the letter: no space is tidied away
    assert decoded.prompts == ["p", "p", "q", "q"] and decoded.finished == [True, True, True, False]
    assert decoded.completion_ids == [texts[0], [], texts[1], texts[2]]
    assert dict(decoded.columns) == {"answer": [1, 1, None, None], "level": [None, None, "x", "x"]}
