"""Sampling from an older policy until the new one is nearer to the target."""

import pytest
import torch

from fdpg_fast.proposal import kl_gain
from support import runs

CASES = {  # texts of two contexts: how often q says them in 100, and p and π of each
    0: ([70, 20, 10], [0.2, 0.5, 0.3], [0.3, 0.4, 0.3]),
    1: ([25, 25, 50], [0.0, 0.6, 0.4], [0.5, 0.1, 0.4]),
}


def every_text_as_often_as_q_says_it():
    rows, exact = [], []
    for context, (counts, target, policy) in CASES.items():
        q, p, pi = (torch.tensor(x, dtype=torch.float64) for x in ([n / 100 for n in counts], target, policy))
        divergence = [torch.where(p > 0, p * (p / x).log(), 0.0).sum() for x in (q, pi)]
        exact.append(float(divergence[0] - divergence[1]))
        score = (7.0 + context) + p.log()  # P = Z·p, and Z is another in each context
        times = torch.tensor(counts)
        rows.append([x.repeat_interleave(times) for x in (score - q.log(), (pi / q).log(), torch.full((3,), context))])
    log_weight, log_ratio, contexts = (torch.cat(column) for column in zip(*rows, strict=True))
    return log_weight, log_ratio, contexts, exact


def test_the_gain_is_the_difference_of_exact_divergences_averaged_over_contexts():
    log_weight, log_ratio, contexts, exact = every_text_as_often_as_q_says_it()
    assert exact[0] > 0.1 > -0.1 > exact[1]  # π is nearer in one context, q in the other
    order = torch.randperm(len(contexts), generator=torch.Generator().manual_seed(0))
    assert kl_gain(log_weight[order], log_ratio[order], contexts[order]) == pytest.approx(sum(exact) / 2, rel=1e-12)
    assert kl_gain(log_weight[:100], log_ratio[:100], contexts[:100]) == pytest.approx(exact[0], rel=1e-12)


def test_contexts_without_a_possible_sample_say_nothing():
    log_weight, log_ratio, contexts, exact = every_text_as_often_as_q_says_it()
    impossible = log_weight.masked_fill(contexts == 1, -torch.inf)
    assert kl_gain(impossible, log_ratio, contexts) == pytest.approx(exact[0], rel=1e-12)
    assert kl_gain(torch.full_like(log_weight, -torch.inf), log_ratio, contexts) == 0.0


def adaptive(rounds, **sections):
    trainer = {"rounds": rounds, "checkpoint_every": 2, "samples_per_context": 128, "contexts_per_round": 3}
    return {"divergence": "forward_kl", "proposal": {"kind": "adaptive", "every": 3}, "trainer": trainer} | sections


@pytest.mark.parametrize(("learning_rate", "better"), [(3e-4, True), (0.3, False)])
def test_the_policy_is_taken_where_it_is_nearer_and_only_there(learning_rate, better, tiny_model, tmp_path):
    folder = runs.train(tiny_model, tmp_path, **adaptive(8, optimizer={"learning_rate": learning_rate}))
    rows = runs.rows(folder / "metrics.jsonl")
    assert [k for k, row in enumerate(rows) if "proposal/kl_gain" in row] == [2, 5]
    version = 0
    for k, row in enumerate(rows):
        assert row["proposal/version"] == version
        assert row["engine/logprob_gap_max"] < 1e-4  # of the weights that are sampled from
        assert (row["policy/log_ratio_max"] < 1e-4) == (version == k)
        if row.get("proposal/kl_gain", 0.0) > 0:
            version = k + 1
    assert (version > 0) == better and (better or rows[2]["proposal/kl_gain"] < 0)
    after = runs.rows(folder / "evaluation.jsonl")[-1]["metrics"]["kl_to_base"]["value"]
    assert abs(after) > 1e-4  # of the policy, not of the proposal, which at version 0 is the base


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["full", "lora"])
def test_a_killed_run_resumes_with_its_proposal(lora, tiny_model, tmp_path):
    def write(folder):
        folder.mkdir()
        contexts = {"train": str(runs.write_contexts(folder, *runs.PROMPTS))}
        sections = adaptive(8, contexts=contexts, optimizer={"learning_rate": 3e-4})
        return runs.write_config(folder, runs.settings(tiny_model, folder / "run", lora=lora, **sections))

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert runs.run(whole, "train", write(whole)).status == 0
    assert any(row["proposal/version"] == 3 for row in runs.rows(whole / "run/metrics.jsonl"))
    # resumes after round 4: the proposal is of version 3, one round of the interval is over
    assert runs.run(killed, "train", write(killed), at=runs.Moment("open", "metrics.jsonl", 6)).status == -9
    ended = runs.run(killed, "train", "--resume", "run")
    assert ended.status == 0, ended.stderr
    runs.assert_equal(runs.record(killed / "run"), runs.record(whole / "run"))


@pytest.mark.parametrize(
    ("sections", "complaint"),
    [
        ({"trainer": {"pipeline_depth": 1}}, "proposal.kind: adaptive decides itself how old its weights are"),
        (
            {"engine": {"kind": "vllm_server", "urls": ["http://localhost:1"], "weight_transfer": "ipc"}},
            "proposal.kind: adaptive samples with weights that the learner had before, but with engine.weight_transfer",
        ),
    ],
)
def test_what_cannot_keep_older_weights_is_refused(sections, complaint, tiny_model, tmp_path, capsys):
    sections = {"proposal": {"kind": "adaptive"}, **sections}
    assert runs.call("train", runs.write_config(tmp_path, runs.settings(tiny_model, tmp_path / "run", **sections))) == 2
    assert complaint in capsys.readouterr().err and not (tmp_path / "run").exists()
