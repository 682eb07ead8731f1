"""A divergence that is another one in every round, alpha:a..b, and one of the user's own, file.py:name."""

import math
import re

import pytest

from fdpg_fast import partition
from fdpg_fast.divergence import divergence_at, last_divergence
from fdpg_fast.runs import recorder
from fdpg_fast.runs.tables import before_after_table
from support import runs

PATH = "alpha:0.2..0.9"


def test_alpha_goes_linearly_from_the_first_round_to_the_last():
    names = [divergence_at(PATH, k, 8).name for k in range(8)]
    assert names == [f"alpha:{0.2 + 0.1 * k:g}" for k in range(8)]
    assert divergence_at(PATH, 50, 101).power == pytest.approx((-0.45, 1 / -0.45))
    assert last_divergence(PATH).name == divergence_at(PATH, 0, 1).name == "alpha:0.9"
    assert [divergence_at("alpha:0.9..0.5", k, 3).name for k in range(3)] == ["alpha:0.9", "alpha:0.7", "alpha:0.5"]


def test_what_is_no_path_is_the_same_in_every_round():
    for name in ("forward_kl", "alpha:0.3"):
        assert [divergence_at(name, k, 3).name for k in range(3)] == [name] * 3


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("alpha:0.2..", "write alpha:a..b with numbers a and b in (0, 1)"),
        ("alpha:0.2..big", "write alpha:a..b with numbers a and b in (0, 1)"),
        ("alpha:0.2..1", "alpha:1 is outside (0, 1)"),
        ("alpha:-1..0.5", "alpha:-1 is outside (0, 1)"),
        ("forward_kl..reverse_kl", "unknown divergence 'forward_kl..reverse_kl'"),
    ],
)
def test_bad_paths_are_refused(name, complaint, tiny_model, tmp_path, capsys):
    assert runs.call("train", runs.write_config(tmp_path, runs.settings(tiny_model, tmp_path, divergence=name))) == 2
    said = capsys.readouterr().err
    assert complaint in said and said.startswith("fdpg-fast: divergence: ") and said.count("\n") == 1


def test_every_round_trains_on_its_own_divergence_and_a_resumed_run_too(tiny_model, tmp_path, monkeypatch):
    used, original = [], partition.pseudo_rewards

    def recorded(log_q, log_score, log_z, divergence, cap):
        used.append(divergence.name)
        return original(log_q, log_score, log_z, divergence, cap)

    monkeypatch.setattr(partition, "pseudo_rewards", recorded)
    trainer = {"rounds": 4, "checkpoint_every": 2}
    whole = runs.train(tiny_model, tmp_path, "whole", divergence="alpha:0.3..0.6", trainer=trainer)
    assert used == ["alpha:0.3", "alpha:0.4", "alpha:0.5", "alpha:0.6"]

    used.clear()
    writes = recorder.save_checkpoint

    def killed(folder, state, *arguments):
        writes(folder, state, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(recorder, "save_checkpoint", killed)
    contexts = {"train": str(runs.write_contexts(tmp_path, *runs.PROMPTS))}
    data = runs.settings(tiny_model, tmp_path / "part", contexts=contexts, divergence="alpha:0.3..0.6", trainer=trainer)
    runs.call("train", runs.write_config(tmp_path, data))
    monkeypatch.setattr(recorder, "save_checkpoint", writes)
    assert used == ["alpha:0.3", "alpha:0.4"]
    assert runs.call("train", "--resume", tmp_path / "part") == 0
    assert used == ["alpha:0.3", "alpha:0.4", "alpha:0.5", "alpha:0.6"]
    runs.assert_equal(runs.record(tmp_path / "part"), runs.record(whole))

    # what is trained in the end is what is evaluated
    assert "divergence/alpha:0.6" in runs.rows(whole / "evaluation.jsonl")[-1]["metrics"]
    assert "\n  alpha:0.6 (trained) " in before_after_table(whole)
    assert "to minimise alpha:0.3..0.6 between" in (whole / "report.html").read_text()


def test_the_learner_has_the_rounds_divergence(tiny_model, tmp_path):
    def spread(name):
        folder = runs.train(tiny_model, tmp_path, name, divergence=name, trainer={"rounds": 2})
        return [row["policy/pseudo_reward_std"] for row in runs.rows(folder / "metrics.jsonl")]  # the learner's own

    path, constant = spread(PATH), spread("alpha:0.2")
    assert path[0] == constant[0] and abs(path[1] / constant[1] - 1) > 1e-3


# --- one of the user's own ---

OWN = """
from fdpg_kernels import Divergence

mine = Divergence("triangular", lambda t: (t - 1) ** 2 / (t + 1), 1.0)
no_zeros = Divergence("jeffreys", lambda t: t * t.log() - t.log(), float("inf"))
number = 3.0
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The folder that holds own.py, made the working directory, as for a config that says `divergence: own.py:mine`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def test_a_divergence_of_the_user_s_own_is_trained_measured_reported_and_compared(own, tiny_model, capsys):
    trainer = {"rounds": 2}
    mine = runs.train(tiny_model, own, "mine", divergence="own.py:mine", trainer=trainer)
    before, after = runs.rows(mine / "evaluation.jsonl")
    for row in (before, after):
        value, known = (row["metrics"][f"divergence/{name}"]["value"] for name in ("triangular", "squared_hellinger"))
        assert math.isfinite(value) and 0 <= value <= 2 * known + 1e-9  # (t−1)²/(t+1) ≤ 2(√t − 1)²
    assert "\n  triangular (trained) " in before_after_table(mine)
    page = (mine / "report.html").read_text()
    assert "to minimise own.py:mine between" in page and "<td>triangular" in page.replace("<th>", "<td>")

    js = runs.train(tiny_model, own, "js", divergence="jensen_shannon", trainer=trainer)
    capsys.readouterr()
    assert runs.call("compare", mine, js, "--samples", 3, "--base-samples", 8, "--output", own / "both.html") == 0
    table = capsys.readouterr().out
    assert re.search(r"trained +own\.py:mine +jensen_shannon", table) and re.search(r"\n *triangular +\S", table)
    assert "triangular" in (own / "both.html").read_text()
    assert runs.call("evaluate", mine) == 0 and "triangular" in capsys.readouterr().out


def test_a_run_by_the_user_s_own_divergence_is_resumed(own, tiny_model):
    short = runs.train(tiny_model, own, "short", divergence="own.py:mine", trainer={"rounds": 1})
    assert runs.call("train", "--resume", short, "--trainer.rounds=2") == 0
    whole = runs.train(tiny_model, own, "whole", divergence="own.py:mine", trainer={"rounds": 2})
    assert runs.record(short)["metrics"] == runs.record(whole)["metrics"]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("own.py:yours", "import path 'own.py:yours': AttributeError: "),
        ("absent.py:mine", "import path 'absent.py:mine': FileNotFoundError: "),
        ("no_such_module:mine", "import path 'no_such_module:mine': ModuleNotFoundError: "),
        ("own.py:number", "'own.py:number' is a float, not a fdpg_kernels.Divergence"),
        ("own.py:no_zeros", "jeffreys"),  # infinite on a target that can be zero
    ],
)
def test_what_is_no_divergence_is_refused(name, complaint, own, tiny_model, capsys):
    assert runs.call("train", runs.write_config(own, runs.settings(tiny_model, own / "run", divergence=name))) == 2
    said = capsys.readouterr().err
    assert said.startswith("fdpg-fast: divergence: ") and complaint in said and said.count("\n") == 1
    assert not (own / "run").exists()
