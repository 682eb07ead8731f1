"""An estimate of the fused loss, forward and backward, over three bare products, for GPUs that are not here.

    PYTHONPATH=kernels:. python -m benchmarks.estimate benchmarks/results/2026-11-30-compiled-triton-3.9.json

Counted: operations, bytes, chunks as the code cuts them, and instructions of an epilogue as they were compiled.
Assumed: what `CHIPS` says, each as (best, middle, worst) case; all best or all worst give the interval. "Before" is
commit d41fe2c: chunks of at most 4,096 rows and 1 GiB packed greedily, the head's gradient in float32, long sequences
multiplied twice, square tiles on Blackwells, masks in every tile of a ragged vocabulary.
"""

from __future__ import annotations

import json
import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from fdpg_kernels.chunks import CARD_SHARE, CHUNK_ROWS, plan
from fdpg_kernels.triton import tiles
from fdpg_kernels.triton.tiles import Config


class Chip(NamedTuple):
    """Rates of a chip, and what is assumed of it: best, middle, worst."""

    name: str
    capability: int
    processors: int
    memory: float  # bytes
    clock: float  # Hz under load: a guess below the stated boost, for products of this size are limited by power
    operations: int  # bfloat16, of an SM and cycle: the stated dense rate over SMs and boost clock
    bandwidth: float  # bytes/s: 0.9 of what is stated
    cublas: float  # of the tensor cores' rate at that clock
    l2: tuple[float, float, float]  # bytes that an SM gets from L2 in a cycle; no vendor states it


CHIPS = (
    Chip("H200", 90, 132, 141e9, 1.60e9, 4096, 4.3e12, 0.92, (56.0, 46.0, 36.0)),
    Chip("B200", 100, 148, 180e9, 1.55e9, 8192, 7.2e12, 0.90, (91.0, 66.0, 49.0)),
)
SPECIAL = 16  # exponentials of an SM and cycle, as NVIDIA's programming guide states for both
ISSUED = 128  # instructions of an SM and cycle, counted by thread: four schedulers of a warp
EXPOSED = (950, 1200, 1700)  # cycles of an epilogue beyond its instructions: drain, barriers, stores, first loads
GRADIENT_TRAFFIC = (0.35, 0.6, 0.9)  # share of a float32 head gradient's traffic that its product does not hide
LAUNCH = (2e-6, 3e-6, 5e-6)  # seconds between two kernels, and of one that finds nothing to do
ROW_KERNEL = {"before": (10e-6, 15e-6, 25e-6), "after": (4e-6, 6e-6, 10e-6)}  # find and finish then; sum_rows now
# instructions of an epilogue for each logit at d41fe2c, Triton 3.9: (chip, BV, ragged)
OLD_EPILOGUE = {
    (90, 256, False): 4.16, (90, 256, True): 7.73, (90, 128, False): 4.62, (90, 128, True): 8.06,
    (100, 128, False): 4.02, (100, 128, True): 10.16,
}  # fmt: skip
OLD_TILES = {90: (tiles.WIDE, tiles.PAIR), 100: (tiles.replace(tiles.SQUARE, num_stages=3),) * 2}  # D ≥ 1,024, below
SHAPES = (  # N, D, V, lengths of sequences from, to
    (16384, 576, 49152, 128, 384), (16384, 1024, 151936, 128, 384), (32768, 1024, 151936, 128, 384),
    (8192, 2048, 128256, 128, 384), (8192, 2048, 151936, 8192, 8193), (4096, 3584, 262144, 128, 384),
    (8192, 4096, 128256, 128, 384), (8192, 4096, 151936, 128, 384),
)  # fmt: skip


def bare(chip: Chip, m: int, n: int, k: int) -> float:
    """Seconds of a product [m, k] × [k, n] by cuBLAS: whole waves of its best tile, or its bytes."""
    waves = []
    for bm, bn in ((128, 256), (256, 128), (128, 192), (128, 128)):
        for pieces in (1, 2, 4):  # of k, which fill SMs that would stay idle
            count = math.ceil(m / bm) * math.ceil(n / bn) * pieces
            waves.append(math.ceil(count / chip.processors) * bm * bn / pieces * (1 + 0.02 * (pieces - 1)))
    cycles = min(waves) * 2 * k / chip.operations / chip.cublas
    return max(cycles / chip.clock, 2 * (m * n + m * k + k * n) / chip.bandwidth)


def head_gemm(chip: Chip, c: int, d: int, v: int, config: Config, epilogue: float, case: int) -> float:
    """Seconds of the product with the epilogue on c rows."""
    logits = config.BM * config.BV
    loop = max(2 * logits * d / chip.operations, 2 * (config.BM + config.BV) * d / chip.l2[case])
    special, issued = logits / SPECIAL, epilogue * logits / ISSUED
    beside = (max(special, issued), (max(special, issued) + special + issued) / 2, special + issued)[case]
    exposed = beside + EXPOSED[case]
    tile = loop + exposed if config.programs_per_sm == 1 else max(loop, (loop + exposed) / 2, beside)
    waves = math.ceil(math.ceil(c / config.BM) * math.ceil(v / config.BV) / chip.processors)
    return max(waves * tile / chip.clock, 2 * (v * d + c * d + c * v) / chip.bandwidth)


def greedy(ends: list[int], rows: int) -> list[list[int]]:
    """Heights of the chunks of each group, as d41fe2c cut them."""
    groups, start = [], 0
    for before, end in pairwise(ends):
        if end - start > rows and before > start:
            groups.append(before - start)
            start = before
    groups.append(ends[-1] - start)
    return [[min(rows, g - i) for i in range(0, g, rows)] for g in groups]


def ratio(chip: Chip, shape: tuple[int, ...], when: str, case: int, epilogues: dict) -> float:
    """Of the loss's seconds to those of the three products."""
    n, d, v, low, high = shape
    lengths = torch.randint(low, high, (n,), generator=torch.Generator().manual_seed(0)).tolist()
    ends = [0]
    while ends[-1] < n:
        ends.append(min(ends[-1] + lengths[len(ends)], n))
    if when == "before":
        config = OLD_TILES[chip.capability][d < 1024]
        epilogue = OLD_EPILOGUE[chip.capability, config.BV, v % config.BV != 0]
        groups = greedy(ends, min(4096, 2**30 // (2 * v) // 128 * 128))
    else:
        config = tiles.choose(chip.capability, d, aligned=True, plain=True, l2_bytes=2**25)
        epilogue = epilogues[chip.capability, config.BV, v % config.BV != 0]
        rows = min(CHUNK_ROWS, int(chip.memory / CARD_SHARE) // (2 * v) // 128 * 128)
        groups = [[part.stop - part.start for part in group.chunks] for group in plan(ends, rows, 128)]
    chunks = [c for group in groups for c in group]
    seconds = 4 * n * d / chip.bandwidth  # ignored rows are cleared
    for group in groups:
        for c in group:
            product = head_gemm(chip, c, d, v, config, epilogue, case)
            seconds += product * (2 if when == "before" and len(group) > 1 else 1)
            seconds += bare(chip, c, d, v) + bare(chip, v, d, c)
            seconds += ROW_KERNEL[when][case] * (2 if when == "before" else 1) + 9 * LAUNCH[case]
            seconds += (4 + 4 + 10) * c * d / chip.bandwidth  # z_y; c·x; ∇hidden in float32, scaled
        if when == "after" and len(group) > 1:  # ∇head of weight 1, scaled and added
            seconds += 12 * v * d / chip.bandwidth
    if when == "before" or len(chunks) > 1:  # read and written in float32, and cast; bare products write bfloat16
        extra = (8 * len(chunks) - 4 - 2) * GRADIENT_TRAFFIC[case] + 6
        seconds += extra * v * d / chip.bandwidth
    return seconds / (bare(chip, n, v, d) + bare(chip, n, d, v) + bare(chip, v, d, n))


def epilogues_of(compiled: Path) -> dict[tuple[int, int, bool], float]:
    """Instructions for each logit by chip, BV and whether V is ragged."""
    kernels = json.loads(compiled.read_text())["kernels"]
    made = {(kernel["chip"], kernel["name"], kernel["warps"]): kernel.get("epilogue_per_logit") for kernel in kernels}
    return {
        (chip.capability, bv, ragged): made[chip.capability, f"anchored 128×{bv}×64 TMA, {feature}", 8]
        for chip in CHIPS
        for bv in (128, 256)
        for ragged, feature in ((False, "plain"), (True, "ragged V"))
    }


def main(compiled: str) -> None:
    epilogues = epilogues_of(Path(compiled))
    print("| N·D·V |", " | ".join(f"{chip.name} {when}" for chip in CHIPS for when in ("before", "after")), "|")
    print("|---" * 5 + "|")
    for shape in SHAPES:
        cells = []
        for chip in CHIPS:
            for when in ("before", "after"):
                best, middle, worst = (ratio(chip, shape, when, case, epilogues) for case in range(3))
                cells.append(f"{middle:.2f} ({best:.2f}–{worst:.2f})")
        name = "·".join(map(str, shape[:3])) + (f", sequences of {shape[3]:,}" if shape[3] > 1000 else "")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(sys.argv[1])
