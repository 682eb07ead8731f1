"""The ops beside plain PyTorch and torch's own chunked cross-entropy: time, peak extra memory, error to float64."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from fdpg_kernels import fdpg_loss, linear_logprob
from replay import Replay
from support.storages import extra_memory

SHAPES = {"smollm2": (1024, 576, 49152), "tiny": (8192, 256, 2048)}  # N tokens, D hidden, V vocabulary
REPEATS = {"smollm2": 5, "tiny": 9}
SEQUENCE = 16  # tokens of each sequence, for the loss
TIME_LIMIT = 1.05  # of plain PyTorch's
MEMORY_LIMIT = 1 / 8
LOG_Z = torch.tensor(-0.5)


@dataclass
class Inputs:
    """A head and packed sequences in float32; exact: log-probs in float64."""

    shape: str
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    target_ids: Tensor  # [N]
    exact: Tensor  # [N]
    behavior: Tensor  # [N]
    score: Tensor  # [B]
    measured: dict[str, Measured] = field(default_factory=dict)

    @property
    def head(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.target_ids


@dataclass
class Measured:
    """Of each contender the seconds of each repeat, and its memory; and how busy the machine was."""

    seconds: dict[str, list[float]]
    memory: dict[str, dict[str, int]]
    load_average: float

    def ratio(self, of: Callable[[list[float]], float]) -> float:
        return of(self.seconds["ours"]) / of(self.seconds["plain"])


def plain_logprob(hidden, weight, target_ids):
    """Full logits, log_softmax, gather: what everybody writes first."""
    return (hidden @ weight.T).log_softmax(-1).gather(1, target_ids[:, None])[:, 0]


def torch_logprob(hidden, weight, target_ids):
    """torch's linear_cross_entropy in its chunked form."""
    from torch.nn import LinearCrossEntropyOptions

    options = LinearCrossEntropyOptions()
    return -torch.nn.functional.linear_cross_entropy(hidden, weight, target_ids, reduction="none", options=options)


def plain_loss(hidden, weight, target_ids, behavior, score):
    log_pi = plain_logprob(hidden, weight, target_ids).view(-1, SEQUENCE).sum(1)
    log_t = log_pi.detach() - score + LOG_Z
    reward = torch.nn.functional.softplus(-log_t) - torch.log(torch.tensor(2.0))
    ratio = (log_pi.detach() - behavior.view(-1, SEQUENCE).sum(1)).exp()
    return -(ratio * reward * log_pi).mean()


def our_loss(hidden, weight, target_ids, behavior, score):
    cu_seqlens = torch.arange(0, len(hidden) + 1, SEQUENCE, dtype=torch.int32)
    return fdpg_loss(hidden, weight, target_ids, cu_seqlens, behavior, score, LOG_Z).loss


LOGPROB = {"ours": linear_logprob, "plain": plain_logprob, "torch chunked": torch_logprob}
LOSS = {"ours": our_loss, "plain": plain_loss}
WORK = {
    "log-prob forward": LOGPROB,
    "log-prob forward+backward": LOGPROB,
    "f-DPG loss forward": LOSS,
    "f-DPG loss forward+backward": LOSS,
}
CONTENDERS = [(work, name) for work, contenders in WORK.items() for name in contenders]


def make_step(inputs: Inputs, work: str, name: str) -> Callable[[], tuple[Tensor, ...]]:
    """The work as a function that returns its result, or the gradients of hidden and weight."""
    compute, is_loss = WORK[work][name], work.startswith("f-DPG")
    arguments = (*inputs.head, inputs.behavior, inputs.score) if is_loss else inputs.head
    # of each token its own, as sequence weights are
    upstream = None if is_loss else torch.linspace(-1, 1, len(inputs.hidden))

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (compute(*arguments),)

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(compute(*arguments), inputs.head[:2], upstream)

    return forward_backward if work.endswith("backward") else forward


@pytest.fixture(scope="session", params=SHAPES)
def inputs(request) -> Inputs:
    num_tokens, width, vocabulary = SHAPES[request.param]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) * width**-0.5
    target_ids = torch.randint(vocabulary, (num_tokens,), generator=generator)
    parts = [slice(i, i + 512) for i in range(0, num_tokens, 512)]
    exact = torch.cat([plain_logprob(hidden[i].double(), weight.double(), target_ids[i]) for i in parts])
    score = exact.view(-1, SEQUENCE).sum(1).float() + torch.linspace(-1, 1, num_tokens // SEQUENCE)
    head = hidden.requires_grad_(), weight.requires_grad_(), target_ids
    return Inputs(request.param, *head, exact, behavior=exact.float(), score=score)


def measure(inputs: Inputs, work: str) -> Measured:
    """All contenders turn by turn in one process."""
    if work not in inputs.measured:
        steps = {name: make_step(inputs, work, name) for name in WORK[work]}
        tensors = [*inputs.head, inputs.exact, inputs.behavior, inputs.score, LOG_Z]
        memory = {name: extra_memory(step, tensors) for name, step in steps.items()}  # and they are warm
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(REPEATS[inputs.shape]):
            for name, step in steps.items():
                if turn >= 2 and name not in ("ours", "plain"):
                    continue  # nothing is asserted of it, and it takes long
                started = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - started)
        inputs.measured[work] = Measured(seconds, memory, round(os.getloadavg()[0], 2))
    return inputs.measured[work]


REPLAY = Replay()


@pytest.mark.parametrize(("work", "name"), CONTENDERS)
@pytest.mark.benchmark(timer=REPLAY)
def test_time(benchmark, inputs: Inputs, work: str, name: str) -> None:
    measured = measure(inputs, work)
    benchmark.group = f"{work}, {inputs.shape}"
    benchmark.extra_info.update(measured.memory[name], load_average=measured.load_average)
    if work == "log-prob forward":
        (logprob,) = make_step(inputs, work, name)()
        benchmark.extra_info["max_error"] = float((logprob - inputs.exact).abs().max())
    REPLAY.run(benchmark, measured.seconds[name])


@pytest.mark.parametrize("work", WORK)
def test_not_slower_than_plain(inputs: Inputs, work: str, comparisons: list[str]) -> None:
    measured = measure(inputs, work)
    ratio = measured.ratio(statistics.median)
    comparisons.append(
        f"{inputs.shape}, {work}: time ratio {ratio:.2f} (target {TIME_LIMIT}), "
        f"of the fastest {measured.ratio(min):.2f}, load average {measured.load_average}"
    )
    assert ratio <= TIME_LIMIT


@pytest.mark.parametrize("work", WORK)
def test_an_eighth_of_the_memory(inputs: Inputs, work: str, comparisons: list[str]) -> None:
    """Beyond inputs, results and the gradients that both return."""
    ours, plain = (measure(inputs, work).memory[name]["peak_extra_bytes"] for name in ("ours", "plain"))
    comparisons.append(
        f"{inputs.shape}, {work}: peak extra memory {ours / 2**20:.1f} MiB, plain {plain / 2**20:.1f} MiB, "
        f"ratio 1/{plain / ours:.1f} (target 1/{1 / MEMORY_LIMIT:.0f})"
    )
    assert ours <= MEMORY_LIMIT * plain


@pytest.mark.parametrize("work", [work for work in WORK if work.endswith("backward")])
def test_gradients_are_the_same(inputs: Inputs, work: str) -> None:
    """Like is compared with like."""
    for mine, theirs in zip(*(make_step(inputs, work, name)() for name in ("ours", "plain")), strict=True):
        assert float(torch.nn.functional.cosine_similarity(mine.flatten(), theirs.flatten(), dim=0)) > 0.9999
