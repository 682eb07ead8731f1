"""The real vLLM beside a learner of two processes: one in each, and one over both."""

from __future__ import annotations

import pytest

from support import processes, runs

from .test_runs import differences


@pytest.fixture(scope="module")
def finished(vllm_model, tmp_path_factory):
    """Three contexts do not divide by two: one engine gets two of them.

    Where each process has an engine, it is closed behind the second round, and another takes its place.
    """
    folder = tmp_path_factory.mktemp("vllm")
    for width in (1, 2):
        config = runs.settings(
            vllm_model,
            folder / str(width),
            engine={"kind": "vllm", "tensor_parallel": width, "max_new_tokens": 8},
            contexts={"train": str(runs.write_contexts(folder, *runs.PROMPTS))},
            trainer={"rounds": 3, "contexts_per_round": 3, "samples_per_context": 4},
        )
        train: list[object] = ["train", runs.write_config(folder, config)]
        resume: list[object] = ["train", "--resume", folder / "1", "--trainer.rounds=3"]
        ended = processes.run(*([train] if width == 2 else [[*train, "--trainer.rounds=2"], resume]))
        assert ended.returncode == 0, ended.stderr
    return folder


@pytest.mark.parametrize("width", ["1", "2"])
def test_log_probs_are_the_learners_after_every_sync(finished, width):
    rows = runs.rows(finished / width / "metrics.jsonl")
    assert len(rows) == 3 and max(row["engine/logprob_gap_max"] for row in rows) < 1e-4
    assert rows[-1]["policy/kl_to_base"] != rows[0]["policy/kl_to_base"]  # the weights have moved


def test_samples_do_not_depend_on_how_many_engines_there_are(finished):
    found = differences(finished / "1", finished / "2")
    assert {key: value for key, value in found.items() if not value <= 1e-4} == {}
