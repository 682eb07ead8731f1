"""A divergence that is another one in every round: alpha:a..b."""

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
    assert "to target: alpha:0.6 (trained)" in before_after_table(whole)
    assert "to minimise alpha:0.3..0.6 between" in (whole / "report.html").read_text()


def test_the_learner_has_the_rounds_divergence(tiny_model, tmp_path):
    def spread(name):
        folder = runs.train(tiny_model, tmp_path, name, divergence=name, trainer={"rounds": 2})
        return [row["policy/pseudo_reward_std"] for row in runs.rows(folder / "metrics.jsonl")]  # the learner's own

    path, constant = spread(PATH), spread("alpha:0.2")
    assert path[0] == constant[0] and abs(path[1] / constant[1] - 1) > 1e-3
