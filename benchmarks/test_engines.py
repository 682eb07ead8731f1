"""Engines beside bare vLLM and beside each other: tokens/s, what a sync costs, and the rounds that they make."""

from __future__ import annotations

import statistics

import pytest

from engine_rounds import ROUNDS, Measured, measure_alone
from engine_turns import PHASES
from replay import Replay
from rounds import SETTINGS

SAMPLERS = (
    "bare vLLM",
    "bare vLLM, log-probs",
    "VLLMEngine",
    "TransformersEngine",
)
BARE_TARGET = 0.95  # of bare vLLM's tokens/s, at least
ROUND_TARGET = {"smollm2-135m": 0.85}  # of the round with the Transformers engine, at most
SYNC_TARGET = {"smollm2-135m": 0.03}  # of the round with vLLM, at most
REPLAY = Replay()


@pytest.fixture(scope="session", params=SETTINGS)
def setting_name(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def measured(setting_name: str) -> Measured:
    return measure_alone(setting_name)


def rates(measured: Measured, sampler: str) -> list[float]:
    """Tokens/s of each turn: EOS ends completions as in a run, and tokens are counted."""
    turns = measured.sampling
    return [n / s for n, s in zip(turns.tokens[sampler], turns.seconds[sampler], strict=True)]


def median(measured: Measured, variant: str, phase: str = "whole") -> float:
    return statistics.median(found[phase] for found in measured.rounds[variant])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.benchmark(timer=REPLAY)
def test_sampling(benchmark, measured: Measured, setting_name: str, sampler: str) -> None:
    benchmark.group = f"sampling of {setting_name}"
    benchmark.extra_info["tokens"] = measured.sampling.tokens[sampler]
    benchmark.extra_info["cpu_seconds"] = measured.sampling.cpu_seconds[sampler]
    benchmark.extra_info["tokens_per_second"] = statistics.median(rates(measured, sampler))
    benchmark.extra_info["load_average"] = measured.sampling.load_average
    REPLAY.run(benchmark, measured.sampling.seconds[sampler])


@pytest.mark.benchmark(timer=REPLAY)
def test_sync(benchmark, measured: Measured, setting_name: str) -> None:
    seconds, moved = measured.sync_seconds, measured.sync_bytes
    benchmark.group = f"sync of {setting_name}"
    benchmark.extra_info["moved_bytes"] = moved
    benchmark.extra_info["bytes_per_second"] = moved / statistics.median(seconds)
    benchmark.extra_info["logprob_gap"] = measured.gaps["vllm"]
    REPLAY.run(benchmark, seconds)


@pytest.mark.parametrize(("phase", "variant"), [(phase, variant) for phase in PHASES for variant in ROUNDS])
@pytest.mark.benchmark(timer=REPLAY)
def test_phase(benchmark, measured: Measured, setting_name: str, phase: str, variant: str) -> None:
    benchmark.group = f"round of {setting_name} by engine: {phase}"
    REPLAY.run(benchmark, [found[phase] for found in measured.rounds[variant]])


@pytest.mark.parametrize("variant", ROUNDS)
@pytest.mark.benchmark(timer=REPLAY)
def test_whole_round(benchmark, measured: Measured, setting_name: str, variant: str) -> None:
    benchmark.group = f"round of {setting_name} by engine: whole"
    benchmark.extra_info["cpu_seconds"] = [found["cpu"] for found in measured.rounds[variant]]
    benchmark.extra_info["tokens"] = [found["tokens"] for found in measured.rounds[variant]]
    benchmark.extra_info["logprob_gap_mean"] = measured.round_gaps[variant]
    benchmark.extra_info["load_average"] = measured.load_average
    REPLAY.run(benchmark, [found["whole"] for found in measured.rounds[variant]])


def test_shares_of_a_round(measured: Measured, setting_name: str, comparisons: list[str]) -> None:
    for variant in ROUNDS:
        share = {p: statistics.median(r[p] / r["whole"] for r in measured.rounds[variant]) for p in PHASES}
        parts = ", ".join(f"{phase} {100 * value:.1f} %" for phase, value in share.items())
        comparisons.append(f"{setting_name}, {variant}: round {median(measured, variant):.2f} s: {parts}")


def test_vllm_engine_keeps_the_speed_of_bare_vllm(
    measured: Measured, setting_name: str, comparisons: list[str]
) -> None:
    rate = {sampler: statistics.median(rates(measured, sampler)) for sampler in SAMPLERS}
    share = {sampler: value / rate["bare vLLM"] for sampler, value in rate.items()}
    parts = ", ".join(f"{sampler} {rate[sampler]:,.0f} ({share[sampler]:.3f})" for sampler in SAMPLERS)
    comparisons.append(f"{setting_name}: tokens/s (of bare vLLM's; VLLMEngine's target {BARE_TARGET}): {parts}")
    assert share["VLLMEngine"] >= BARE_TARGET


def test_round_with_vllm_takes_less_than_with_transformers(
    measured: Measured, setting_name: str, comparisons: list[str]
) -> None:
    target = ROUND_TARGET.get(setting_name)
    ratio, cpu = (median(measured, "vllm", unit) / median(measured, "transformers", unit) for unit in ("whole", "cpu"))
    comparisons.append(
        f"{setting_name}: round with vLLM, of that with Transformers: {ratio:.3f}, of CPU seconds {cpu:.3f}"
        + (f" (target {target})" if target else "")
    )
    if target:
        assert ratio <= target


def test_a_sync_is_a_small_part_of_the_round(measured: Measured, setting_name: str, comparisons: list[str]) -> None:
    target = SYNC_TARGET.get(setting_name)
    share = statistics.median(found["sync"] / found["whole"] for found in measured.rounds["vllm"])
    seconds = statistics.median(measured.sync_seconds)
    comparisons.append(
        f"{setting_name}: sync {seconds:.3f} s, {1e-9 * measured.sync_bytes / seconds:.2f} GB/s, "
        f"{100 * share:.1f} % of the round" + (f" (target {100 * target:g} %)" if target else "")
    )
    if target:
        assert share <= target
