"""Metrics reach the trackers that were asked for."""

import math
import sys
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fdpg_fast.errors import RunError
from fdpg_fast.runs import folder
from support import runs

# what wandb and trackio have in common, as a module that writes down how it was called
RECORDER = """
calls = []
def init(**options): calls.append(("init", options))
def log(metrics, step): calls.append(("log", metrics, step))
def finish(): calls.append(("finish",))
"""


def config(model: Path, folder: Path, **sections) -> Path:
    sections.setdefault("target", [runs.LETTERS])
    return runs.write_config(folder, runs.settings(model, folder / "run", trainer={"rounds": 3}, **sections))


def logged(run_dir: Path) -> list[dict[str, float]]:
    """Rows of metrics.jsonl without what a tracker cannot draw."""
    rows = runs.rows(run_dir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if isinstance(value, float)} for row in rows]


def evaluations(run_dir: Path) -> list[dict[str, float]]:
    """The evaluations, as a tracker gets them."""
    found = []
    for row in runs.rows(run_dir / "evaluation.jsonl"):
        values = {name: metric["value"] for name, metric in row["metrics"].items()}
        values |= {f"{name}_se": metric["standard_error"] for name, metric in row["metrics"].items()}
        found.append({f"evaluation/{name}": value for name, value in values.items() if isinstance(value, (int, float))})
    return found


def test_tensorboard_holds_every_metric_of_every_round(tiny_model, tmp_path):
    assert runs.call("train", config(tiny_model, tmp_path, tracking=["tensorboard"])) == 0
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    rows = logged(tmp_path / "run")
    before, after = evaluations(tmp_path / "run")
    assert set(events.Tags()["scalars"]) == {key for row in (*rows, before, after) for key in row}
    for key in before:
        assert [event.step for event in events.Scalars(key)] == [0, 3]
        shown = [event.value for event in events.Scalars(key)]
        assert shown == pytest.approx([before[key], after[key]], rel=1e-6)
    for key in set(events.Tags()["scalars"]) - {*before, *after}:
        shown = {event.step: event.value for event in events.Scalars(key)}
        # event files hold float32
        assert shown == pytest.approx({i: row[key] for i, row in enumerate(rows) if key in row}, rel=1e-6)
    [shown] = events.Tensors("config/text_summary")[0].tensor_proto.string_val
    assert (tmp_path / "run/config.yaml").read_text() in shown.decode()


@pytest.fixture
def recorder(request, tmp_path, monkeypatch):
    """A stand-in for a tracker's package; its calls."""
    (tmp_path / f"{request.param}.py").write_text(RECORDER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, request.param, raising=False)
    yield request.param
    sys.modules.pop(request.param, None)


@pytest.mark.parametrize("recorder", ["wandb", "trackio"], indirect=True)
def test_tracker_gets_the_config_once_and_the_metrics_every_round(recorder, tiny_model, tmp_path):
    assert runs.call("train", config(tiny_model, tmp_path, tracking=[recorder])) == 0
    (first, options), before, *logs, after, last = sys.modules[recorder].calls
    assert first == "init" and last == ("finish",)
    assert [before, after] == [("log", evaluations(tmp_path / "run")[i], (0, 3)[i]) for i in (0, 1)]
    assert options["project"] == "fdpg-fast" and options["name"].endswith("-run")
    assert options["config"] == yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert logs == [("log", row, step) for step, row in enumerate(logged(tmp_path / "run"))]
    # what W&B writes stays inside the run
    assert (options.get("dir") == str(tmp_path / "run")) == (recorder == "wandb")


@pytest.mark.parametrize("recorder", ["wandb"], indirect=True)
def test_numbers_that_do_not_exist_are_left_out(recorder, tiny_model, tmp_path):
    never = {"kind": "pointwise", "feature": {"kind": "regex", "pattern": "(?!)"}}
    assert runs.call("train", config(tiny_model, tmp_path, tracking=[recorder], target=[never])) == 0
    assert [row["z/log_z"] for row in runs.rows(tmp_path / "run/metrics.jsonl")] == ["-inf"] * 3
    logs = [call[1] for call in sys.modules[recorder].calls if call[0] == "log"]
    assert len(logs) == 5
    for metrics in logs:
        assert "z/log_z" not in metrics and all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("recorder", ["wandb"], indirect=True)
def test_tracker_is_closed_when_the_run_fails(recorder, tiny_model, tmp_path):
    (tmp_path / "late.py").write_text(
        "left = [1.0, 1.0, 1.0]\ndef late(completions):\n    return [left.pop()] * len(completions)\n"
    )
    path = config(tiny_model, tmp_path, tracking=[recorder], target=[runs.imported(tmp_path / "late.py", "late")])
    assert runs.call("train", path) == 1
    assert [call[0] for call in sys.modules[recorder].calls] == ["init", "log", "log", "finish"]  # the base, one round


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_missing_tracker_is_named_before_anything_is_done(name, tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)  # as if it was not installed
    assert runs.call("train", config(tiny_model, tmp_path, tracking=[name])) == 2
    complaint = f'fdpg-fast: tracking: {name} is not installed; pip install "fdpg-fast[tracking]"\n'
    assert capsys.readouterr().err == complaint
    assert not (tmp_path / "run").exists()


def last_of(recorder: str) -> dict:
    return [call[1] for call in sys.modules[recorder].calls if call[0] == "init"][-1]


@pytest.mark.parametrize("recorder", ["wandb", "trackio"], indirect=True)
def test_what_the_environment_names_is_left_to_it(recorder, tiny_model, tmp_path, monkeypatch):
    names = {"PROJECT": "project", "NAME": "name"} | (
        {"RUN_ID": "id", "RESUME": "resume"} if recorder == "wandb" else {}
    )
    for variable in names:
        monkeypatch.setenv(f"{recorder.upper()}_{variable}", f"mine-{variable}")
    assert runs.call("train", config(tiny_model, tmp_path, tracking=[recorder])) == 0
    assert {key: last_of(recorder)[key] for key in names.values()} == {
        key: f"mine-{variable}" for variable, key in names.items()
    }
    for variable in names:
        monkeypatch.delenv(f"{recorder.upper()}_{variable}")
    assert runs.call("train", "--resume", tmp_path / "run", "--trainer.rounds=4") == 0  # the folder remembers
    assert last_of(recorder)["project"] == "mine-PROJECT" and last_of(recorder)["name"] == "mine-NAME"
    assert recorder == "trackio" or last_of(recorder)["id"] == "mine-RUN_ID"


@pytest.mark.parametrize("recorder", ["wandb", "trackio"], indirect=True)
def test_a_resumed_run_is_the_same_one_and_no_step_is_sent_twice(recorder, tiny_model, tmp_path, monkeypatch):
    path = config(tiny_model, tmp_path, tracking=[recorder], evaluation={"every": 1})
    monkeypatch.setattr(folder.RunFolder, "append", fails_at(folder.RunFolder.append, "metrics.jsonl", 3))
    assert runs.call("train", path, "--trainer.checkpoint_every=2") == 1
    (tmp_path / "run/checkpoints/round-000002").rename(tmp_path / "away")  # as if round 1 were repeated
    monkeypatch.undo()
    calls = sys.modules[recorder].calls
    first = last_of(recorder)
    assert runs.call("train", "--resume", tmp_path / "run") == 0
    again = last_of(recorder)
    assert again["resume"] == "allow" and {key: again[key] for key in ("project", "name")} == {
        key: first[key] for key in ("project", "name")
    }
    assert again.get("id") == first.get("id") and (recorder == "trackio" or first["id"])
    steps = [(call[2], any(key.startswith("evaluation/") for key in call[1])) for call in calls if call[0] == "log"]
    assert steps == [(0, True), (0, False), (1, True), (1, False), (2, True), (2, False), (3, True)]


def fails_at(original, name: str, call: int):
    calls = []

    def append(self, file, row):
        calls.append(file)
        if calls.count(name) == call:
            raise RunError("the disk is full")
        original(self, file, row)

    return append


def test_tensorboard_has_no_step_twice_after_a_resume(tiny_model, tmp_path):
    path = config(tiny_model, tmp_path, tracking=["tensorboard"], evaluation={"every": 1})
    killed = runs.Moment("open", "metrics.jsonl", 3)
    assert runs.run(tmp_path, "train", path, "--trainer.checkpoint_every=1", at=killed).status == -9
    for damaged in tmp_path.glob("run/checkpoints/round-000002"):
        damaged.rename(tmp_path / "away")
    assert runs.run(tmp_path, "train", "--resume", "run").status == 0
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [0, 1, 2]
    assert [event.step for event in events.Scalars("evaluation/kl_to_base")] == [0, 1, 2, 3]


BROKEN = {
    "init": "def init(**options): raise ConnectionError('no\\x1b[31m network')",
    "log": "def log(metrics, step): raise RuntimeError('the server said no')",
    "finish": "def finish(): raise OSError('gone')",
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("recorder", ["wandb"], indirect=True)
def test_a_tracker_that_fails_costs_a_warning_and_no_round(recorder, broken, tiny_model, tmp_path, capsys):
    (tmp_path / f"{recorder}.py").write_text(f"{RECORDER}\n{BROKEN[broken]}\n")
    path = config(tiny_model, tmp_path, tracking=[recorder, "tensorboard"])
    assert runs.call("train", path) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tracking: ")]
    assert len(said) == 1 and said[0].startswith("tracking: wandb failed and is left out: ") and "\x1b" not in said[0]
    assert len(runs.rows(tmp_path / "run/metrics.jsonl")) == 3
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()  # the other one goes on
    assert len(events.Scalars("loss")) == 3


def test_every_tracker_of_a_run_is_found_again(tiny_model, tmp_path, monkeypatch):
    for name in ("wandb", "trackio"):
        (tmp_path / f"{name}.py").write_text(RECORDER)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    stale = '{"wandb": {"id": "of-a-run-that-was-removed"}}'
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.tracking.json").write_text(stale)
    assert runs.call("train", config(tiny_model, tmp_path, tracking=["wandb", "trackio"])) == 0
    first = {name: last_of(name) for name in ("wandb", "trackio")}
    assert first["wandb"]["id"] != "of-a-run-that-was-removed" and "resume" not in first["trackio"]
    assert runs.call("train", "--resume", tmp_path / "run") == 0
    for name, options in first.items():
        assert last_of(name) == options | {"resume": "allow"}
        monkeypatch.delitem(sys.modules, name)
