"""A round of 64 GPUs, simulated: which share of the time they wait for each other, by how long completions are.

python benchmarks/rank_idle.py benchmarks/results/NAME.json             the table of docs/scaling.md
python benchmarks/rank_idle.py --record benchmarks/results/NAME.json    the same of lengths that are sampled first

Real are the lengths that are called recorded, stretched to one mean, and `share_out` and `micro_batches`. Reckoned are
the seconds: those of memory_table.py for an 8 B model, and of decoding by how much memory a step reads.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fdpg_fast.contexts import Context
from fdpg_fast.ranks import share_out
from fdpg_fast.rollouts import Rollouts
from memory_table import SHAPES, seconds

ROOT = Path(__file__).resolve().parents[1]
WORLD, CONTEXTS, EACH, PROMPT = 64, 512, 16, 256
MEAN, LONGEST = 1000, 8192  # tokens of a completion
MICRO_BATCH, SCORED = 16_384, 4  # tokens of an update's pass, and times as many of one that scores
SHAPE = SHAPES[1]
MEMORY = 0.7 * 3.35e12  # bytes a second that an H100 reads while it decodes
KV = 2 * SHAPE.layers * SHAPE.kv_heads * SHAPE.head_dim * 2  # bytes of a token


def made_up() -> dict[str, Tensor]:
    """Lengths [CONTEXTS, EACH] before they are stretched; half of a logarithm's variance is the context's."""
    generator = torch.Generator().manual_seed(0)

    def log_normal(spread: float) -> Tensor:
        own, shared = (torch.randn(CONTEXTS, n, generator=generator) for n in (EACH, 1))
        return (spread * (own + shared) / 2**0.5).exp()

    cut_off = torch.rand(CONTEXTS, EACH, generator=generator) < 0.05
    return {
        "all equal": torch.ones(CONTEXTS, EACH),
        "log-normal, σ = 0.5": log_normal(0.5),
        "log-normal, σ = 1": log_normal(1.0),
        "σ = 0.5, and 5 % go on to the limit": log_normal(0.5).masked_fill(cut_off, torch.inf),
    }


def stretched(lengths: Tensor) -> Tensor:
    """Of the wanted mean, up to the limit, in whole tokens."""
    low, high = 0.0, 1e6
    for _ in range(60):
        factor = (low + high) / 2
        if (lengths * factor).clamp(1, LONGEST).mean() < MEAN:
            low = factor
        else:
            high = factor
    return (lengths * high).clamp(1, LONGEST).round().long()


def drawn(recorded: list[list[int]]) -> Tensor:
    """As many contexts as a round has out of those recorded, with completions of their own."""
    generator, table = torch.Generator().manual_seed(0), torch.tensor(recorded, dtype=torch.float32)
    contexts = torch.randint(len(table), (CONTEXTS, 1), generator=generator)
    return table[contexts, torch.randint(table.shape[1], (CONTEXTS, EACH), generator=generator)]


def packed(lengths: Tensor) -> Rollouts:
    flat = lengths.flatten()
    total = int(flat.sum())
    return Rollouts(
        contexts=tuple(Context(i, "", (0,) * PROMPT) for i in range(len(lengths))),
        context_index=torch.arange(len(lengths)).repeat_interleave(lengths.shape[1]),
        token_ids=torch.zeros(total, dtype=torch.long),
        cu_seqlens=torch.nn.functional.pad(flat.cumsum(0), (1, 0)).int(),
        behavior_logprob=torch.zeros(total),
        finished=torch.zeros(len(flat), dtype=torch.bool),
    )


def sampling(lengths: Tensor) -> float:
    """Seconds in which one GPU decodes these completions side by side, [contexts, each]."""
    flat = lengths.flatten()
    alive = len(flat) - torch.bincount(flat).cumsum(0)[:-1]  # at each step
    read = 2 * SHAPE.parameters + alive * KV * (PROMPT + torch.arange(len(alive)))
    return float(read.sum()) / MEMORY


def passes(rollouts: Rollouts, tokens: int, share_of_update: float, world: int) -> Tensor:
    """Seconds of each process's passes, [passes, world], in their order."""
    lengths = rollouts.lengths.tolist()
    shares = share_out(list(rollouts.micro_batches(tokens)), lengths, world)

    def cost(rows: slice) -> float:
        prompts = len(set(rollouts.context_index[rows].tolist()))
        return share_of_update * seconds(SHAPE, sum(lengths[rows]) + PROMPT * prompts)

    return torch.tensor([[cost(rows) for rows in own] for own in shares]).T


def learning(rollouts: Rollouts, world: int) -> Tensor:
    """Seconds of all passes of a round, of the base and of the update, [passes, world]."""
    scoring = passes(rollouts, SCORED * MICRO_BATCH, 0.25, world)  # 2 FLOPs a parameter and token for 8
    return torch.cat([scoring, passes(rollouts, MICRO_BATCH, 1.0, world)])


@dataclass(frozen=True)
class Found:
    """Seconds of a round, and shares of time in which a GPU waits, on average."""

    sampling: float  # share of that phase at depth 0
    learning: float
    seconds: tuple[float, float, float]  # depth 0; depth 1 on the same GPUs; depth 1, half of them sample
    waiting: tuple[float, float, float]


def simulate(lengths: Tensor) -> Found:
    """A round: every process samples its contexts; then come passes of the base and of the update, of all at once."""
    rollouts, half = packed(lengths), WORLD // 2
    sampled = torch.tensor([sampling(part) for part in lengths.tensor_split(WORLD)])
    learned = learning(rollouts, WORLD)
    in_turns = float(sampled.max() + learned.amax(1).sum())

    # sampled ahead on the same GPU: half of it for each, and all for sampling while the learner waits for the others
    left, shared = sampled.clone(), 0.0
    for own in learned:
        taken = own + torch.minimum(left, own)
        wall = taken.max()
        left = (left - torch.minimum(left, own) - (wall - taken)).clamp(min=0)
        shared += float(wall)
    shared += float(left.max())

    served = torch.tensor([sampling(part) for part in lengths.tensor_split(half)])
    learned_by_half = learning(rollouts, half)
    apart = max(float(served.max()), float(learned_by_half.amax(1).sum()))

    busy = float(sampled.sum() + learned.sum()) / WORLD
    busy_apart = float(served.sum() + learned_by_half.sum()) / WORLD
    return Found(
        1 - float(sampled.mean() / sampled.max()),
        1 - float(learned.mean(1).sum() / learned.amax(1).sum()),
        (in_turns, shared, apart),
        (1 - busy / in_turns, 1 - busy / shared, 1 - busy_apart / apart),
    )


def table(recorded: dict[str, list[list[int]]]) -> str:
    cases = made_up() | {f"{name}, recorded": drawn(lengths) for name, lengths in recorded.items()}
    head = ["completions", "p50, p99, longest", "waits: sampling", "passes", "a round at depth 0"]
    rows = [[*head, "depth 1, same GPUs", "depth 1, half of them sample"], ["---"] * 7]
    for name, lengths in cases.items():
        tokens = stretched(lengths)
        found = simulate(tokens)
        p50, p99 = (int(tokens.float().quantile(q)) for q in (0.5, 0.99))
        row = [name, f"{p50:,}, {p99:,}, {int(tokens.max()):,}", _percent(found.sampling), _percent(found.learning)]
        pairs = zip(found.waiting, found.seconds, strict=True)
        rows.append([*row, *(f"{_percent(waits)} of {seconds:.0f} s" for waits, seconds in pairs)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _percent(share: float) -> str:
    return f"{100 * abs(share):.0f} %"


def record() -> dict[str, list[list[int]]]:
    """Lengths of 16 completions of 48 prompts each, up to 400 tokens, of the models that this repository ships."""
    from fdpg_fast.config.load import parse_config
    from fdpg_fast.session import Session

    found = {}
    for model in ("tiny-python-lm", "tiny-summariser"):
        with tempfile.TemporaryDirectory() as folder:
            config = {
                "model": str(ROOT / "examples" / model),
                "run_dir": folder + "/run",
                "device": "cpu",
                "target": [{"kind": "pointwise", "feature": {"kind": "regex", "name": "any", "pattern": "."}}],
                "contexts": {"train": str(ROOT / "examples" / model / "prompts" / "train.jsonl")},
                "engine": {"kind": "transformers", "max_new_tokens": 400},
            }
            session = Session(parse_config(config))
            rollouts = session.engine.sample(session.contexts[:48], EACH, 0)
            found[model] = rollouts.lengths.view(-1, EACH).tolist()
            session.sampling.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("lengths", type=Path)
    parser.add_argument("--record", action="store_true", help="write that file first")
    options = parser.parse_args()
    if options.record:
        lines = [f'"{name}": {json.dumps(lengths)}' for name, lengths in record().items()]
        options.lengths.write_text("{" + ",\n".join(lines) + "}\n")
    print(table(json.loads(options.lengths.read_text())))


if __name__ == "__main__":
    main()
