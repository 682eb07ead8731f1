"""Metrics reach the trackers that were asked for."""

import math
import sys
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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


def test_tensorboard_holds_every_metric_of_every_round(tiny_model, tmp_path):
    assert runs.call("train", config(tiny_model, tmp_path, tracking=["tensorboard"])) == 0
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    rows = logged(tmp_path / "run")
    assert set(events.Tags()["scalars"]) == {key for row in rows for key in row}
    for key in events.Tags()["scalars"]:
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
    (first, options), *logs, last = sys.modules[recorder].calls
    assert first == "init" and last == ("finish",)
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
    assert len(logs) == 3
    for metrics in logs:
        assert "z/log_z" not in metrics and all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("recorder", ["wandb"], indirect=True)
def test_tracker_is_closed_when_the_run_fails(recorder, tiny_model, tmp_path):
    (tmp_path / "late.py").write_text(
        "left = [1.0, 1.0]\ndef late(completions):\n    return [left.pop()] * len(completions)\n"
    )
    path = config(tiny_model, tmp_path, tracking=[recorder], target=[runs.imported(tmp_path / "late.py", "late")])
    assert runs.call("train", path) == 1
    assert [call[0] for call in sys.modules[recorder].calls] == ["init", "log", "finish"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_missing_tracker_is_named_before_anything_is_done(name, tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)  # as if it was not installed
    assert runs.call("train", config(tiny_model, tmp_path, tracking=[name])) == 2
    complaint = f'fdpg-fast: tracking: {name} is not installed; pip install "fdpg-fast[tracking]"\n'
    assert capsys.readouterr().err == complaint
    assert not (tmp_path / "run").exists()
