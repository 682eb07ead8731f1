"""Several updates a round: how its contexts are divided, when it ends early, what it records and resumes."""

import itertools
import math

import pytest
import torch

from fdpg_fast.config.load import parse_config
from fdpg_fast.contexts import Context
from fdpg_fast.errors import UserError
from fdpg_fast.rollouts import pack
from fdpg_fast.session import Session
from fdpg_fast.trainer import Trainer
from fdpg_fast.updates import division, mini_batches
from support import runs

FOUR = ("a", "tea ", "def f(", "x = ")


def make_rollouts():
    """Five contexts with 1, 2, 3, 4 and 5 completions of different lengths; every token is a number of its own."""
    number = itertools.count()
    groups = [
        [([next(number) for _ in range(1 + (i + j) % 3)], [], j % 2 == 0) for j in range(i + 1)] for i in range(5)
    ]
    drawn = [[(ids, [-float(x) for x in ids], end) for ids, _, end in group] for group in groups]
    return pack([Context(10 + i, str(i), (i,)) for i in range(5)], drawn)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_context_is_whole_in_one_mini_batch(count):
    rollouts = make_rollouts()
    given = torch.arange(3.0 * len(rollouts)).view(3, -1)
    batches = mini_batches(rollouts, *given, division(rollouts, count, seed=1))
    assert {len(batch.rollouts.contexts) for batch in batches} <= {5 // count, -(-5 // count)}
    assert sorted(torch.cat([batch.rows for batch in batches]).tolist()) == list(range(len(rollouts)))
    texts = list(zip(rollouts.dataset_index.tolist(), rollouts.completion_ids(), strict=True))
    for own, *columns, rows in batches:
        found = zip(own.dataset_index.tolist(), own.completion_ids(), strict=True)
        assert list(found) == [texts[row] for row in rows.tolist()]
        assert torch.equal(own.behavior_logprob, -own.token_ids.float())
        assert torch.equal(own.finished, rollouts.finished[rows]) and own.cu_seqlens.dtype == torch.int32
        assert torch.equal(torch.stack(columns), given[:, rows])
    if count == 1:
        whole = zip(batches[0].rollouts.tensors().values(), rollouts.tensors().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in whole)


def test_the_division_depends_on_the_seed_alone():
    for count in (2, 6):
        parts = [division(make_rollouts(), count, seed).tolist() for seed in (0, 0, 1, 2, 3)]
        assert parts[0] == parts[1] and len(set(map(str, parts))) > 2


def test_of_too_few_contexts_the_samples_are_divided_each_context_alike():
    rollouts = pack([Context(i, str(i), (i,)) for i in range(2)], [[([7], [0.0], False)] * 13] * 2)
    part = division(rollouts, 3, seed=0)
    shares = [part[rollouts.context_index == i].bincount().tolist() for i in range(2)]
    assert shares == [[5, 4, 4]] * 2 and part[:13].tolist() != part[13:].tolist()
    assert part[:13].tolist() != sorted(part[:13].tolist())  # an engine may list completions as they ended


def settings(model, folder, updates=4, **sections):
    sections = {"contexts": {"train": str(runs.write_contexts(folder, *FOUR))}} | sections
    trainer = {"rounds": 4, "contexts_per_round": 4, "checkpoint_every": 2, "updates_per_round": updates}
    config = runs.settings(model, folder / "run", **sections)
    return runs.merged(config, {"trainer": trainer | sections.get("trainer", {})})


def trained(model, folder, **sections):
    folder.mkdir(exist_ok=True)
    assert runs.call("train", runs.write_config(folder, settings(model, folder, **sections))) == 0
    return runs.rows(folder / "run/metrics.jsonl")


def test_later_updates_find_samples_of_older_weights(tiny_model, tmp_path):
    rows = trained(tiny_model, tmp_path, optimizer={"learning_rate": 3e-3})
    assert [row["policy/updates"] for row in rows] == [4] * 4
    for row in rows:
        shares = [row[f"policy/ratio_ess/{i}"] for i in range(1, 5)]
        assert shares[0] > 1 - 1e-6 > max(shares[1:]) and min(shares) >= 0.5
        assert row["policy/ratio_ess"] == min(shares) and row["policy/log_ratio_max"] > 1e-2


def test_one_context_is_enough_if_it_has_samples(tiny_model, tmp_path):
    rows = trained(tiny_model, tmp_path, trainer={"contexts_per_round": 1, "samples_per_context": 8})
    assert [row["policy/updates"] for row in rows] == [4] * 4


def test_a_round_ends_when_its_samples_are_too_far_away(tiny_model, tmp_path, capsys):
    sections = {"optimizer": {"learning_rate": 0.1}, "trainer": {"rounds": 1, "samples_per_context": 32}}
    (row,) = trained(tiny_model, tmp_path, **sections)
    assert row["policy/updates"] == 1 and row["policy/ratio_ess"] == row["policy/ratio_ess/2"] < 0.5
    assert "policy/ratio_ess/3" not in row and "  1 updates  " in capsys.readouterr().err
    # and what was learned is one update of one context, of weights that a gradient left behind does not move again
    config = parse_config(settings(tiny_model, tmp_path, **sections) | {"run_dir": str(tmp_path / "again")})
    trainer = Trainer(config)
    trainer.train(evaluate=False)
    learner = trainer.session.state.learner
    assert all(p.grad is None for p in learner.policy.model.parameters())
    assert {int(state["step"]) for state in learner.optimizer.state.values()} == {1}


def test_what_one_update_learns_nothing_from_leaves_the_others(tiny_model, tmp_path, monkeypatch):
    trainer = Trainer(parse_config(settings(tiny_model, tmp_path, trainer={"rounds": 1})))
    learner, calls = trainer.session.state.learner, itertools.count()
    step = learner.step

    def overflowing(loss, weights, index):
        if next(calls) == 1:
            next(p for p in learner.policy.model.parameters() if p.grad is not None).grad.fill_(float("inf"))
        return step(loss, weights, index)

    monkeypatch.setattr(learner, "step", overflowing)
    trainer.train(evaluate=False)
    (row,) = runs.rows(tmp_path / "run/metrics.jsonl")
    assert (
        row["policy/updates"] == 4 and row["policy/skipped"] == 0 and not math.isfinite(float(row["policy/grad_norm"]))
    )
    assert {int(state["step"]) for state in learner.optimizer.state.values()} == {3}


@pytest.mark.parametrize(
    "sections",
    [{}, {"trainer": {"pipeline_depth": 1}}, {"proposal": {"kind": "adaptive", "every": 2}}, {"lora": {"rank": 2}}]
    + [{"dtype": "bfloat16"}, {"loss": {"ratio": "none"}, "divergence": "reverse_kl", "target": "soft"}],
    ids=["plain", "a round ahead", "adaptive proposal", "LoRA", "bfloat16", "no ratio"],
)
def test_a_resumed_run_is_the_same_run(sections, tiny_model, tmp_path):
    if sections.get("target") == "soft":
        sections = sections | {"target": [{"kind": "rlhf", "beta": 0.5, "feature": runs.LETTERS["feature"]}]}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        runs.write_config(folder, settings(tiny_model, folder, updates=2, **sections))
    assert runs.run(whole, "train", "config.yaml").status == 0
    assert runs.run(killed, "train", "config.yaml", at=runs.Moment("open", "metrics.jsonl", 4)).status == -9
    assert runs.run(killed, "train", "--resume", "run").status == 0
    runs.assert_equal(runs.record(killed / "run"), runs.record(whole / "run"))
    assert [row["policy/updates"] for row in runs.rows(whole / "run/metrics.jsonl")] == [2] * 4


def test_more_updates_than_contexts_are_refused(tiny_model, tmp_path):
    for contexts_per_round in (16, 3):
        trainer = {"contexts_per_round": contexts_per_round, "samples_per_context": 9}
        given = settings(tiny_model, tmp_path, updates=5, trainer=trainer)
        needed = "5 contexts in a round, which has [34], or trainer.samples_per_context: 10$"
        with pytest.raises(UserError, match=f"^trainer.updates_per_round: 5 updates need {needed}"):
            Session(parse_config(given))
    assert not (tmp_path / "run").exists()
