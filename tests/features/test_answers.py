"""Answers: where they stand in a text, when two are the same, and what hostile texts do to those who read them."""

import inspect
import sys
import time

import pytest

from fdpg_fast.contexts import Context
from fdpg_fast.errors import RunError, UserError
from fdpg_fast.features import Completions, apart, check_columns
from fdpg_fast.features.answers import ExactAnswerFeature, MathFeature, as_number, same_answer
from fdpg_fast.features.apart import PROCESSES
from support import runs


def exact(**keys):
    return ExactAnswerFeature(kind="exact_answer", **keys).build("cpu")


def mathematics(**keys):
    return MathFeature(kind="math", **keys).build("cpu")


def batch_of(texts, answers, finished=True):
    count = len(texts)
    return Completions([*texts], [""] * count, [[]] * count, [finished] * count, {"answer": [*answers]})


def value(feature, text, answer, finished=True):
    return feature(batch_of([text], [answer], finished)).nan_to_num(-1).item()


SAME = [
    ("1,000", "1000"),
    ("1000", "1000.0"),
    ("−5", "-5"),
    ("－5", "-5.00"),
    ("+7", "7"),
    ("1/2", "0.5"),
    ("1 / 2", "2/4"),
    ("$ 5 %", "5"),
    ("\\frac{1}{2}", "0.5"),
    ("\\dfrac{-3}{6}", "-.5"),
    ("50%", "50"),
    ("50\\%", "50"),
    ("$1,234.50", "1234.5"),
    ("-$5", "-5"),
    ("€ 3", "3"),
    ("1e3", "1000"),
    ("2.5E-1", "1/4"),
    ("007", "7"),
    ("３", "3"),
    ("12.", "12"),
    ("x  +\n1", "x + 1"),
    (" Paris ", "Paris"),
]
OTHERS = [("50%", "0.5"), ("1,00", "100"), ("1", "1.0001"), ("Paris", "paris"), ("1/0", "0"), ("", "0"), ("-", "0")]
OTHERS += [
    ("1e999999999", "1"),
    ("1" * 5000, "1"),
    ("1.2.3", "1.2"),
    ("12 13", "1213"),
    ("1" * 4299 + "e999", "1"),
    ("1,2", "12"),
    ("--1", "1"),
    ("½x", "0.5"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_the_same_answer_however_it_is_written(one, other):
    assert same_answer(one) == same_answer(other)


@pytest.mark.parametrize(("one", "other"), OTHERS)
def test_other_answers(one, other):
    assert same_answer(one) != same_answer(other)


READ = {
    "last_number": [
        ("5 + 7 = 12", "12", 1),
        ("12 of 13", "12", 0),
        ("so 3-5", "5", 1),  # no sign between two numbers
        ("so -5", "-5", 1),
        ("it is −5.", "-5", 1),
        ("= $1,000.", "1000", 1),
        ("about 3/4 of it", "0.75", 1),
        ("nothing", "1", 0),
        ("", "1", 0),
        ("\ud800 7", "7", 1),
    ],
    "boxed": [
        (r"\boxed{1} and \boxed{\frac{1}{2}}", "0.5", 1),
        (r"\boxed{\text{a}\{b\}} 7", r"\text{a}\{b\}", 1),
        (r"\boxed{7", "7", 0),
        ("7", "7", 0),
        ("", "7", 0),
    ],
    "tags": [
        ("<answer>1</answer> <answer> 2\n</answer>", "2", 1),
        ("<answer><answer>Rome</answer>", "Rome", 1),
        ("<answer>2", "2", 0),
        ("</answer>2<answer>", "2", 0),
    ],
    "all": [(" 2.0\n", "2", 1), ("it is 2", "2", 0)],
}


@pytest.mark.parametrize("read", READ)
def test_where_an_answer_stands(read):
    for text, answer, right in READ[read]:
        assert value(exact(read=read), text, answer) == right, text


def test_a_pattern_reads_its_last_match():
    feature = exact(pattern=r"####\s*(\S+)")
    assert value(feature, "#### 1 #### 1,000", 1000) == 1
    assert value(feature, "1000", 1000) == 0
    assert value(exact(pattern="(a)|b"), "ab", "a") == 0  # a last match without the group names nothing


def test_what_was_cut_off_names_no_answer_unless_its_end_is_marked():
    for read, text in (("last_number", "12"), ("all", "12")):
        assert value(exact(read=read), text, "12", finished=False) == 0
    for read, text in (("boxed", r"\boxed{12} and"), ("tags", "<answer>12</answer> and")):
        assert value(exact(read=read), text, "12", finished=False) == 1
    assert value(mathematics(), "12", "12", finished=False) == 0


def test_gold_of_gsm8k_of_numbers_and_where_there_is_none():
    feature = exact()
    assert value(feature, "12", "3 * 4 = <<3*4=12>>12\n#### 12") == 1
    assert value(feature, "12", 12.0) == value(feature, "12", 12) == 1
    assert value(feature, "12", None) == value(mathematics(), "12", None) == -1  # does not apply
    assert feature.read_answers(batch_of(["12.0", "x"], ["12", "12"])) == ["12", None]


FAULTS = [
    ({}, "there is no column 'answer', only prompts"),
    ({"gold": "1"}, "there is no column 'answer', only gold"),
    ({"answer": True}, "answer is True, not a text or a number"),
    ({"answer": ["1"]}, r"answer is \['1'\], not a text or a number"),
    ({"answer": " "}, "not a text or a number"),
    ({"answer": "thinking ####"}, "not a text or a number"),
]


@pytest.mark.parametrize("make", [exact, mathematics])
@pytest.mark.parametrize(("columns", "fault"), FAULTS)
def test_data_without_answers_are_refused_at_the_start(make, columns, fault):
    with pytest.raises(UserError, match=f"feature '.*': contexts.train, prompt 2: .*{fault}"):
        rows = ({"answer": "1"}, columns)
        check_columns([make()], [Context(n, "a", (1,), row) for n, row in enumerate(rows)], "contexts.train")


def test_a_text_that_no_last_number_equals_is_refused_at_the_start():
    assert (
        exact().check({"answer": "Paris"})
        == "answer is 'Paris', which no last number equals; read another part of completions"
    )
    assert exact(read="all").check({"answer": "Paris"}) is exact().check({"answer": None}) is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"pattern": "(a"}, "is not a regular expression"), ({"pattern": "a"}, r"has no group \(…\) around the answer")],
)
def test_patterns_that_read_nothing_are_refused(keys, message):
    with pytest.raises(UserError, match=f"^feature exact_answer: pattern '.*' {message}"):
        exact(**keys)
    with pytest.raises(ValueError, match="read: boxed has no effect beside pattern"):
        ExactAnswerFeature(kind="exact_answer", read="boxed", pattern="(a)")


def test_a_pattern_gone_exponential_ends_in_one_line():
    started = time.monotonic()
    with pytest.raises(RunError, match="'exact_answer' did not return within its timeout of 0.5 s"):
        value(exact(pattern=r"((?:a|a)*)$", timeout=0.5), "a" * 50 + "b", "a")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("read", READ)
def test_long_texts_are_read_in_time(read):
    feature = exact(read=read, timeout=5.0)
    parts = ["1,", "1,000", "1/", "-", "\\boxed{", "{", "<answer>", "</answer>", "$", "1e", "\\frac{1}", "￥"]
    for part in [*parts, " "]:
        feature(batch_of([part * 20_000], ["1"]))
        as_number(part * 20_000)


# --- math-verify, in processes of its own ---

EQUAL = [
    (r"The answer is $\frac{1}{2}$.", "1/2"),
    ("so 0.5", r"\frac{1}{2}"),
    (r"\boxed{x+1}", "1+x"),
    (r"$\sqrt{8}$", r"2\sqrt{2}"),
    (r"1 or 2, no: \boxed{(1, 2)} with 7", "(1,2)"),
    ("3,000 dollars", 3000),
    ("the answer is −5", "−5"),
    ("12", "3 * 4 = 12\n#### 12"),
    (r"\boxed{\{1,2\}}", r"$\{2,1\}$"),
]
WRONG = ["", "2", "(((((((", "\ud800", "$" * 3000, "${" * 3000, "( " * 3000, r"\boxed{", "\\frac" * 1000]
BOMBS = ["9**9**9", "$9^{9^{9^9}}$", "1 " * 100_000]


def test_equal_mathematics():
    texts, answers = zip(*EQUAL, strict=True)
    feature = mathematics()
    assert feature(batch_of(texts, answers)).tolist() == [1] * len(EQUAL)
    assert feature(batch_of(WRONG, ["1"] * len(WRONG))).tolist() == [0] * len(WRONG)
    named = ["so 0.50", r"\boxed{\frac{1}{2}}", "1,000", "", r"\boxed{x+1}"]
    assert feature.read_answers(batch_of(named, ["1"] * 5)) == ["0.5", "0.5", "1000", None, "x + 1"]


def test_what_would_not_end_is_wrong_and_the_rest_goes_on():
    feature = mathematics()
    texts = [text for bomb in BOMBS for text in (bomb, "12")]
    assert feature(batch_of(texts, ["12"] * len(texts))).tolist() == [0, 1] * len(BOMBS)


def test_gold_that_is_no_mathematics_ends_the_call():
    with pytest.raises(RunError, match="'math' raised ValueError: '.*' of the data cannot be read as mathematics"):
        value(mathematics(), "1", "$")


def test_a_process_that_ended_while_idle_is_replaced():
    feature = mathematics()
    batch = batch_of(["1"] * 8, ["1"] * 8)
    assert feature(batch).tolist() == [1] * 8
    idle = inspect.getclosurevars(feature.score).nonlocals["equal"]._idle
    assert 1 <= len(idle) <= PROCESSES
    for process in idle:
        process.kill()
        process.wait()
    assert feature(batch).tolist() == [1] * 8


def test_a_library_that_does_not_work_ends_the_call(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr("fdpg_fast.features.apart._COMMAND", [sys.executable, "-S", apart._COMMAND[-1]])  # no packages
    with pytest.raises(RunError, match=r"'math' raised RuntimeError: .*checkers.py math ended with status 1"):
        value(mathematics(), "1", "1")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'^feature math needs math_verify: pip install "fdpg-fast\[verifiers\]"$'):
        mathematics()


def test_a_run_by_answers_ends_resumes_and_has_majorities(tiny_model, tmp_path):
    rows = [{"prompt": prompt, "answer": str(n)} for n, prompt in enumerate(runs.PROMPTS)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(runs.json.dumps, rows)))
    target = [
        {"kind": "rlhf", "beta": 1.0, "feature": {"kind": "math"}},
        {"kind": "rlhf", "beta": 1.0, "feature": {"kind": "exact_answer", "pattern": "([0-9])"}},
    ]
    run_dir = runs.train(tiny_model, tmp_path, target=target, contexts={"train": str(tmp_path / "data.jsonl")})
    metrics = runs.rows(run_dir / "evaluation.jsonl")[0]
    assert any(name.startswith("majority@") for name in str(metrics).replace("'", " ").split())
