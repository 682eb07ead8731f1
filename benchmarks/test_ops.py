"""The ops beside plain PyTorch and others' (`op_turns.py`): limits of time, memory and error."""

from __future__ import annotations

import os
import statistics

import pytest
import torch

import op_turns
from op_turns import LOGPROB, SEQUENCE, WORK, Inputs, Measured, make_inputs, make_step, ratio
from replay import Replay

TURNS = {"smollm2": 5, "tiny": 9}
TIME_LIMIT = 1.05  # of the fastest one's
MEMORY_LIMIT = 1 / 8  # of plain PyTorch's
REPLAY = Replay()


@pytest.fixture(scope="session", params=[(shape, dtype) for shape in TURNS for dtype in op_turns.DTYPES], ids="-".join)
def case(request) -> tuple[str, str]:
    return request.param


@pytest.fixture(scope="session")
def inputs(case: tuple[str, str]) -> Inputs:
    return make_inputs(*case)


@pytest.fixture(scope="session")
def measured(case: tuple[str, str], inputs: Inputs) -> dict[str, dict[str, Measured]]:
    return {work: op_turns.measure(inputs, work, TURNS[case[0]]) for work in WORK}


@pytest.mark.parametrize("name", LOGPROB)
@pytest.mark.parametrize("work", WORK)
@pytest.mark.benchmark(timer=REPLAY)
def test_time(benchmark, measured, case: tuple[str, str], work: str, name: str) -> None:
    of = measured[work][name]
    if of.missing:
        pytest.skip(of.missing)
    benchmark.group = ", ".join((work, *case))
    benchmark.extra_info.update(
        load_average=round(os.getloadavg()[0], 2), resident_bytes=of.resident_bytes, extra_bytes=of.extra_bytes
    )
    REPLAY.run(benchmark, of.seconds)


@pytest.mark.parametrize("work", WORK)
def test_not_slower_than_the_fastest(measured, case: tuple[str, str], work: str, comparisons: list[str]) -> None:
    ratios = {name: ratio(measured[work], name) for name, of in measured[work].items() if of.seconds and name != "ours"}
    fastest = max(ratios, key=ratios.__getitem__)
    comparisons.append(
        f"{', '.join((*case, work))}: {ratios['plain']:.2f} of plain PyTorch's time, "
        f"{ratios[fastest]:.2f} of the fastest's ({fastest}; target {TIME_LIMIT}), load {os.getloadavg()[0]:.2f}"
    )
    assert ratios[fastest] <= TIME_LIMIT


@pytest.mark.parametrize("work", WORK)
def test_an_eighth_of_the_memory(measured, case: tuple[str, str], work: str, comparisons: list[str]) -> None:
    """Beyond inputs, results and the gradients that both return."""
    ours, plain = (measured[work][name].extra_bytes for name in ("ours", "plain"))
    comparisons.append(
        f"{', '.join((*case, work))}: peak extra memory {ours / 2**20:.1f} MiB, plain {plain / 2**20:.1f} MiB, "
        f"ratio 1/{plain / ours:.1f} (target 1/{1 / MEMORY_LIMIT:.0f})"
    )
    assert ours <= MEMORY_LIMIT * plain


@pytest.mark.parametrize("name", LOGPROB)
def test_all_do_the_same(inputs: Inputs, case: tuple[str, str], name: str) -> None:
    """Log-probs of a sequence to 1e-3 nats, or to what logits in bfloat16 leave; gradients point the same way."""
    if not op_turns.installed(name):
        pytest.skip(f"{op_turns.OPTIONAL[name]} is not installed")
    (logprob,) = make_step(inputs, WORK[0], name)()
    differences = (logprob - inputs.behavior).view(-1, SEQUENCE).sum(1)
    assert statistics.median(differences.abs().tolist()) < (1e-3 if case[1] == "float32" else 0.5)
    for work in WORK[1], WORK[3]:
        for mine, theirs in zip(*(make_step(inputs, work, of)() for of in ("ours", name)), strict=True):
            similarity = torch.nn.functional.cosine_similarity(mine.float().flatten(), theirs.float().flatten(), dim=0)
            assert float(similarity) > (0.9999 if case[1] == "float32" else 0.999)
