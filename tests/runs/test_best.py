"""Evaluations between the rounds: they change nothing, and decide which checkpoints stay and where a run ends."""

import math
import shutil
from pathlib import Path

import pytest

from fdpg_fast.measure.estimators import Estimate
from fdpg_fast.runs.best import best_rounds, early_end
from support import runs
from support.runs import Moment

FEATURE = "feature/letters"


def evaluations(*values, ess: float = 1000.0, per_context: float = 1000.0) -> dict[int, dict[str, Estimate]]:
    """Every tenth round's, of a metric of that many effective samples, unless a value comes with its own."""
    pairs = [value if isinstance(value, tuple) else (value, per_context) for value in values]
    metric = "divergence/forward_kl"
    return {10 * i: {metric: Estimate(value, 0.1, ess, each)} for i, (value, each) in enumerate(pairs)}


@pytest.mark.parametrize(
    ("metric", "found", "expected"),
    [
        ("max divergence/forward_kl", evaluations(0.2, 0.9, 0.4), [10, 20, 0]),
        ("min divergence/forward_kl", evaluations(0.2, 0.9, 0.4), [0, 20, 10]),
        ("max divergence/forward_kl", evaluations(0.2, 0.9, 0.9, 0.2), [10, 20, 0, 30]),  # equals in their order
        ("min divergence/forward_kl", evaluations(0.9, 0.2, 0.2, 0.9), [10, 20, 0, 30]),
        ("max divergence/forward_kl", evaluations(math.nan, math.inf, 0.4, -math.inf), [20]),
        ("min divergence/forward_kl", evaluations(math.nan, math.inf, 0.4, -math.inf), [20]),
        ("min divergence/forward_kl", evaluations(0.9, (0.1, 3.0), 0.8, (0.2, 3.0)), [20, 0, 10, 30]),  # ? comes last
        ("max feature/none", evaluations(0.1, 0.2), []),
    ],
)
def test_the_order_of_evaluations(metric, found, expected):
    assert best_rounds(metric, found) == expected


@pytest.mark.parametrize(
    ("found", "patience", "ends"),
    [
        (evaluations(0.5, 0.6, 0.7), 1, False),
        (evaluations(0.5, 0.6, 0.6), 1, True),  # no better is no better
        (evaluations(0.5, 0.6, 0.1, 0.2), 3, False),
        (evaluations(0.5, 0.6, 0.1, 0.2), 2, True),
        (evaluations(0.5, 0.4, 0.3), 2, True),  # not even better than before training
        (evaluations(0.5, math.nan, math.nan), 2, True),
        (evaluations(math.nan, math.nan), 2, False),
        (evaluations(math.nan, math.nan, math.nan), 2, True),
        (evaluations(0.5, math.nan, 0.7), 2, False),
        (evaluations(0.5, 0.4, 0.3, 0.2, 0.1), 1, False),  # it has reached its last round
        ({}, 1, False),
    ],
)
def test_when_a_run_ends_early(found, patience, ends):
    section = {"metric": "max divergence/forward_kl", "patience": patience}
    assert (early_end(section, found, 40) is not None) == ends
    assert early_end(None, found, 40) is None


# what must not notice: features that draw from all generators, samples ahead, older weights in the engine, an adapter
SECTIONS = {
    "draws": {},
    "a round ahead": {"trainer": {"pipeline_depth": 1}},
    "adaptive proposal": {"proposal": {"kind": "adaptive", "every": 2}},
    "LoRA": {"lora": {"rank": 2}},
    "a base that moves": {"base": {"refresh_every": 2}, "target": [runs.LETTERS]},
    "updates": {"trainer": {"updates_per_round": 2}},
}


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A folder for a file of features, which a process imports once."""
    return tmp_path_factory.mktemp("here")


@pytest.mark.parametrize("name", SECTIONS)
def test_training_knows_nothing_of_evaluations(name, tiny_model, here, tmp_path):
    def trained(run_dir: str, rounds: int, **sections) -> Path:
        config = runs.drawing(tiny_model, here, tmp_path / run_dir, optimizer={"schedule": "constant"})
        config = runs.merged(config, {"trainer": {"rounds": rounds, "checkpoint_every": 1}})
        config = runs.merged(runs.merged(config, SECTIONS[name]), sections)
        if len(config["target"]) == 1:
            del config["target_fit_samples"]
        assert runs.call("train", runs.write_config(tmp_path, config)) == 0
        return tmp_path / run_dir

    without, watched = trained("without", 3), trained("watched", 3, evaluation={"every": 1})
    shorter = trained("shorter", 2)
    ours, expected = runs.record(watched), runs.record(without)
    evaluated = {run_dir: runs.rows(run_dir / "evaluation.jsonl") for run_dir in (without, watched, shorter)}
    assert [row["round"] for row in evaluated[watched]] == [0, 1, 2, 3]
    assert evaluated[watched][::3] == evaluated[without]
    assert evaluated[watched][2] == evaluated[shorter][1]
    for record in (ours, expected):
        record.pop("evaluation.jsonl"), record.pop("samples.jsonl")
    runs.assert_equal(ours, expected)


def config(model: Path, folder: Path, run_dir: str, **sections) -> dict:
    """Evaluations after rounds 2, 4, 6 and 8, regular checkpoints after 3, 6 and 8."""
    settings = runs.drawing(model, folder, folder / run_dir, trainer={"rounds": 8, "checkpoint_every": 3})
    settings = runs.merged(settings, {"evaluation": {"every": 2}, "checkpoint": {"best": "min feature/noisy"}})
    return runs.merged(settings, sections)


@pytest.fixture(scope="module")
def uninterrupted(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    ended = runs.run(folder, "train", runs.write_config(folder, config(tiny_model, folder, "run")))
    assert ended.status == 0, ended.stderr
    return folder / "run"


def best_of(run_dir: Path, sign: int = 1) -> list[int]:
    """The rounds of the evaluations after training began, from the best one on."""
    found = {row["round"]: row["metrics"]["feature/noisy"]["value"] for row in runs.rows(run_dir / "evaluation.jsonl")}
    return sorted((done for done in found if done), key=lambda done: sign * found[done])


def kept(run_dir: Path) -> list[int]:
    return sorted(int(path.name[6:]) for path in (run_dir / "checkpoints").iterdir())


def test_the_best_checkpoint_stays(uninterrupted, tiny_model, here, tmp_path, capsys):
    best, *others = best_of(uninterrupted)
    assert set(kept(uninterrupted)) == {6, 8, best}
    assert others and best < 6  # or the newest would be the best
    assert runs.call("evaluate", uninterrupted, "--checkpoint", "best") == 0
    assert f"round {best}" in capsys.readouterr().out
    assert runs.call("sample", uninterrupted, "--count", "2", "--checkpoint=best") == 0
    settings = config(tiny_model, here, "three", checkpoint={"keep_best": 3})
    assert runs.call("train", runs.write_config(tmp_path, settings)) == 0
    assert set(kept(here / "three")) == {6, 8, *best_of(here / "three")[:3]}


def test_the_best_one_is_not_there(uninterrupted, tmp_path, capsys):
    run_dir = shutil.copytree(uninterrupted, tmp_path / "run")
    damaged = run_dir / f"checkpoints/round-{best_of(run_dir)[0]:06d}"
    (damaged / "model.safetensors").unlink()
    assert runs.call("evaluate", run_dir, "--checkpoint", "best") == 2
    assert capsys.readouterr().err.endswith("; delete that folder to take the next best one\n")
    shutil.rmtree(damaged)
    assert runs.call("sample", run_dir, "--checkpoint", "best", "--count", "1") == 0
    (run_dir / "evaluation.jsonl").unlink()
    assert runs.call("sample", run_dir, "--checkpoint", "best") == 2
    assert "no checkpoint yet whose feature/noisy is known" in capsys.readouterr().err
    assert runs.call("sample", run_dir, "--checkpoint", "worst") == 2
    assert capsys.readouterr().err.count("\n") == 1


# features are called once for λ and once to check it; evaluations open their file and, but for the last, save a
# checkpoint if they are best ones
MOMENTS = {
    "in an evaluation": Moment("feature", "", 8),
    "before the line of one at a checkpoint's round": Moment("open", "evaluation.jsonl", 5),
    "before its checkpoint's rename": Moment("os.rename", ".writing-round-000002"),
    "in the round after an evaluation at a checkpoint": Moment("open", "metrics.jsonl", 7),
}


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS.keys())
def test_a_run_that_was_killed_evaluates_as_one_that_was_not(moment, uninterrupted, tiny_model, tmp_path):
    path = runs.write_config(tmp_path, config(tiny_model, tmp_path, "run"))
    assert runs.run(tmp_path, "train", path, at=moment).status == -9
    resumed = runs.run(tmp_path, "train", "--resume", "run")
    assert resumed.status == 0, resumed.stderr
    runs.assert_equal(runs.record(tmp_path / "run"), runs.record(uninterrupted))


def test_an_evaluation_that_is_there_is_not_made_again(uninterrupted, tmp_path):
    run_dir = shutil.copytree(uninterrupted, tmp_path / "run")
    last = run_dir / "evaluation.jsonl"
    marked = last.read_text().replace('"num_samples": 9', '"num_samples": 8')
    assert marked != last.read_text()
    last.write_text(marked)
    assert runs.call("train", "--resume", run_dir) == 0
    assert last.read_text() == marked


STOPS = {"early_stop": {"metric": "min kl_to_base", "patience": 2}, "evaluation": {"every": 1}}  # the base is at 0


def test_a_run_ends_early_and_says_so(tiny_model, tmp_path, capsys):
    path = runs.write_config(tmp_path, runs.settings(tiny_model, tmp_path / "run", trainer={"rounds": 6}, **STOPS))
    capsys.readouterr()
    assert runs.call("train", path, "--trainer.checkpoint_every=5") == 0
    said = capsys.readouterr().err
    assert "stopped early, after 2 of 6 rounds: KL to base (nats) was 0" in said and "in 2 evaluations since" in said
    assert kept(tmp_path / "run") == [2] and len(runs.rows(tmp_path / "run/metrics.jsonl")) == 2
    assert "The run stopped early, after 2 of 6 rounds" in (tmp_path / "run/report.html").read_text()

    before = runs.record(tmp_path / "run")
    assert runs.call("train", "--resume", tmp_path / "run") == 0
    assert "stopped early, after 2 of 6 rounds" in capsys.readouterr().err
    runs.assert_equal(runs.record(tmp_path / "run"), before)

    assert runs.call("train", "--resume", tmp_path / "run", "--early_stop.patience=4") == 0
    assert "stopped early, after 4 of 6 rounds" in capsys.readouterr().err
    assert runs.call("train", "--resume", tmp_path / "run", "--early_stop=null") == 0
    assert "stopped early" not in capsys.readouterr().err
    plain = runs.settings(tiny_model, tmp_path / "plain", trainer={"rounds": 6}, evaluation={"every": 1})
    assert runs.call("train", runs.write_config(tmp_path, plain)) == 0
    record = [runs.record(tmp_path / name) for name in ("run", "plain")]
    for each in record:  # the first has a checkpoint of where it ended
        each["checkpoints"] = [name for name in each if "round-000006" in name]
    assert [record[0][key] for key in ("metrics", "evaluation.jsonl", "samples.jsonl", "checkpoints")] == [
        record[1][key] for key in ("metrics", "evaluation.jsonl", "samples.jsonl", "checkpoints")
    ]


def test_evaluations_in_lines_and_in_the_report(uninterrupted, tiny_model, tmp_path, capsys):
    page = (uninterrupted / "report.html").read_text()
    assert "<h2>Evaluations</h2>" in page and page.count("E[noisy]</figcaption>") == 1
    plain = runs.settings(tiny_model, tmp_path / "run", evaluation={"every": 1})
    assert runs.call("train", runs.write_config(tmp_path, plain)) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "evaluated:" in line]
    assert line.startswith("round 1/2  evaluated:  E[letters] ") and " ± " in line and "Jensen–Shannon" in line
    without = runs.train(tiny_model, tmp_path, "without")
    assert "<h2>Evaluations</h2>" not in (without / "report.html").read_text()


def test_a_metric_that_depends_on_values_is_refused_when_they_are_there(tiny_model, tmp_path, capsys):
    (tmp_path / "reward.py").write_text("def long(completions):\n    return [len(text) / 7 for text in completions]\n")
    target = [{"kind": "rlhf", "beta": 1.0, "feature": runs.imported(tmp_path / "reward.py", "long")["feature"]}]
    sections = {"target": target, "evaluation": {"every": 1}, "checkpoint": {"best": "max pass@2/long"}}
    path = runs.write_config(tmp_path, runs.settings(tiny_model, tmp_path / "run", **sections))
    assert runs.call("train", path, "--dry-run") == 0  # the reward may be 0 or 1
    capsys.readouterr()
    assert runs.call("train", path) == 2
    assert "checkpoint.best: no evaluation measures 'pass@2/long'; there are " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_names_are_those_of_an_evaluation(tiny_model, tmp_path, capsys):
    path = runs.write_config(tmp_path, runs.settings(tiny_model, tmp_path / "run", evaluation={"every": 1}))
    assert runs.call("train", path, "--checkpoint.best=max x") == 2
    named = capsys.readouterr().err.strip().partition("there are ")[2].split(", ")
    assert runs.call("train", path, "--checkpoint.best=max target_samples/forward_kl") == 0
    assert named == list(runs.rows(tmp_path / "run/evaluation.jsonl")[0]["metrics"])


BEST, STOP = "max feature/letters", {"metric": "max feature/letters", "patience": 2}
REFUSED = {
    "no such metric": (
        {"checkpoint": {"best": "max feature/leters"}, "evaluation": {"every": 1}},
        "checkpoint.best: no evaluation measures 'feature/leters'; there are feature/letters, ",
    ),
    "no such metric to stop by": (
        {"early_stop": STOP | {"metric": "min length/x"}, "evaluation": {"every": 1}},
        "early_stop.metric: no evaluation measures 'length/x'; there are feature/letters, ",
    ),
    "no direction": ({"checkpoint": {"best": FEATURE}}, "checkpoint.best: 'feature/letters': write max NAME or min"),
    "best, but no evaluations": ({"checkpoint": {"best": BEST}}, "has an effect only with evaluation.every"),
    "end, but no evaluations": ({"early_stop": STOP}, "early_stop needs evaluation.every"),
    "how many of none": ({"checkpoint": {"keep_best": 2}}, "has an effect only with checkpoint.best"),
    "no patience": ({"early_stop": {"metric": BEST}}, "early_stop.patience: this key is required"),
}


@pytest.mark.parametrize(("sections", "complaint"), REFUSED.values(), ids=REFUSED.keys())
def test_what_has_no_effect_is_refused(sections, complaint, tiny_model, tmp_path, capsys):
    path = runs.write_config(tmp_path, runs.settings(tiny_model, tmp_path / "run", **sections))
    assert runs.call("train", path, "--dry-run") == runs.call("train", path) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and said[0] == said[1] and complaint in said[0]
    assert not (tmp_path / "run").exists()
