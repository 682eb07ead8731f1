"""The tiny arithmetic model of examples/: its verifiers, the problems that it learned from, and how good it is."""

import itertools
import json

import pytest
import torch

from fdpg_fast.contexts import Prompting, load_contexts
from fdpg_fast.engines import TransformersEngine
from fdpg_fast.features import Completions
from fdpg_fast.imports import import_object
from fdpg_fast.measure.pass_at_k import pass_at_k
from fdpg_fast.models.load import load_model, load_tokenizer
from support import runs
from support.examples import EXAMPLES, load_example

FOLDER = EXAMPLES / "tiny-arithmetic"


@pytest.fixture(scope="module")
def features():
    return load_example("tiny-arithmetic/features")


@pytest.fixture(scope="module")
def problems():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)  # its programs import each other, as they do when they are run
        yield load_example("tiny-arithmetic/problems")


@pytest.mark.parametrize(
    ("same", "value", "form"),
    [
        (["2*(3+4)-1", "(4+3)*2-1", "((2)*((3+4)))-1"], 13, "+(+3+4)*2-1"),
        (["4*3+2-1", "2-(1-3*4)", "4*3-(1-2)"], 13, "+2+3*4-1"),
        (["3*(4+(2-1))*1", "1*((2-1+4)*3)"], 15, "+(+2+4-1)*1*3"),
        (["(1-3)*(2-4)", "(2-4)*(1-3)"], 4, "+(+1-3)*(+2-4)"),
        (["(3-1)*(4-2)"], 4, "+(+3-1)*(+4-2)"),
    ],
)
def test_an_expression_has_one_form_in_any_order_and_brackets(features, same, value, form):
    numbers = sorted(int(symbol) for symbol in same[0] if symbol.isdigit())
    for text in same:
        assert features.countdown_form(text, numbers, value) == form


@pytest.mark.parametrize(
    "text",
    [
        "",
        "10",
        "1+2+3",  # a number is left
        "1+2+3+4+4",  # one too many
        "1+2+3+5",
        "1+2+34",
        "4+3+2+1 ",
        "4 + 3 + 2 + 1",
        "+4+3+2+1",
        "4+3+2--1",
        "(4+3+2+1",
        "4+3+2+1)",
        "()4+3+2+1",
        "4+3+2+1=10",
        "(4)(3)+2-1",
        "4+3+2+1#",
        "4+3+2+1\n",
        "4+3+2+¹",
        "4+3+2+١",
        "20/2*1+4-4",
        "2**3+4-1",
        "__import__('os')",
        "4+3+2*1",  # 9
        "(" * 30 + "4+3+2+1" + ")" * 30,
        "(" * 100_000,
        "4+3+2+1" + "+0" * 50,
    ],
)
def test_what_is_no_expression_of_the_numbers_is_refused(features, text):
    assert features.countdown_form(text, [1, 2, 3, 4], 10) is None
    assert features.countdown_form("4+(3+2)+1", [1, 2, 3, 4], 10) == "+1+2+3+4"


def test_numbers_count_as_often_as_they_are_given(features):
    assert features.countdown_form("3+3*2", [2, 3, 3], 9) == "+2*3+3"
    assert features.countdown_form("3+2*3", [2, 3, 3], 9) == "+2*3+3"
    assert features.countdown_form("3+2*2", [2, 3, 3], 7) is None


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ("+5=12 *2=24", True),
        ("*2=14 +5=19 +5=24", True),
        ("", False),
        ("+5=12", False),  # not there
        ("+5=12 *2=25", False),
        ("+5=12 *2=24 +5=29", False),  # past it
        ("+5=12 *2=24 -3=21 ", False),
        ("+5=12  *2=24", False),
        ("+5=12,*2=24", False),
        ("+5=12 *2=24\n", False),
        ("+5=012 *2=24", False),
        ("+5=12 +12=24", False),  # no move of the problem
        ("+5=12 *3=36", False),
        ("+5=12 -3=9 +5=14 -3=11 -3=8 *3=24", False),  # and too long
        ("*2=14 *2=28 -3=25 -3=22 +5=27 -3=24", False),  # six moves
        ("*2=14 -3=11 -3=8 -3=5 -3=2 *2=4", False),
        ("+5=12 -3=9 -3=6 +5=11 +5=16", False),
        ("-3=4 -3=1 -3=-2", False),
        ("*2=14 *2=28 *2=56 *2=112", False),
        ("+5=١٢ *2=24", False),
        ("+5=12 " * 100_000, False),
    ],
)
def test_chains(features, text, is_right):
    assert features.chain_form(text, 7, 24, ["+5", "-3", "*2"]) == (text if is_right else None)


def test_a_chain_comes_nowhere_twice_and_stays_in_range(features):
    assert features.chain_form("+4=9 -2=7 -2=5 +4=9", 5, 9, ["+4", "-2", "*2"]) is None  # start and goal twice
    assert features.chain_form("+4=9 +4=13", 5, 13, ["+4", "-4", "*2"]) is not None
    assert features.chain_form("+4=9 -4=5 +4=9 +4=13", 5, 13, ["+4", "-4", "*2"]) is None
    assert features.chain_form("*3=60 *3=180 -9=171", 20, 171, ["+4", "-9", "*3"]) is None


def test_a_completion_that_has_not_ended_is_wrong(features):
    expressions = {"completions": ["4+3", "4+3"], "numbers": [[3, 4]] * 2, "target": [7, 7]}
    assert features.countdown.score(finished=[True, False], **expressions) == [True, False]
    chains = {"completions": ["+4=7", "+4=7"], "start": [3, 3], "goal": [7, 7], "moves": [["+4"]] * 2}
    assert features.chain.score(finished=[False, True], **chains) == [False, True]


@pytest.mark.parametrize("task", ["countdown", "chain"])
def test_problems_come_from_a_seed_and_are_solved_by_their_derivation(features, problems, task):
    def draw(held_out, seed, count=200):
        return list(itertools.islice(problems.problems(task, held_out, seed), count))

    drawn, held_out = draw(False, 1), draw(True, 1, 50)
    assert drawn == draw(False, 1) != draw(False, 2)
    assert not {problem.prompt for problem in drawn} & {problem.prompt for problem in held_out}
    form = getattr(features, f"{task}_form")
    for problem in drawn[:40]:
        derivations = problems.DERIVATIONS[task](**problem.columns)
        assert form(problem.derivation, **problem.columns) in derivations


@pytest.mark.parametrize("task", ["countdown", "chain"])
def test_prompts_are_held_out_and_have_several_derivations(problems, task):
    rows = {
        split: [json.loads(line) for line in (FOLDER / "prompts" / f"{task}-{split}.jsonl").open()]
        for split in ("train", "eval")
    }
    assert [len(rows["train"]), len(rows["eval"])] == [256, 128]
    prompts = [row["prompt"] for row in rows["train"] + rows["eval"]]
    assert len(set(prompts)) == len(prompts) and all(map(problems.is_held_out, prompts))
    for row in rows["eval"][:10]:
        columns = {name: value for name, value in row.items() if name not in ("prompt", "derivations")}
        derivations = problems.DERIVATIONS[task](**columns)
        assert len(derivations) == row["derivations"] > 1 and problems.is_asked(task, derivations)


@pytest.mark.parametrize("task", ["countdown", "chain"])
def test_the_configs_would_run(task, monkeypatch, capsys):
    monkeypatch.chdir(EXAMPLES.parent)
    assert runs.call("train", FOLDER / f"{task}.yaml", "--dry-run") == 0
    assert "nothing was done yet" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["countdown", "chain"])
def test_the_base_model_solves_some_at_once_and_most_in_many_tries(task):
    model, tokenizer = load_model(str(FOLDER), "float32", "cpu", False), load_tokenizer(str(FOLDER), False)
    contexts = load_contexts(str(FOLDER / f"prompts/{task}-eval.jsonl"), Prompting(tokenizer, 32, len(tokenizer)))[:32]
    engine = TransformersEngine(model, [tokenizer.eos_token_id], max_new_tokens=32)
    rollouts = engine.sample(contexts, 32, seed=1)
    solved = import_object(f"{FOLDER}/features.py:{task}")(Completions.decode(rollouts, tokenizer))
    curve = pass_at_k(solved, rollouts.context_index)
    low, high = curve[1].interval
    assert low > 0.05 and high < 0.5 and 0.1 < curve[1].value < 0.4
    assert curve[32].value > 2 * curve[1].value


def test_equal_seeds_learn_equal_weights(problems):
    train = load_example("tiny-arithmetic/train")
    weights = []
    for _ in range(2):
        torch.manual_seed(train.SEED)
        model = train.make_model(32, 1)
        train.train(model, train.make_tokenizer(), 2)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)
    tokenizer = train.make_tokenizer()
    assert tokenizer.decode(tokenizer("46=3,7:(3+7) *4-5>1")["input_ids"][1:]) == "46=3,7:(3+7) *4-5>1"
