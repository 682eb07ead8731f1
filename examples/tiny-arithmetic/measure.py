"""How good models are at the two tasks, and how many derivations they know.

    python examples/tiny-arithmetic/measure.py examples/tiny-arithmetic runs/countdown/checkpoints/round-000100

By task and folder, on held-out problems: pass@k, how many different correct derivations the samples of a problem hold,
and which share that is of all that it has. ± is the half-width of a 95 % interval over problems.
"""

import argparse
import itertools
import time
from pathlib import Path

import torch
from features import chain_forms, countdown_forms

from fdpg_fast.contexts import Prompting, load_contexts
from fdpg_fast.engines import TransformersEngine
from fdpg_fast.features import Completions
from fdpg_fast.measure.estimators import mean
from fdpg_fast.measure.pass_at_k import pass_at_k
from fdpg_fast.models.load import load_model, load_tokenizer

FORMS = {"countdown": countdown_forms, "chain": chain_forms}
MAX_NEW_TOKENS, SEED = 32, 0


def measure(folder: str, task: str, problems: int, samples: int) -> None:
    tokenizer, model = load_tokenizer(folder, False), load_model(folder, "float32", "cpu", False)
    prompting = Prompting(tokenizer, model.prompt_room(MAX_NEW_TOKENS), len(tokenizer))
    contexts = load_contexts(str(Path(__file__).parent / "prompts" / f"{task}-eval.jsonl"), prompting)[:problems]
    start = time.monotonic()
    engine = TransformersEngine(model, [tokenizer.eos_token_id], max_new_tokens=MAX_NEW_TOKENS)
    rollouts = engine.sample(contexts, samples, SEED)
    print(f"{task}  {folder}  {len(contexts)} × {samples} samples in {time.monotonic() - start:.0f} s")

    texts = Completions.decode(rollouts, tokenizer)
    forms = FORMS[task](**texts.arguments(FORMS[task]))
    correct = torch.tensor([form is not None for form in forms], dtype=torch.float64)
    found: list[set[str]] = [set() for _ in contexts]
    for i, form in zip(rollouts.context_index.tolist(), forms, strict=True):
        if form is not None:
            found[i].add(form)
    counts = torch.tensor([float(len(forms)) for forms in found], dtype=torch.float64)
    there_are = torch.tensor([float(context.columns["derivations"]) for context in contexts], dtype=torch.float64)
    measured = {f"pass@{k}": value for k, value in pass_at_k(correct, rollouts.context_index).items()}
    measured["different derivations"] = mean(counts, torch.arange(len(contexts)))
    measured["share of all"] = mean(counts / there_are, torch.arange(len(contexts)))
    for name, value in measured.items():
        print(f"  {name}: {value.value:.3f} ± {1.96 * value.standard_error:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders")
    parser.add_argument("--problems", type=int, default=128, help="of each task")
    parser.add_argument("--samples", type=int, default=256, help="of each problem")
    args = parser.parse_args()
    for task, folder in itertools.product(FORMS, args.models):
        measure(folder, task, args.problems, args.samples)


if __name__ == "__main__":
    main()
