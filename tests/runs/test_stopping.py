"""A run that ends early keeps every finished round, says where, and goes on to the same numbers, bit for bit."""

import signal
import threading
from pathlib import Path

import pytest

from fdpg_fast import Trainer, stopping
from fdpg_fast.config.load import parse_config
from fdpg_fast.errors import RunError, UserError
from fdpg_fast.stopping import Stopped
from support import runs
from support.runs import Moment

# draws from the generators of Python, NumPy and torch before it fails: what a round has drawn must be undone
FEATURE = """
import os, random, signal, sys
import numpy, torch
calls, fails = 0, os.path.join(os.path.dirname(__file__), "fails")

def noisy(completions):
    global calls
    calls += 1
    sys.audit("feature")
    drawn = [random.random() / 2 + numpy.random.rand() / 4 + float(torch.rand(())) / 4 for _ in completions]
    if calls == 5 and os.path.exists(fails):  # in the fourth round
        {failure}
    return drawn
"""
FAILURES = {
    "exception": "raise ConnectionError('the judge is away')",
    "exit": "sys.exit('no more')",
    "wrong length": "drawn = drawn[1:]",
    "SIGTERM": "os.kill(os.getpid(), signal.SIGTERM)",
    "SIGHUP": "os.kill(os.getpid(), signal.SIGHUP)",
    "SIGUSR1": "os.kill(os.getpid(), signal.SIGUSR1)",
    "SIGINT": "os.kill(os.getpid(), signal.SIGINT)",
    "swallowed": """
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            sum(range(1000))
        except:
            drawn = [0.0 for _ in drawn]""",
    "turned into another": """
        try:
            os.kill(os.getpid(), signal.SIGHUP)
            sum(range(1000))
        except BaseException as error:
            raise ValueError("stopped?") from error""",
}
STATUS = {"SIGTERM": 143, "SIGHUP": 129, "SIGUSR1": 138, "SIGINT": 130, "swallowed": 143, "turned into another": 129}
KINDS = {
    "in turns": {"loss": {"baseline": "running"}},
    "two ahead": {"trainer": {"pipeline_depth": 2}},
    "adaptive": {"proposal": {"kind": "adaptive", "every": 2}},
    "lora": {"lora": {"rank": 2}},
    "bfloat16": {"dtype": "bfloat16"},
}


def write(model: Path, folder: Path, kind: str = "in turns", failure: str = "exception") -> Path:
    """A run of 7 rounds whose only due checkpoint is the last; features are called once before the first round."""
    (folder / "noisy.py").write_text(FEATURE.format(failure=FAILURES[failure]))
    sections = {"trainer": {"rounds": 7, "checkpoint_every": 50}} | KINDS[kind]
    sections["trainer"] = {"rounds": 7, "checkpoint_every": 50} | sections["trainer"]
    sections["contexts"] = {"train": str(runs.write_contexts(folder, *runs.PROMPTS))}
    target = [{"kind": "rlhf", "beta": 0.5, "feature": {"kind": "import", "path": f"{folder / 'noisy.py'}:noisy"}}]
    return runs.write_config(folder, runs.settings(model, folder / "run", target=target, **sections))


@pytest.fixture(scope="module")
def uninterrupted(tiny_model, tmp_path_factory):
    records: dict[str, dict] = {}

    def get(kind: str) -> dict:
        if kind not in records:
            folder = tmp_path_factory.mktemp("whole")
            ended = runs.run(folder, "train", write(tiny_model, folder, kind))
            assert ended.status == 0, ended.stderr
            records[kind] = of_the_last_round(folder / "run")
        return records[kind]

    return get


def of_the_last_round(run_dir: Path) -> dict:
    """A record without the checkpoint of where it was interrupted, which stays."""
    return {name: part for name, part in runs.record(run_dir).items() if "round-" not in name or "round-000007" in name}


def goes_on(folder: Path, expected: dict) -> None:
    resumed = runs.run(folder, "train", "--resume", "run")
    assert resumed.status == 0, resumed.stderr
    runs.assert_equal(of_the_last_round(folder / "run"), expected)


def cases() -> list:
    every = [("in turns", failure) for failure in FAILURES]
    return every + [(kind, failure) for kind in list(KINDS)[1:] for failure in ("exception", "SIGTERM")]


@pytest.mark.parametrize(("kind", "failure"), cases(), ids=lambda name: name)
def test_in_the_middle_of_a_round_the_rounds_before_it_are_kept(kind, failure, uninterrupted, tiny_model, tmp_path):
    path = write(tiny_model, tmp_path, kind, failure)
    (tmp_path / "fails").touch()
    ended = runs.run(tmp_path, "train", path, "--run_dir=run")
    (tmp_path / "fails").unlink()
    assert ended.status == STATUS.get(failure, 1)
    last = ended.stderr.splitlines()[-1]
    assert last.endswith("; all 3 finished rounds are in run/checkpoints/round-000003; continue with --resume run"), (
        ended.stderr
    )
    assert last.startswith("fdpg-fast: feature 'noisy' " if ended.status == 1 else ("stopped", "fdpg-fast: stopped"))
    assert [left.name for left in (tmp_path / "run/checkpoints").iterdir()] == ["round-000003"]
    goes_on(tmp_path, uninterrupted(kind))


# weights move between a round's features and its metrics; each is a moment of the fourth round
MOMENTS = {
    "after the step": (Moment("open", "samples.jsonl", 35), 4),  # 3 of the evaluation, 8 of each round
    "before its metrics": (Moment("open", "metrics.jsonl", 4), 4),
    "in the last checkpoint": (Moment("open", ".writing-round-000007/trainer/state.json"), 7),
    "in the last evaluation": (Moment("feature", "", 9), 7),
    "before the report": (Moment("open", "report.html"), 7),
}


@pytest.mark.parametrize(("moment", "done"), MOMENTS.values(), ids=MOMENTS.keys())
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_round_whose_weights_have_moved_is_finished_first(number, moment, done, uninterrupted, tiny_model, tmp_path):
    path = write(tiny_model, tmp_path)
    ended = runs.run(tmp_path, "train", path, "--run_dir=run", at=moment, send=number)
    assert ended.status == 128 + number, ended.stderr
    assert f"all {done} finished rounds are in run/checkpoints/round-{done:06d}; " in ended.stderr.splitlines()[-1]
    goes_on(tmp_path, uninterrupted("in turns"))


def test_before_the_first_round_there_is_nothing_to_keep(uninterrupted, tiny_model, tmp_path):
    path = write(tiny_model, tmp_path)
    ended = runs.run(tmp_path, "train", path, "--run_dir=run", at=Moment("feature"), send=signal.SIGTERM)
    assert ended.status == 143
    assert ended.stderr.splitlines()[-1] == "stopped; no checkpoint yet; start again with --resume run"
    goes_on(tmp_path, uninterrupted("in turns"))


def test_a_full_disk_leaves_the_older_checkpoint_whole(tiny_model, tmp_path):
    path = write(tiny_model, tmp_path)
    (tmp_path / "fails").touch()
    full = Moment("os.mkdir", ".writing-round-000003")
    options = ["--run_dir=run", "--trainer.checkpoint_every=2"]
    ended = runs.run(tmp_path, "train", path, *options, at=full, room=50_000)
    assert ended.status == 1
    what = (
        "feature 'noisy' raised ConnectionError: the judge is away; writing checkpoint run/checkpoints/round-000003: "
    )
    last = ended.stderr.splitlines()[-1]
    assert last.startswith(f"fdpg-fast: {what}")
    assert last.endswith("; 2 of 3 finished rounds are in run/checkpoints/round-000002; continue with --resume run")
    assert [left.name for left in (tmp_path / "run/checkpoints").iterdir()] == ["round-000002"]
    (tmp_path / "fails").unlink()
    assert runs.run(tmp_path, "train", "--resume", "run").status == 0


def test_a_signal_that_somebody_ignores_stays_ignored(tiny_model, tmp_path):
    path, moment = write(tiny_model, tmp_path), Moment("feature", "", 4)
    ended = runs.run(tmp_path, "train", path, at=moment, send=signal.SIGHUP, ignored=signal.SIGHUP)  # as under nohup
    assert ended.status == 0 and len(runs.rows(tmp_path / "run/metrics.jsonl")) == 7


@pytest.fixture
def trainer(tiny_model, tmp_path):
    contexts = {"train": str(runs.write_contexts(tmp_path, *runs.PROMPTS))}
    trainer = {"rounds": 5, "checkpoint_every": 50}
    return Trainer(parse_config(runs.settings(tiny_model, tmp_path / "run", contexts=contexts, trainer=trainer)))


def left(trainer: Trainer) -> list[str]:
    return [path.name for path in Path(trainer.session.config.run_dir, "checkpoints").iterdir()]


def raises_in(trainer: Trainer, monkeypatch, owner, name: str, error: BaseException, call: int, after: bool) -> None:
    original, calls = getattr(owner, name), []

    def failing(*arguments, **keywords):
        calls.append(name)
        if len(calls) == call and not after:
            raise error
        result = original(*arguments, **keywords)
        if len(calls) == call:
            raise error
        return result

    monkeypatch.setattr(owner, name, failing)


def test_an_engine_that_takes_no_weights_loses_no_round(trainer, monkeypatch):
    engine = trainer.session.engine
    raises_in(trainer, monkeypatch, engine, "sync_weights", RunError("the server is gone"), 2, after=False)
    with pytest.raises(RunError, match="the server is gone") as caught:
        trainer.train()
    assert left(trainer) == ["round-000002"]
    assert "all 2 finished rounds" in caught.value.__notes__[0]


def test_an_error_in_the_step_itself_loses_its_round_and_says_so(trainer, monkeypatch):
    optimizer = trainer.session.state.learner.optimizer
    raises_in(trainer, monkeypatch, optimizer, "step", MemoryError("of the device"), 3, after=True)
    with pytest.raises(MemoryError) as caught:
        trainer.train()
    assert "no checkpoint yet" in caught.value.__notes__[0]
    assert not Path(trainer.session.config.run_dir, "checkpoints").exists()


def test_from_python_a_signal_does_the_same_and_handlers_come_back(trainer, monkeypatch, caplog):
    def stop(index: int):
        if index == 2:
            signal.raise_signal(signal.SIGTERM)
        return original(index)

    original = trainer.round
    trainer.round = stop
    before = [signal.getsignal(number) for number in stopping._DEFAULTS]
    with pytest.raises(Stopped) as caught:
        trainer.train()
    assert caught.value.code == 143 and left(trainer) == ["round-000002"]
    assert "all 2 finished rounds are in" in caplog.text
    assert [signal.getsignal(number) for number in stopping._DEFAULTS] == before


def test_a_handler_of_the_callers_own_stays(trainer, monkeypatch):
    seen = []
    own = lambda number, frame: seen.append((number, signal.getsignal(number)))  # noqa: E731
    monkeypatch.setattr(trainer, "round", lambda index: signal.raise_signal(signal.SIGTERM) or 1 / 0)
    before = signal.signal(signal.SIGTERM, own)
    try:
        with pytest.raises(ZeroDivisionError):
            trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [(signal.SIGTERM, own)]


def test_in_another_thread_no_handler_is_touched(trainer):
    before, ended = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=lambda: ended.append(trainer.train()))
    thread.start()
    thread.join()
    assert len(ended) == 1 and signal.getsignal(signal.SIGTERM) is before and left(trainer) == ["round-000005"]


def test_memory_that_runs_out_at_the_last_checkpoint_hides_nothing(trainer, monkeypatch):
    """Where a round has failed for want of memory there may be none for a checkpoint either."""
    learner = trainer.session.state.learner
    raises_in(trainer, monkeypatch, learner, "backward", MemoryError("CUDA out of memory"), 3, after=False)
    raises_in(trainer, monkeypatch, learner.policy, "save", MemoryError("once\nmore"), 1, after=False)
    with pytest.raises(MemoryError, match="CUDA out of memory") as caught:
        trainer.train()
    (note,) = caught.value.__notes__
    assert note.startswith("no checkpoint could be written: MemoryError: once more; no checkpoint yet; start again ")
    assert left(trainer) == []


def test_a_signal_that_was_swallowed_before_the_first_round_is_not_a_fault_of_the_config(trainer):
    def swallows(index: int):
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:
            raise UserError("target: a feature does not fit") from None

    trainer.round = swallows
    with pytest.raises(Stopped):
        trainer.train()
    assert Path(trainer.session.config.run_dir, "config.yaml").exists()
