"""Whose a file is: a process removes only what it made, and a new run refuses what another may have made."""

import os
import shutil
import threading
from pathlib import Path

import pytest

from fdpg_fast import Trainer
from fdpg_fast.config.load import parse_config
from fdpg_fast.errors import Diverged, RunError, UserError
from fdpg_fast.runs.checkpoint import checkpoints
from fdpg_fast.runs.folder import OURS, RunFolder
from support import runs

UNREACHABLE = [
    {"kind": "distributional", "features": [{"kind": "regex", "name": "any", "pattern": ""}], "moments": [0.5]}
]


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_a_folder_with_any_part_of_a_run_is_refused_and_left_alone(name, kind, tiny_model, tmp_path, capsys):
    theirs = tmp_path / "data" / name
    theirs.parent.mkdir()
    if kind == "folder":
        (theirs / "round-000006").mkdir(parents=True)
    elif kind == "file":
        theirs.write_text('{"prompt": "mine"}\n')
    else:
        theirs.symlink_to("nowhere")
    before = contents(tmp_path / "data")
    path = runs.write_config(tmp_path, runs.settings(tiny_model, tmp_path / "data"))
    capsys.readouterr()
    assert runs.call("train", path) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1 and complaint.startswith("fdpg-fast: run_dir: ") and "already holds" in complaint
    assert name in complaint or name == "config.yaml"
    assert contents(tmp_path / "data") == before and os.path.lexists(theirs)


@pytest.mark.parametrize("existed", [True, False], ids=["in a folder of theirs", "in a new one"])
def test_what_cannot_be_had_leaves_what_was_there(existed, tiny_model, tmp_path, capsys):
    folder = tmp_path / "data/deeper"
    if existed:
        folder.mkdir(parents=True)
        for name in (".lock", "contexts.txt", "metrics.csv"):
            (folder / name).write_text("mine\n")
    before = contents(tmp_path)
    path = runs.write_config(tmp_path, runs.settings(tiny_model, folder, target=UNREACHABLE, target_fit_samples=64))
    assert runs.call("train", path) == 2
    path.unlink()
    assert contents(tmp_path) == before


def test_nothing_is_discarded_once_a_round_is_done(tiny_model, tmp_path, monkeypatch):
    trainer = Trainer(parse_config(runs.settings(tiny_model, tmp_path / "run", trainer={"rounds": 3})))
    original = trainer.round

    def refused(index: int):
        if index == 2:
            raise UserError("engine.kind: the model's window is too short")
        return original(index)

    trainer.round = refused
    with pytest.raises(RunError, match="window is too short") as caught:
        trainer.train()
    assert "all 2 finished rounds are in" in caught.value.__notes__[0]
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["round-000001", "round-000002"]
    assert len(runs.rows(tmp_path / "run/metrics.jsonl")) == 2


def test_a_report_that_cannot_be_made_unmakes_no_run(tiny_model, tmp_path, capsys):
    feature = tmp_path / "spoils.py"  # a line of samples.jsonl, before the report reads it
    feature.write_text(
        "calls = 0\ndef spoils(completions):\n    global calls\n    calls += 1\n    if calls == 5:\n"
        f"        open({str(tmp_path / 'run/samples.jsonl')!r}, 'a').write('no JSON\\n')\n"
        "    return [1.0] * len(completions)\n"
    )
    path = runs.write_config(
        tmp_path, runs.settings(tiny_model, tmp_path / "run", target=[runs.imported(feature, "spoils")])
    )
    assert runs.call("train", path) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "not a JSON object" in last and "all 2 finished rounds are in" in last
    assert (tmp_path / "run/config.yaml").exists() and len(checkpoints(tmp_path / "run")) == 2


def test_pruning_goes_by_number_and_leaves_what_only_looks_like_a_checkpoint(tiny_model, tmp_path):
    run_dir = runs.train(tiny_model, tmp_path, trainer={"rounds": 2, "checkpoint_every": 1})
    kept = run_dir / "checkpoints"
    for copy in ("round-000001-good", "round-best", "backup"):
        shutil.copytree(kept / "round-000001", kept / copy)
    assert runs.call("train", "--resume", run_dir, "--trainer.rounds=4") == 0
    names = {"round-000003", "round-000004", "round-000001-good", "round-best", "backup"}
    assert {path.name for path in kept.iterdir()} == names
    (kept / "round-1000000").mkdir()  # after 999,999, though its name sorts before
    (kept / "round-999999").mkdir()
    assert [path.name for path in checkpoints(run_dir)][-2:] == ["round-999999", "round-1000000"]


def test_a_lock_that_was_removed_meanwhile_locks_nothing(tmp_path, monkeypatch):
    first = RunFolder(tmp_path / "run")
    flock, waits, held = __import__("fcntl").flock, threading.Event(), []

    def slow(lock, mode):
        first.discard()  # between another process's open and its lock
        first.close()
        flock(lock, mode)
        waits.set()

    monkeypatch.setattr("fdpg_fast.runs.folder.fcntl.flock", slow)
    with pytest.raises(UserError, match="in use by another process"):
        held.append(RunFolder(tmp_path / "run"))
    assert waits.is_set() and not held


def test_a_run_that_could_not_begin_holds_no_folder(tiny_model, tmp_path, monkeypatch):
    config = parse_config(runs.settings(tiny_model, tmp_path / "run"))
    with monkeypatch.context() as full:
        full.setattr("fdpg_fast.runs.recorder.dump_config", lambda config: 1 / 0)
        with pytest.raises(ZeroDivisionError) as caught:  # which keeps all that was on the way alive
            Trainer(config).train()
    assert caught.tb is not None and Trainer(config).train().report.exists()


RATES = {"float32": (1e20, 1e38), "bfloat16": (1e20, 1e38)}


@pytest.mark.parametrize(("dtype", "rate"), [(dtype, rate) for dtype, rates in RATES.items() for rate in rates])
@pytest.mark.parametrize("rounds", [1, 4])
def test_a_policy_that_is_no_longer_one_is_not_written(dtype, rate, rounds, tiny_model, tmp_path, capsys):
    settings = {"optimizer": {"learning_rate": rate}, "trainer": {"rounds": rounds, "samples_per_context": 8}}
    path = runs.write_config(tmp_path, runs.settings(tiny_model, tmp_path / "run", dtype=dtype, **settings))
    assert runs.call("train", path) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "the policy has diverged: " in last and "lower optimizer.learning_rate" in last
    assert checkpoints(tmp_path / "run") == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rate", [1.0, 10.0])
def test_weights_that_are_ruined_and_finite_are_said_to_be(rate, dtype, tiny_model, tmp_path, capsys):
    settings = {"optimizer": {"learning_rate": rate}, "trainer": {"rounds": 2, "samples_per_context": 8}}
    runs.train(tiny_model, tmp_path, dtype=dtype, **settings)
    assert "nats a token away from the base: " in capsys.readouterr().err


def test_an_overflow_is_skipped_and_three_end_the_run_with_the_checkpoint_of_before(tiny_model, tmp_path, monkeypatch):
    trainer = {"rounds": 9, "checkpoint_every": 1}
    trainer = Trainer(parse_config(runs.settings(tiny_model, tmp_path / "run", trainer=trainer)))
    learner, overflows = trainer.session.state.learner, {1, 3, 4, 5}
    step = learner.step

    def overflowing(loss, weights, index):
        if index in overflows:
            next(p for p in learner.policy.model.parameters() if p.grad is not None).grad.fill_(float("inf"))
        return step(loss, weights, index)

    monkeypatch.setattr(learner, "step", overflowing)
    with pytest.raises(Diverged, match="the gradient was not finite 3 times in a row"):
        trainer.train()
    assert [row["policy/skipped"] for row in runs.rows(tmp_path / "run/metrics.jsonl")] == [0.0, 1.0, 0.0, 1.0, 1.0]
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["round-000001", "round-000003"]


def test_log_probs_are_looked_at_before_a_checkpoint_is_written(tiny_model, tmp_path):
    settings = runs.settings(tiny_model, tmp_path / "run", trainer={"rounds": 4, "checkpoint_every": 1})
    trainer = Trainer(parse_config(settings))
    original = trainer.round

    def poisoned(index: int):  # after the step, where the weights have been looked at
        done = original(index)
        if index == 2:
            trainer.session.state.learner.policy.head.weight.data.fill_(float("nan"))
        return done

    trainer.round = poisoned
    with pytest.raises(Diverged, match="its log-probs are not finite") as caught:
        trainer.train()
    assert "2 of 2" in caught.value.__notes__[0] or "all 2" in caught.value.__notes__[0]
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["round-000001", "round-000002"]
