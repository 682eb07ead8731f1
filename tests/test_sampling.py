"""Runs whose engine has its own weights: in turns and rounds ahead, the real vLLM too, and engines that are stale."""

import copy

import pytest
import torch

from fdpg_fast import session
from fdpg_fast.engines import TransformersEngine
from fdpg_fast.seeds import derived_seed
from support import runs

VLLM = {"kind": "vllm", "max_new_tokens": 6, "max_sequences": 16}
TRAINER = {"rounds": 4, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def ahead(vllm_model, tmp_path_factory):
    """A run that samples one round ahead, undisturbed, in a process of its own."""
    folder = tmp_path_factory.mktemp("ahead")
    ended = runs.run(folder, "train", write(vllm_model, folder))
    assert ended.status == 0, ended.stderr
    return folder / "run"


def write(model, folder, **sections):
    contexts = {"train": str(runs.write_contexts(folder, *runs.PROMPTS))}
    settings = {"contexts": contexts, "engine": VLLM, "trainer": TRAINER | {"pipeline_depth": 1}, **sections}
    return runs.write_config(folder, runs.settings(model, folder / "run", **settings))


def test_in_turns_the_engine_has_the_learners_weights(vllm_model, tmp_path):
    rows = runs.rows(runs.train(vllm_model, tmp_path, engine=VLLM, trainer=TRAINER) / "metrics.jsonl")
    assert len(rows) == 4
    for row in rows:
        assert 0 < row["engine/logprob_gap_mean"] <= row["engine/logprob_gap_max"] < 1e-4
        assert 0 < row["engine/sequence_gap_mean"] <= row["engine/sequence_gap_max"] < 1e-4
        assert row["policy/log_ratio_max"] < 1e-4
        assert row["time/sync"] > 0 and "time/compare" in row


def test_one_round_ahead_is_off_policy_and_says_so(ahead):
    rows = runs.rows(ahead / "metrics.jsonl")
    assert rows[0]["policy/log_ratio_max"] < 1e-4  # the first round has nothing to be ahead of
    assert all(row["policy/log_ratio_max"] > 1e-3 for row in rows[1:])
    # compared before the step that the samples will be behind
    assert all(row["engine/logprob_gap_max"] < 1e-4 for row in rows[:-1]) and len(rows) == 4


DRAWING = """
import random
import numpy
import torch

def drawing(completions):
    return [0.5 + random.random() + numpy.random.rand() + float(torch.rand(())) for _ in completions]
"""


def test_features_that_draw_beside_the_real_vllm_draw_the_same_in_every_run(vllm_model, tmp_path):
    """One round ahead it samples in a thread, while features draw from the global generators in the main one."""
    records = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "drawing.py").write_text(DRAWING)
        target = {"kind": "rlhf", "beta": 1.0, "feature": runs.imported(folder / "drawing.py", "drawing")["feature"]}
        ended = runs.run(folder, "train", write(vllm_model, folder, target=[target]))
        assert ended.status == 0, ended.stderr
        records.append(runs.record(folder / "run"))
    runs.assert_equal(*records)


def test_one_round_ahead_resumes_with_the_same_numbers(ahead, vllm_model, tmp_path):
    # features are called in the first evaluation, four rounds, the last evaluation
    moment = runs.Moment("open", "metrics.jsonl", 4)
    assert runs.run(tmp_path, "train", write(vllm_model, tmp_path), at=moment).status == -9
    assert [p.name for p in tmp_path.glob("run/checkpoints/*")] == ["round-000002"]
    assert runs.run(tmp_path, "train", "--resume", "run").status == 0
    ours, expected = runs.record(tmp_path / "run"), runs.record(ahead)
    for row in (*ours["metrics"], *expected["metrics"]):
        row.pop("engine/version", None)
    runs.assert_equal(ours, expected)


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_a_round_trains_on_samples_of_the_weights_that_many_rounds_before(depth, tiny_model, tmp_path, monkeypatch):
    versions, sample = [], TransformersEngine.sample

    def recorded(engine, contexts, samples_per_context, seed):
        if samples_per_context == 4:  # of a round, not of an evaluation
            versions.append(engine.version)
        return sample(engine, contexts, samples_per_context, seed)

    monkeypatch.setattr(TransformersEngine, "sample", recorded)
    trainer = {"rounds": 7, "pipeline_depth": depth, "checkpoint_every": 7}
    run = runs.train(tiny_model, tmp_path, trainer=trainer, loss={"ratio_cap": 1.001, "ratio_drop": 1.002})
    rows = runs.rows(run / "metrics.jsonl")
    assert versions == [max(0, k - depth) for k in range(7)]
    for k, row in enumerate(rows):  # what is sampled is compared with the learner's weights of that moment
        assert row.get("engine/logprob_gap_max", 0.0) < 1e-4 and ("time/compare" in row) == (k == 0 or k + depth < 7)
        stale = k > 0 and depth > 0
        assert (row["policy/log_ratio_max"] > 1e-3) == stale
        assert stale or row["policy/dropped"] == 0  # all eight completions of a stale round may be less likely now
        assert (row["policy/ratio_ess"] < 1 - 1e-6) == stale and 1 / 8 <= row["policy/ratio_ess"] <= 1 + 1e-9
    assert (sum(row["policy/dropped"] for row in rows) > 0) == (depth > 0)


def four_ahead(model, folder):
    contexts = {"train": str(runs.write_contexts(folder, *runs.PROMPTS))}
    trainer = {"rounds": 9, "checkpoint_every": 3, "pipeline_depth": 4}
    return runs.write_config(folder, runs.settings(model, folder / "run", contexts=contexts, trainer=trainer))


@pytest.mark.parametrize("round_index", [5, 7], ids=["all ahead", "fewer left than depth"])
def test_four_rounds_ahead_resumes_with_the_same_numbers(round_index, tiny_model, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    assert runs.run(whole, "train", four_ahead(tiny_model, whole)).status == 0
    moment = runs.Moment("open", "metrics.jsonl", round_index + 1)
    assert runs.run(killed, "train", four_ahead(tiny_model, killed), at=moment).status == -9
    done = range(3, round_index + 1, 3)
    assert sorted(p.name for p in killed.glob("run/checkpoints/*")) == [f"round-{rounds:06d}" for rounds in done]
    assert runs.run(killed, "train", "--resume", "run").status == 0
    runs.assert_equal(runs.record(killed / "run"), runs.record(whole / "run"))


def test_ahead_of_weights_that_the_servers_let_go_of_is_refused(tiny_model, tmp_path, capsys):
    contexts = {"train": str(runs.write_contexts(tmp_path, *runs.PROMPTS))}
    engine = {"kind": "vllm_server", "urls": ["http://localhost:1"], "weight_transfer": "ipc"}
    settings = runs.settings(
        tiny_model, tmp_path / "run", contexts=contexts, engine=engine, trainer={"pipeline_depth": 1}
    )
    assert runs.call("train", runs.write_config(tmp_path, settings)) == 2
    complaint = capsys.readouterr().err
    assert "fdpg-fast: trainer.pipeline_depth: 1 samples with weights that the learner had before, but " in complaint
    assert not (tmp_path / "run").exists()


class Stale(TransformersEngine):
    """Keeps the weights that it was made with, whatever it says."""

    def __init__(self, policy, *arguments, **settings):
        super().__init__(copy.deepcopy(policy), *arguments, **settings)

    def sync_weights(self, policy, version):
        self.version = version


class Behind(TransformersEngine):
    def sync_weights(self, policy, version):
        self.version = max(0, version - 1)


@pytest.mark.parametrize(
    ("engine", "complaint"),
    [
        (Stale, "the engine's log-probs differ from the learner's by "),
        (Behind, "the engine holds weights of version 0, not 1"),
    ],
)
def test_stale_weights_stop_the_run(engine, complaint, tiny_model, tmp_path, monkeypatch, capsys):
    def build(config, policy, eos, *_):
        return engine(policy, eos, max_new_tokens=config.engine.max_new_tokens)

    monkeypatch.setattr(session, "build_engine", build)
    contexts = {"train": str(runs.write_contexts(tmp_path, *runs.PROMPTS))}
    settings = runs.settings(tiny_model, tmp_path / "run", contexts=contexts, optimizer={"learning_rate": 0.03})
    assert runs.call("train", runs.write_config(tmp_path, settings)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"fdpg-fast: {complaint}")
    assert [p.name for p in tmp_path.glob("run/checkpoints/*")] == ["round-000001"]


class Lying(TransformersEngine):
    """Says of one completion in the rounds, another one than the few that are compared, what is not so."""

    def sample(self, contexts, samples_per_context, seed):
        rollouts = super().sample(contexts, samples_per_context, seed)
        if samples_per_context == 4 and self.version == 1:
            ends, rows = rollouts.cu_seqlens.tolist(), len(rollouts)
            far = (derived_seed(0, "compared", 1) + rows - 1) % rows  # the one before the first of the few
            rollouts.behavior_logprob[ends[far]] -= 2.0
        return rollouts


class Another(TransformersEngine):
    """Samples the evaluation from another model."""

    def sync_weights(self, policy, version):
        other = copy.deepcopy(policy)
        with torch.no_grad():
            other.head.weight.mul_(1.5)
        super().sync_weights(other, version)


@pytest.mark.parametrize(("engine", "rounds"), [(Lying, 1), (Another, 0)])
def test_before_the_weights_move_all_completions_are_compared(
    engine, rounds, tiny_model, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(session, "build_engine", lambda config, policy, eos, *_: engine(policy, eos, max_new_tokens=40))
    contexts = {"train": str(runs.write_contexts(tmp_path, *runs.PROMPTS))}
    settings = runs.settings(tiny_model, tmp_path / "run", contexts=contexts, engine={"max_new_tokens": 40})
    assert runs.call("train", runs.write_config(tmp_path, settings)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("fdpg-fast: the engine's log-probs differ from the learner's by ")
    assert [p.name for p in tmp_path.glob("run/checkpoints/round-*")] == ["round-000001"] * rounds
    assert (tmp_path / "run" / "evaluation.jsonl").exists() == bool(rounds)


def test_a_small_gap_is_said_and_no_more(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(session, "build_engine", lambda config, policy, eos, *_: Stale(policy, eos, max_new_tokens=6))
    runs.train(tiny_model, tmp_path, optimizer={"learning_rate": 1e-4}, engine={"gap_warning": 1e-6, "gap_limit": 1.0})
    # of the second round and of the last evaluation: before the first step all agree
    assert capsys.readouterr().err.count("nats a token; see docs/engines.md") == 2
