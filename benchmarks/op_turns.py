"""The ops on a CPU beside plain PyTorch, torch's linear_cross_entropy, CCE and TRL: time and memory, in turns.

PYTHONPATH=kernels:tests python benchmarks/op_turns.py --output FILE.json [--shape smollm2] [--dtype float32]

All run in one process. cut-cross-entropy (which needs a C++ compiler on a CPU) and TRL take part where they can be
imported. Beside seconds there are seconds of all processors together: with --threads 1 these say how long a step takes
while others use the machine too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from process_memory import give_back, memory, restart_peak
from torch import Tensor
from torch.nn.functional import linear_cross_entropy

from fdpg_kernels import fdpg_loss, linear_logprob
from run import machine
from support.storages import extra_memory

SHAPES = {  # N tokens, D hidden, V vocabulary
    "tiny": (8192, 256, 2048),
    "smollm2": (1024, 576, 49152),
    "llama-1b": (512, 2048, 128256),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WORK = ("log-prob forward", "log-prob forward+backward", "f-DPG loss forward", "f-DPG loss forward+backward")
SEQUENCE = 16  # tokens of each sequence, for the loss
LOG_Z = torch.tensor(-0.5)
SLOW = 3.0  # times ours: such a contender has no turn but its first, nothing is decided by it

LogProb = Callable[[Tensor, Tensor, Tensor], Tensor]


class Inputs(NamedTuple):
    """A head and packed sequences; behavior and score are what the sampler and the target might say."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    target_ids: Tensor  # [N]
    behavior: Tensor  # [N]
    score: Tensor  # [B]


class Measured(NamedTuple):
    """One contender at one piece of work.

    Attributes:
        seconds: of each turn.
        processor_seconds: of each turn, of all threads together.
        resident_bytes: of each turn, at its worst moment, beyond what was there before; results are in it.
        extra_bytes: of tensors alive at once beside inputs and results; None where operators hide theirs.
        missing: why there is nothing.
    """

    seconds: list[float]
    processor_seconds: list[float]
    resident_bytes: list[int]
    extra_bytes: int | None = None
    missing: str | None = None


def make_inputs(shape: str, dtype: str) -> Inputs:
    num_tokens, width, vocabulary = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, width, generator=generator).to(DTYPES[dtype])
    weight = torch.randn(vocabulary, width, generator=generator).mul_(width**-0.5).to(DTYPES[dtype])
    target_ids = torch.randint(vocabulary, (num_tokens,), generator=generator)
    behavior = linear_logprob(hidden, weight, target_ids)
    score = behavior.view(-1, SEQUENCE).sum(1) + torch.linspace(-1, 1, num_tokens // SEQUENCE)
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), target_ids, behavior, score)


def plain_logprob(hidden, weight, target_ids):
    """Full logits, log_softmax in float32, gather: what everybody writes first."""
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, target_ids[:, None])[:, 0]


def torch_logprob(**options: Any) -> LogProb:
    """torch's own, whose chunked form is chosen by options; log-probs come in the dtype of the inputs."""

    def logprob(hidden, weight, target_ids):
        chosen = torch.nn.LinearCrossEntropyOptions(**options) if options else None
        return -linear_cross_entropy(hidden, weight, target_ids, reduction="none", options=chosen).float()

    return logprob


def cce_logprob(hidden, weight, target_ids):
    """What cut-cross-entropy has for a CPU: full logits under torch.compile."""
    from cut_cross_entropy import linear_cross_entropy as cce

    return -cce(hidden, weight, target_ids, reduction="none", impl="torch_compile")


def trl_logprob(hidden, weight, target_ids):
    """What TRL's trainers call, as it runs without Triton; its tiles of logits have the dtype of the inputs."""
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, target_ids, 1.0, 32768, None, 1.0, ())[0]


LOGPROB: dict[str, LogProb] = {
    "ours": linear_logprob,
    "plain": plain_logprob,
    "torch": torch_logprob(),
    "torch, chunks by its own choice": torch_logprob(acc_policy="auto"),
    "torch, chunks of 256": torch_logprob(acc_policy="accurate", batch_chunk_size=256),
    "CCE, torch_compile": cce_logprob,
    "TRL, chunks": trl_logprob,
}


COMPILED = ("CCE, torch_compile",)  # by its first call, which says nothing of the next ones
VISIBLE = ("ours", "plain")  # their tensors pass a dispatch mode one by one
OPTIONAL = {"CCE, torch_compile": "cut_cross_entropy", "TRL, chunks": "trl"}


def installed(name: str) -> bool:
    return name not in OPTIONAL or importlib.util.find_spec(OPTIONAL[name]) is not None


def our_loss(inputs: Inputs) -> Tensor:
    cu_seqlens = torch.arange(0, len(inputs.hidden) + 1, SEQUENCE, dtype=torch.int32)
    return fdpg_loss(*inputs[:3], cu_seqlens, inputs.behavior, inputs.score, LOG_Z).loss


def loss_of(logprob: LogProb, inputs: Inputs) -> Tensor:
    """The f-DPG loss for Jensen–Shannon out of somebody's log-probs."""
    log_pi = logprob(*inputs[:3]).view(-1, SEQUENCE).sum(1)
    log_t = log_pi.detach() - inputs.score + LOG_Z
    reward = torch.nn.functional.softplus(-log_t) - torch.log(torch.tensor(2.0))
    ratio = (log_pi.detach() - inputs.behavior.view(-1, SEQUENCE).sum(1)).exp()
    return -(ratio * reward * log_pi).mean()


def make_step(inputs: Inputs, work: str, name: str) -> Callable[[], tuple[Tensor, ...]]:
    """The work as a function that returns its result, or the gradients of hidden and weight."""
    is_loss = work.startswith("f-DPG")
    upstream = None if is_loss else torch.linspace(-1, 1, len(inputs.hidden))  # of each token its own

    def compute() -> Tensor:
        if is_loss:
            return our_loss(inputs) if name == "ours" else loss_of(LOGPROB[name], inputs)
        return LOGPROB[name](*inputs[:3])

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (compute(),)

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(compute(), inputs[:2], upstream)

    return forward_backward if work.endswith("backward") else forward


def run(step: Callable[[], tuple[Tensor, ...]]) -> tuple[float, float, int]:
    """Seconds, seconds of all threads, and resident bytes at the worst moment beyond those before (Linux)."""
    give_back()
    restart_peak()
    before, started, processor_started = memory("VmRSS"), time.perf_counter(), time.process_time()
    returned = step()  # kept until the peak is read
    seconds, processor_seconds = time.perf_counter() - started, time.process_time() - processor_started
    peak = memory("VmHWM") - before
    del returned
    return seconds, processor_seconds, peak


def add(measured: Measured, seconds: float, processor_seconds: float, resident_bytes: int) -> None:
    measured.seconds.append(seconds)
    measured.processor_seconds.append(processor_seconds)
    measured.resident_bytes.append(resident_bytes)


def measure(inputs: Inputs, work: str, turns: int) -> dict[str, Measured]:
    """All contenders, turn by turn."""
    found, steps = {}, {}
    for name in LOGPROB:
        if not installed(name):
            found[name] = Measured([], [], [], missing=f"{OPTIONAL[name]} is not installed")
            continue
        steps[name] = make_step(inputs, work, name)
        seen = extra_memory(steps[name], [*inputs, LOG_Z])["peak_extra_bytes"] if name in VISIBLE else None
        found[name] = Measured([], [], [], seen)
    warm = {name: run(step) for name, step in steps.items()}
    for name, first in warm.items():
        if name not in COMPILED and first[0] > SLOW * warm["ours"][0]:
            del steps[name]
            add(found[name], *first)
    for _ in range(turns):
        for name, step in steps.items():
            add(found[name], *run(step))
    return found


def ratio(found: dict[str, Measured], name: str, clock: str = "seconds") -> float:
    """Ours over another's: the median over the turns that both had."""
    ours, theirs = (getattr(found[of], clock) for of in ("ours", name))
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file, written after every piece of work")
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--work", choices=WORK, nargs="+", default=list(WORK))
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    record: dict[str, Any] = {"machine": machine(), "results": []}
    for shape in given.shape:
        for dtype in given.dtype:
            inputs = make_inputs(shape, dtype)
            for work in given.work:
                found = measure(inputs, work, given.turns)
                one = {"shape": SHAPES[shape], "dtype": dtype, "work": work, "load_average": os.getloadavg()[0]}
                record["results"].append({**one, "contenders": {k: v._asdict() for k, v in found.items()}})
                given.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                print(f"\n{shape}, {dtype}, {work}; load average {one['load_average']:.1f}")
                for name, of in found.items():
                    if of.missing:
                        print(f"  {name:32} {of.missing}")
                        continue
                    print(
                        f"  {name:32} {statistics.median(of.seconds):8.3f} s, ours/it {ratio(found, name):.2f} "
                        f"(processor {ratio(found, name, 'processor_seconds'):.2f}), "
                        f"{statistics.median(of.resident_bytes) / 2**20:6.0f} MiB resident"
                        + (f", {of.extra_bytes / 2**20:.0f} extra" if of.extra_bytes is not None else ""),
                        flush=True,
                    )


if __name__ == "__main__":
    main()
