"""A run that was killed and resumed leaves the same numbers as one that was not, bit for bit."""

import shutil
from pathlib import Path

import pytest

from fdpg_fast.runs.folder import TARGET_SAMPLES as NAME
from support import runs
from support.runs import Moment


def config(model: Path, folder: Path, run_dir: str) -> dict:
    return runs.drawing(model, folder, folder / run_dir, trainer={"rounds": 8, "checkpoint_every": 2})


@pytest.fixture(scope="module")
def uninterrupted(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    ended = runs.run(folder, "train", runs.write_config(folder, config(tiny_model, folder, "run")))
    assert ended.status == 0, ended.stderr
    return runs.record(folder / "run")


# features are called for the fit of λ, the first evaluation, eight rounds and the last evaluation; rounds 2, 4, 6 and
# 8 write checkpoints, round 6 being the first that also deletes one
MOMENTS = {
    "while λ is fitted": Moment("feature", "", 1),
    "in the first evaluation": Moment("feature", "", 2),
    "before the first checkpoint's trainer state": Moment("open", ".writing-round-000002/trainer/state.json"),
    "in a round just after a checkpoint": Moment("feature", "", 5),
    "between a round's samples and its metrics": Moment("open", "metrics.jsonl", 4),
    "before a checkpoint's weights": Moment("open", ".writing-round-000004/config.json"),
    "between weights and hashes of a checkpoint": Moment("open", ".writing-round-000004/trainer/state.tensors"),
    "before a checkpoint's rename": Moment("os.rename", ".writing-round-000004"),
    "before the old checkpoint goes": Moment("shutil.rmtree", "checkpoints/round-000002"),
    "while the old checkpoint goes": Moment("os.remove", "safetensors"),
    "in the last evaluation": Moment("feature", "", 11),
    "before the report": Moment("open", "report.html"),
}


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS.keys())
def test_killed_and_resumed_run_equals_an_uninterrupted_one(moment, uninterrupted, tiny_model, tmp_path):
    path = runs.write_config(tmp_path, config(tiny_model, tmp_path, "run"))
    assert runs.run(tmp_path, "train", path, at=moment).status == -9
    resumed = runs.run(tmp_path, "train", "--resume", "run")
    assert resumed.status == 0, resumed.stderr
    runs.assert_equal(runs.record(tmp_path / "run"), uninterrupted)
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["round-000006", "round-000008"]


@pytest.mark.parametrize(
    "moment",
    [Moment("os.rename", ".target-samples"), Moment("open", "metrics.jsonl", 3)],
    ids=["before they are kept", "after a checkpoint"],
)
def test_exact_samples_of_the_target_survive_a_kill(moment, tiny_model, tmp_path):
    found = []
    for run_dir in ("whole", "killed"):
        config = runs.settings(tiny_model, run_dir, contexts={"train": str(runs.write_contexts(tmp_path, "a", "b"))})
        path = runs.write_config(tmp_path, runs.merged(config, {"trainer": {"rounds": 3}}))
        ended = runs.run(tmp_path, "train", path, at=moment if run_dir == "killed" else None)
        if run_dir == "killed":
            assert ended.status == -9
            ended = runs.run(tmp_path, "train", "--resume", run_dir)
        assert ended.status == 0, ended.stderr
        found.append(runs.record(tmp_path / run_dir) | {"kept": (tmp_path / run_dir / NAME).read_bytes()})
    runs.assert_equal(*found)


def test_killed_twice(uninterrupted, tiny_model, tmp_path):
    path = runs.write_config(tmp_path, config(tiny_model, tmp_path, "run"))
    assert runs.run(tmp_path, "train", path, at=Moment("feature", "", 6)).status == -9
    # the resumed process calls features for rounds 3, 4, 5: it dies a checkpoint later
    assert runs.run(tmp_path, "train", "--resume", "run", at=Moment("feature", "", 3)).status == -9
    assert runs.run(tmp_path, "train", "--resume", "run").status == 0
    runs.assert_equal(runs.record(tmp_path / "run"), uninterrupted)


# where the disk is full, how much still fits there, and what could not be written
FULL = {
    "weights": (Moment("os.mkdir", ".writing-round-000004"), 50_000, "checkpoint run/checkpoints/round-000004"),
    "trainer state": (Moment("os.mkdir", ".writing-round-000004"), 150_000, "checkpoint run/checkpoints/round-000004"),
    "first checkpoint": (
        Moment("os.mkdir", ".writing-round-000002"),
        50_000,
        "checkpoint run/checkpoints/round-000002",
    ),
    "metrics": (Moment("open", "metrics.jsonl", 4), 100, "run/metrics.jsonl"),
    "evaluation": (Moment("open", "evaluation.jsonl", 2), 0, "run/evaluation.jsonl"),
    "report": (Moment("open", "report.html"), 2000, "run/report.html"),
}


@pytest.mark.parametrize(("moment", "room", "what"), FULL.values(), ids=FULL.keys())
def test_run_that_filled_the_disk_says_so_and_goes_on_later(moment, room, what, uninterrupted, tiny_model, tmp_path):
    path = runs.write_config(tmp_path, config(tiny_model, tmp_path, "run"))
    ended = runs.run(tmp_path, "train", path, "--run_dir=run", at=moment, room=room)
    *progress, last = ended.stderr.splitlines()
    assert ended.status == 1 and last.startswith(f"fdpg-fast: writing {what}: ")
    assert "; free some space; " in last and last.endswith("with --resume run")
    assert all(line.startswith(("target: ", "engine: ", "round ")) for line in progress)
    left = [path.name for path in tmp_path.glob("run/checkpoints/*")]
    assert left == (["round-000002"] if "000004" in what else left) and not any("writing" in name for name in left)

    resumed = runs.run(tmp_path, "train", "--resume", "run")
    assert resumed.status == 0, resumed.stderr
    runs.assert_equal(runs.record(tmp_path / "run"), uninterrupted)


def test_rows_cut_short_by_a_full_disk_are_written_again(uninterrupted, tiny_model, tmp_path):
    path = runs.write_config(tmp_path, config(tiny_model, tmp_path, "run"))
    assert runs.run(tmp_path, "train", path, at=Moment("open", "metrics.jsonl", 4)).status == -9
    with open(tmp_path / "run/metrics.jsonl", "ab") as file:
        file.write(b'{"round": 3, "loss": 0.2')
    with open(tmp_path / "run/samples.jsonl", "ab") as file:
        file.write('{"round": 3, "split": "train", "prompt": "é'.encode()[:-1])  # within a character
    resumed = runs.run(tmp_path, "train", "--resume", "run")
    assert resumed.status == 0, resumed.stderr
    runs.assert_equal(runs.record(tmp_path / "run"), uninterrupted)


def test_no_row_is_lost_to_a_line_separator_in_a_text(tiny_model, tmp_path):
    contexts = runs.write_contexts(tmp_path, "one\u2028two\x85three", "four")
    data = runs.settings(tiny_model, tmp_path / "run", contexts={"train": str(contexts)})
    assert runs.call("train", runs.write_config(tmp_path, data)) == 0
    before = runs.record(tmp_path / "run")
    assert runs.call("train", "--resume", tmp_path / "run") == 0
    runs.assert_equal(runs.record(tmp_path / "run"), before)


def test_finished_run_goes_on_with_more_rounds(tiny_model, tmp_path):
    def data(run_dir: str, rounds: int) -> dict:
        return {**runs.settings(tiny_model, tmp_path / run_dir, trainer={"rounds": rounds})}

    assert runs.call("train", runs.write_config(tmp_path, data("long", 4))) == 0
    assert runs.call("train", runs.write_config(tmp_path, data("short", 2))) == 0
    assert runs.call("train", "--resume", tmp_path / "short", "--trainer.rounds=4") == 0
    runs.assert_equal(runs.record(tmp_path / "short"), runs.record(tmp_path / "long"))

    # and the run remembers how long it is: resumed once more without the override, nothing changes
    assert runs.call("train", "--resume", tmp_path / "short") == 0
    runs.assert_equal(runs.record(tmp_path / "short"), runs.record(tmp_path / "long"))


def test_fewer_rounds_than_done_are_refused(tiny_model, tmp_path, capsys):
    path = runs.write_config(tmp_path, runs.settings(tiny_model, tmp_path / "run", trainer={"rounds": 3}))
    assert runs.call("train", path) == 0
    before = runs.record(tmp_path / "run")
    capsys.readouterr()
    assert runs.call("train", "--resume", tmp_path / "run", "--trainer.rounds=1") == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1 and "trainer.rounds" in complaint and "3" in complaint
    runs.assert_equal(runs.record(tmp_path / "run"), before)


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    data = runs.settings(tiny_model, folder / "run", trainer={"rounds": 3})
    assert runs.call("train", runs.write_config(folder, data)) == 0
    return folder / "run"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_a_number(path: Path) -> None:
    path.write_text(path.read_text().replace('"round": 3', '"round": 2'))


DAMAGES = {
    "weights cut short": (cut, "model.safetensors"),
    "weights changed": (flip_a_bit, "model.safetensors"),
    "weights gone": (Path.unlink, "model.safetensors"),
    "trainer state changed": (flip_a_bit, "trainer/state.tensors"),
    "trainer.json gone": (Path.unlink, "trainer/state.json"),
    "trainer.json cut short": (cut, "trainer/state.json"),
    "trainer.json changed": (change_a_number, "trainer/state.json"),
    "tokenizer gone": (Path.unlink, "tokenizer.json"),
    "sums gone": (Path.unlink, "SHA256SUMS"),
    "sums cut short": (cut, "SHA256SUMS"),
}


@pytest.mark.parametrize(("damage", "name"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_checkpoint_is_refused(damage, name, finished, tmp_path, capsys):
    run_dir = shutil.copytree(finished, tmp_path / "run")
    damage(run_dir / "checkpoints/round-000003" / name)
    for command in (["train", "--resume"], ["evaluate"], ["sample"]):
        assert runs.call(*command, run_dir) == 2
        complaint = capsys.readouterr().err
        assert complaint.startswith(f"fdpg-fast: checkpoint {run_dir}/checkpoints/round-000003 is damaged (")
        assert complaint.endswith("; delete that folder to continue from round-000002\n")
        assert complaint.count("\n") == 1
        assert name in complaint or damage is cut  # sums cut short blame the file whose line is gone


def test_run_goes_on_from_the_checkpoint_before_the_damaged_one(finished, tmp_path):
    run_dir = shutil.copytree(finished, tmp_path / "run")
    cut(run_dir / "checkpoints/round-000003/model.safetensors")
    assert runs.call("train", "--resume", run_dir) == 2
    shutil.rmtree(run_dir / "checkpoints/round-000003")
    assert runs.call("train", "--resume", run_dir) == 0
    runs.assert_equal(runs.record(run_dir), runs.record(finished))


def test_run_whose_only_checkpoint_is_damaged_starts_again(finished, tmp_path, capsys):
    run_dir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run_dir / "checkpoints/round-000002")
    cut(run_dir / "checkpoints/round-000003/model.safetensors")
    assert runs.call("train", "--resume", run_dir) == 2
    assert "round-000003 is damaged" in (complaint := capsys.readouterr().err)
    assert "delete that folder to start again from round 0" in complaint
    shutil.rmtree(run_dir / "checkpoints/round-000003")
    assert runs.call("train", "--resume", run_dir) == 0
    runs.assert_equal(runs.record(run_dir), runs.record(finished))
