"""Choose prompts on which the base model's parse rate varies widely, and others on which it hardly does.

    python examples/experiments/code/choose_prompts.py

Samples the tiny Python LM on all signatures that it was not trained on, and writes uneven-… and even-….jsonl beside
this file, each for training and evaluation, with the rate that was measured. Takes three minutes on a CPU core.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import torch

from fdpg_fast import load_config
from fdpg_fast.features import python_parses
from fdpg_fast.session import Session

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "tiny-python-lm"
SAMPLES = 64  # a context
NEW_TOKENS = 48  # as in experiment.yaml
CHOSEN = 32  # prompts a file
LEAST = 3 / SAMPLES  # a rarer one is out of reach of the experiment's samples
SEED = 0


def measured(split: str) -> list[tuple[float, dict[str, str]]]:
    """The prompts of a split with their parse rates, from the lowest to the highest."""
    path = MODEL / "prompts" / f"{split}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    overrides = {
        "run_dir": "runs/choose-prompts",  # not written; the quickstart's own may be there already
        "model": str(MODEL),
        "contexts.train": str(path),
        "contexts.eval": str(path),
        "engine.max_new_tokens": str(NEW_TOKENS),
        "evaluation.contexts": str(len(rows)),
    }
    with contextlib.closing(Session(load_config(HERE.parents[1] / "quickstart.yaml", overrides))) as session:
        rollouts = session.engine.sample(session.eval_contexts, SAMPLES, SEED)  # untrained, the policy is the base
        parses = python_parses()(session.scorer.texts(rollouts))
    sums = torch.zeros(len(rows), dtype=torch.float64).index_add(0, rollouts.context_index, parses)
    rates = (sums / SAMPLES).tolist()
    return sorted(zip(rates, rows, strict=True), key=lambda pair: (pair[0], pair[1]["prompt"]))


def main() -> None:
    for split in ("train", "eval"):
        rows = [(rate, row) for rate, row in measured(split) if rate >= LEAST]
        middle = sum(rate < 0.5 for rate, _ in rows)  # the median would differ between the splits
        chosen = {
            "uneven": rows[: CHOSEN // 2] + rows[-CHOSEN // 2 :],
            "even": rows[middle - CHOSEN // 2 : middle + CHOSEN // 2],
        }
        for name, some in chosen.items():
            lines = [json.dumps({**row, "base_rate": round(rate, 3)}) + "\n" for rate, row in some]
            (HERE / f"{name}-{split}.jsonl").write_text("".join(lines), encoding="utf-8")
            rates = torch.tensor([rate for rate, _ in some])
            print(f"{name}-{split}.jsonl: rates {rates.min():.2f} to {rates.max():.2f}, sd {rates.std():.2f}")


if __name__ == "__main__":
    main()
