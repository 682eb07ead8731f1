"""Problems of reasoning-gym: none is in both parts, each is scored by its own data set, and no answer is executed."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import yaml
from reasoning_gym.factory import DATASETS, create_dataset

from fdpg_fast.config.load import parse_config
from fdpg_fast.errors import RunError, UserError
from fdpg_fast.features import Completions, solved
from fdpg_fast.features.solved import ReasoningGymFeature
from fdpg_fast.puzzles import Puzzles, PuzzlesConfig
from support import runs

SMALL = {"dataset": "chain_sum", "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}


def rows(held_out=False, **keys):
    return [row for _, row in Puzzles(PuzzlesConfig(**{**SMALL, "size": 20, "eval_size": 5, **keys}), held_out).rows()]


def test_problems_are_different_made_again_and_held_out():
    train, held_out = rows(), rows(held_out=True)
    assert (len(train), len(held_out)) == (20, 5)
    assert len({row["prompt"] for row in train + held_out}) == 25
    assert rows() == train and rows(seed=1) != train
    recipe, index, question = train[3]["reasoning_gym"]
    name, settings = json.loads(recipe)
    problem = create_dataset(name, **settings)[index]
    assert (problem["question"], problem["answer"]) == (question, train[3]["answer"])
    said = rows(template="Q: {question} {x}", chat=True)[0]["prompt"]
    assert said == [{"role": "user", "content": f"Q: {train[0]['prompt']} {{x}}"}]


REFUSED = [
    ({"dataset": "chain_sums"}, "dataset: there is no 'chain_sums'; there are chain_sum, "),
    ({"dataset": "?"}, "dataset: there is no"),
    ({"options": {"min_term": 2}}, r"chain_sum with \{'min_term': 2\}: .* unexpected keyword argument 'min_term'"),
    ({"options": {"min_terms": 3, "max_terms": 2}}, "max_terms must be >= min_terms"),
    ({"options": {"min_terms": "two"}}, "chain_sum with"),
    ({"options": {"seed": 3}}, "options: seed is a key of contexts.reasoning_gym itself"),
    ({"template": "x"}, "template: there is no {question}"),
    ({"size": 1000}, "chain_sum made 200 different problems of 2110; size and eval_size together want 1005"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED)
def test_problems_that_there_are_not_are_refused(keys, message):
    with pytest.raises(UserError, match=f"^contexts.reasoning_gym.*{message}") as refusal:
        rows(**keys)
    assert "\n" not in str(refusal.value)


def test_files_beside_it_are_refused():
    config = {"model": "m", "run_dir": "r", "target": [runs.LETTERS], "contexts": {"reasoning_gym": SMALL}}
    parse_config(config)
    for key in ("train", "eval"):
        with pytest.raises(UserError, match=f"^contexts: {key} has no effect beside reasoning_gym"):
            parse_config(runs.merged(config, {"contexts": {key: "data.jsonl"}}))


def by_own_scorer(**keys):
    return ReasoningGymFeature(kind="reasoning_gym", **keys).build("cpu")


def values(feature, row, *texts):
    count = len(texts)
    return feature(
        Completions(
            [*texts], [""] * count, [[]] * count, [True] * count, {"reasoning_gym": [row["reasoning_gym"]] * count}
        )
    ).tolist()


def test_answers_are_scored_by_their_data_set():
    row = rows()[0]
    right = row["answer"]
    texts = [
        f"<answer> {right}\n</answer>",
        f"<answer>{right}",
        right,
        "<answer></answer>",
        "",
        f"<answer>x{right}</answer>",
    ]
    assert values(by_own_scorer(), row, *texts) == [1, 0, 0, 0, 0, 0]
    assert values(by_own_scorer(read="last_number"), row, f"it is {right}") == [1]
    assert 0 < values(by_own_scorer(partial=True), row, f"<answer>x{right}</answer>")[0] < 1
    assert math.isnan(values(by_own_scorer(), {"reasoning_gym": None}, right)[0])  # of `sample --prompt`, say


def test_arithmetic_is_computed_and_nothing_is_executed(tmp_path):
    row = rows(dataset="countdown", options={}, size=1, eval_size=1)[0]
    crime = f"open({str(tmp_path / 'crime')!r}, 'w').write('done') or {row['answer']}"
    texts = [row["answer"], f"({row['answer']})", crime, "9**9**9**9", "1/0", "(1)(2)", "", "\ud800", "(" * 490]
    assert values(by_own_scorer(read="all"), row, *texts) == [1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert not (tmp_path / "crime").exists()


def test_scorers_that_execute_answers_are_refused_at_the_start():
    row = rows(dataset="binary_matrix", options={}, size=1, eval_size=1)[0]
    assert "the scorer of binary_matrix executes answers as Python" in by_own_scorer().check(row)
    assert by_own_scorer().check(rows()[0]) is None
    assert by_own_scorer().check({"reasoning_gym": None}) is None
    for damaged in (3, "xyz", ["x", 1, "q"], ['["chain_sum"]', "1", "q"]):
        assert "is not what contexts.reasoning_gym makes" in by_own_scorer().check({"reasoning_gym": damaged})
    refused = {name for name in DATASETS if solved._evaluates_answers(name)}
    integrals = {"simple_integration", "intermediate_integration", "polynomial_multiplication"}
    assert refused == integrals | {"binary_matrix", "spiral_matrix", "string_insertion", "n_queens", "composite"}


def test_other_questions_than_those_of_the_recipe_end_the_call():
    recipe, index, _ = rows()[0]["reasoning_gym"]
    with pytest.raises(RunError, match="this data set has other questions in another process"):
        values(by_own_scorer(), {"reasoning_gym": [recipe, index, "another"]}, "<answer>1</answer>")


def test_a_run_on_problems_ends_and_is_resumed_with_no_others(tiny_model, tmp_path, capsys):
    contexts = {"reasoning_gym": {**SMALL, "size": 8, "eval_size": 3, "template": "{question}"}}
    target = [{"kind": "rlhf", "beta": 1.0, "feature": {"kind": "reasoning_gym", "read": "last_number"}}]
    run_dir = runs.train(tiny_model, tmp_path, contexts=contexts, target=target)
    assert runs.call("train", "--resume", run_dir, "--trainer.rounds=3") == 0
    whole = runs.train(tiny_model, tmp_path, "whole", contexts=contexts, target=target, trainer={"rounds": 3})
    of_round = ("loss", "policy/kl_to_base", "target/ess")
    at_once, resumed = (runs.rows(folder / "metrics.jsonl")[2] for folder in (whole, run_dir))
    assert [resumed[name] for name in of_round] == [at_once[name] for name in of_round]
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(
        config.replace("dataset: chain_sum\n    size: 8", "dataset: chain_sum\n    size: 9")
    )
    capsys.readouterr()
    assert runs.call("train", "--resume", run_dir, "--trainer.rounds=4") == 2
    assert "contexts.reasoning_gym.size has changed from 8 to 9" in capsys.readouterr().err


def test_the_guides_config_runs(tiny_model, tmp_path):
    """But for the model, and for less of everything."""
    guide = (Path(__file__).parents[1] / "docs/guide.md").read_text(encoding="utf-8")
    chapter = guide.partition("## Verifiable rewards")[2]
    config = yaml.safe_load(re.search("```yaml\n(.*?)```", chapter, re.DOTALL)[1])
    config["contexts"]["system_prompt"] = "<answer>"
    config["contexts"]["reasoning_gym"] |= {"size": 4, "eval_size": 2}
    config["contexts"]["reasoning_gym"]["options"] |= {"max_terms": 2, "max_digits": 1}
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    settings = json.loads((path := folder / "tokenizer_config.json").read_text())
    written = "{% for message in messages %}{{ message['content'][-20:] }}{% endfor %}"
    path.write_text(json.dumps({**settings, "chat_template": written}))
    less = runs.settings(folder, tmp_path / "run")
    sections = {key: less[key] for key in ("model", "run_dir", "engine", "trainer", "evaluation")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(runs.merged(config, sections)))
    assert runs.call("train", tmp_path / "config.yaml") == 0
    assert "pass@2" in (tmp_path / "run/evaluation.jsonl").read_text()
