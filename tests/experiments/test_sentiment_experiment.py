"""RLHF is reverse KL: the plain REINFORCE of the sentiment experiment and fdpg-fast draw one learning curve."""

from pathlib import Path

import pytest

from fdpg_fast.errors import UserError
from fdpg_fast.imports import import_object
from support import runs

RUNNER = str(Path(__file__).parents[2] / "examples/experiments/sentiment/reinforce.py") + ":run_case"
VOWELS = (
    'def vowels(completions):\n    return [sum(c in "aeiou" for c in text) / (1 + len(text)) for text in completions]\n'
)


@pytest.fixture
def run_case():
    return import_object(RUNNER)


@pytest.mark.parametrize(("beta", "max_grad_norm"), [(0.1, 1.0), (0.02, 1e6)], ids=["clipped", "not clipped"])
def test_reinforce_and_reverse_kl_have_the_same_curve(beta, max_grad_norm, run_case, tiny_model, tmp_path):
    (tmp_path / "vowels.py").write_text(VOWELS)
    reward = {"kind": "import", "path": f"{tmp_path}/vowels.py:vowels"}
    settings = runs.settings(
        tiny_model,
        "unused",
        contexts={"train": str(runs.write_contexts(tmp_path, *runs.PROMPTS))},
        target=[{"kind": "rlhf", "beta": beta, "feature": reward}],
        engine={"kind": "transformers"},
        optimizer={"learning_rate": 3e-3, "warmup_rounds": 1, "max_grad_norm": max_grad_norm, "weight_decay": 0.01},
        trainer={"rounds": 6, "samples_per_context": 32},
    )
    ours, plain = (
        run_case({**settings, "algorithm": algorithm}, 3, tmp_path / algorithm)
        for algorithm in ("reverse_kl", "reinforce")
    )
    assert [point.keys() for point in ours.curve] == [{"round", "target/vowels", "policy/kl_to_base"}] * 6
    for key, tolerance in (("round", 0), ("target/vowels", 1e-9), ("policy/kl_to_base", 2e-4)):
        found, expected = ([point[key] for point in row.curve] for row in (plain, ours))
        assert found == pytest.approx(expected, abs=tolerance)
    assert ours.curve[-1]["policy/kl_to_base"] > 0.01  # it has moved
    for name in ("feature/vowels", "kl_to_base", "entropy_per_token", "divergence/reverse_kl"):
        assert plain.metrics[name].value == pytest.approx(ours.metrics[name].value, abs=2e-3)


def test_runner_refuses_what_it_does_not_do(run_case, tiny_model, tmp_path):
    settings = runs.settings(tiny_model, "unused")
    with pytest.raises(UserError, match="algorithm: None: choose reinforce or reverse_kl"):
        run_case(settings, 0, tmp_path)
    with pytest.raises(UserError, match="one target of kind rlhf"):
        run_case(
            {**settings, "target": [runs.LETTERS], "divergence": "reverse_kl", "algorithm": "reinforce"}, 0, tmp_path
        )
