"""What f-DPG is compared with gets the same problems, the same verifier and, of the base, only correct samples."""

import pytest

from fdpg_fast.config.load import parse_config
from fdpg_fast.experiments.experiment import cases, find_folder, load_experiment
from fdpg_fast.imports import import_object

PROBLEM = {"start": 5, "goal": 17, "moves": ["+5", "-3", "*2"], "derivations": 9}
RIGHT = "+5=10 -3=7 +5=12 +5=17"


@pytest.fixture
def config(tmp_path):
    experiment = load_experiment(find_folder("pass-at-k"))
    case = next(case for case in cases(experiment, "quick") if case.labels["method"] == "base")
    settings = {key: value for key, value in case.settings.items() if key not in ("method", "forms", "base_samples")}
    settings["trainer"] = {"rounds": 2, "contexts_per_round": 4, "samples_per_context": 16}
    return parse_config(settings | {"run_dir": str(tmp_path / "run")})


def test_grpo_is_rewarded_by_the_verifier_for_what_has_ended(config):
    trainer = import_object("examples/experiments/pass-at-k/methods.py:grpo")(config)
    (reward,) = trainer.reward_funcs
    ids = [[11, 6, 0], [11, 6], [11, 6, 0]]
    columns = {name: [value] * 3 for name, value in PROBLEM.items()}
    assert reward(["5>17 +5 -3 *2:"] * 3, [RIGHT, RIGHT, "+5=10"], ids, **columns, trainer_state=None) == [1, 0, 0]
    assert trainer.args.per_device_train_batch_size == 64 and trainer.num_generations == 16
    assert trainer.max_completion_length == config.engine.max_new_tokens and trainer.args.max_steps == 2


def test_rejection_fine_tuning_learns_correct_samples_to_their_end(config):
    trainer = import_object("examples/experiments/pass-at-k/methods.py:rejection")(config)
    is_right = import_object("examples/tiny-arithmetic/features.py:chain_form")
    rows = list(trainer.train_dataset)
    assert len(rows) > 4
    for row in rows:
        first, *moves = row["prompt"].rstrip(":").split(" ")
        start, goal = map(int, first.split(">"))
        assert is_right(row["completion"].removesuffix("<|end|>"), start, goal, moves) is not None
        learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        assert len(learned) == len(row["completion"]) - len("<|end|>") + 1 and learned[-1] == 0
        assert len(row["input_ids"]) - len(learned) == 1 + len(row["prompt"])
