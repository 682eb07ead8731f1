"""What gpu.py finds out and in which order: the time budget cuts from the end.

Correctness comes first, in many processes at a time, while others compile what will be timed; then the breakdown; then
whole shapes. What is timed has the device to itself.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from benchmarks import gpu_breakdown, gpu_cases, gpu_checks, gpu_shapes, gpu_timer
from benchmarks.gpu_breakdown import CHUNK, PRODUCTS, TILE_MODES
from benchmarks.gpu_cases import Shape
from benchmarks.gpu_methods import FIRST, METHODS, SMALL_CHUNKS, obstacle
from benchmarks.gpu_process import Record, Step
from fdpg_kernels.triton import tiles
from fdpg_kernels.triton.tiles import Config

TRITON = ("ours (triton)", "Liger scaled CE", "CCE exact", "quack chunked, sum only", "Liger fused linear CE")
SLOW = 150.0  # seconds of silence that a compiler may need


class Phase(NamedTuple):
    name: str
    jobs: list[list[Step]]
    parallel: int
    share: float  # of the whole time, by whose end nothing of this phase may begin any more


def make_plan(options: argparse.Namespace, capability: int) -> list[Phase]:
    device, repeats = options.device, options.repeats
    shapes = gpu_cases.SMOKE_SHAPES if options.smoke else gpu_cases.SHAPES
    breakdown = gpu_cases.SMOKE_BREAKDOWN if options.smoke else gpu_cases.BREAKDOWN
    obstacles = {name: obstacle(name, device) for name in METHODS} | dict.fromkeys(options.without, "--without")
    methods = [name for name in METHODS if not obstacles[name] and name != SMALL_CHUNKS]
    configs = tiles_by_name(capability)
    ceilings = Step("ceilings", "products and copies", gpu_timer.ceilings, (device, 5 * repeats))
    checks = [[Step("checks", name, gpu_checks.check, (name, device), silence=SLOW) for name in group]
              for group in gpu_checks.groups()]  # fmt: skip
    together = checks + list(
        _compiling(shapes, breakdown, [name for name in methods if name in TRITON], configs, device)
    )
    whole = [list(_shape(s, [*gpu_shapes.BARE, *methods[:FIRST]], device, repeats)) for s in shapes]
    whole += [list(_shape(shape, methods[FIRST:], device, repeats)) for shape in shapes]
    absent = [Step("shapes", name, leave_out, (reason,), False) for name, reason in obstacles.items() if reason]
    return [
        Phase("ceilings", [[ceilings]], 1, 0.1),
        Phase("checks", together, min(16, os.cpu_count() or 1), 0.4),
        Phase("breakdown", [list(_breakdown(shape, configs, device, repeats)) for shape in breakdown], 1, 0.65),
        Phase("shapes", [absent, *whole], 1, 1.0),
    ]


def afresh(phase: Phase) -> Phase:
    """The same steps once more, under other names."""
    jobs = [[replace(step, name=f"{step.name}, afresh") for step in job] for job in phase.jobs]
    return phase._replace(name=f"{phase.name}, afresh", jobs=jobs)


def tiles_by_name(capability: int) -> dict[str, Config]:
    """Tiles that this chip may run, by what tells them apart."""

    def name(c: Config) -> str:
        size = f"{c.BM}×{c.BV}×{c.BD}{' TMA' * c.tma}"
        return f"{size}, {c.num_warps} warps, {c.num_stages} stages, {c.programs_per_sm} an SM"

    return {name(config): config for config in tiles.candidates(capability, aligned=True)}


def leave_out(reason: str) -> Iterator[Record]:
    yield {"status": "left out", "reason": reason}


def _compiling(
    shapes: Iterable[Shape],
    breakdown: Iterable[Shape],
    methods: list[str],
    configs: dict[str, Config],
    device: str,
) -> Iterator[list[Step]]:
    """A process for each of what Triton has to compile before anything is timed."""
    for shape in shapes:
        for name in methods:
            ours = name.startswith("ours")
            yield [Step("compile", f"{shape.name}, {name}", gpu_shapes.warm, (shape, name, device), ours, SLOW)]
    for shape in breakdown:
        for name, config in configs.items():
            arguments = (shape, config, device)
            yield [Step("compile", f"{shape.name}, {name}", gpu_breakdown.warm_tile, arguments, silence=SLOW)]


def _breakdown(shape: Shape, configs: dict[str, Config], device: str, repeats: int) -> Iterator[Step]:
    for rows in sorted({min(CHUNK, shape.tokens), shape.tokens}):
        for name in (name for name in PRODUCTS if device == "cuda" or "float32" not in name):
            arguments = (shape, rows, name, device, repeats)
            yield Step("breakdown", f"{shape.name}, {rows} rows, {name}", gpu_breakdown.product, arguments)
    yield Step("breakdown", f"{shape.name}, cast", gpu_breakdown.cast, (shape, device, repeats))
    for name in ("ours (triton)", SMALL_CHUNKS):
        arguments = (shape, "loss trained", name, device, repeats)
        yield Step("breakdown", f"{shape.name}, loss trained, {name}", gpu_shapes.measure, arguments)
    for mode in TILE_MODES:
        for name, config in configs.items():
            arguments = (shape, config, mode, device, repeats)
            yield Step("breakdown", f"{shape.name}, {mode}, {name}", gpu_breakdown.tile, arguments)


def _shape(shape: Shape, methods: list[str], device: str, repeats: int) -> Iterator[Step]:
    for mode in gpu_cases.MODES:
        for name in methods:
            if mode.startswith("loss") and "sum only" in name:
                continue  # no f-DPG loss without per-token log-probs
            arguments, ours = (shape, mode, name, device, repeats), name.startswith(("ours", "bare", "PyTorch eager"))
            yield Step("shapes", f"{shape.title}, {mode}, {name}", gpu_shapes.measure, arguments, ours, SLOW)
