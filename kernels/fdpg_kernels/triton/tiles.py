"""Tiles of the matrix product: a handful a chip, compiled and checked ahead of time, chosen by a written rule.

The rule, from counts of bytes and instructions (docs/kernels.md):
* a wide hidden state (D ≥ 1024) spends its time in the product: the widest tile that does not spill;
* a narrow one spends it in the epilogue: a tile small enough for two programs a multiprocessor, so that the epilogue
  of one runs beside the product of the other;
* bias and soft cap cost registers: a small tile again;
* TMA needs rows that start at multiples of 16 bytes, pointers do not;
* row tiles that share a slice of the head: as many as keep their hidden states in a third of L2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

WIDE = 1024  # D from which the product outweighs the epilogue


@dataclass(frozen=True)
class Config:
    """A tile of BM tokens × BV vocabulary entries × BD hidden units, and how it is compiled and launched."""

    BM: int
    BV: int
    BD: int
    num_warps: int
    num_stages: int
    tma: bool
    programs_per_sm: int
    group_rows: int = 16


HOPPER_WIDE = Config(128, 256, 64, num_warps=8, num_stages=3, tma=True, programs_per_sm=1)
HOPPER_SMALL = Config(128, 128, 64, num_warps=8, num_stages=2, tma=True, programs_per_sm=2)
BLACKWELL = Config(128, 128, 64, num_warps=8, num_stages=3, tma=True, programs_per_sm=1)
POINTERS = Config(128, 128, 32, num_warps=8, num_stages=3, tma=False, programs_per_sm=2)
POINTERS_SMALL = Config(128, 64, 32, num_warps=8, num_stages=3, tma=False, programs_per_sm=2)
INTERPRETED = Config(16, 32, 16, num_warps=4, num_stages=1, tma=True, programs_per_sm=1, group_rows=2)

SHIPPED = {
    80: (POINTERS, POINTERS_SMALL),
    90: (HOPPER_WIDE, HOPPER_SMALL, POINTERS, POINTERS_SMALL),
    100: (BLACKWELL, POINTERS, POINTERS_SMALL),
}
PLAIN_ONLY = (HOPPER_WIDE, POINTERS)  # with a bias or a soft cap they would spill
SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a program may have; the compiler does not check it


def candidates(capability: int, *, aligned: bool) -> list[Config]:
    """Shipped tiles that a chip of this compute capability can run (90 is a Hopper; 0 Triton's interpreter)."""
    if capability == 0:
        return [replace(INTERPRETED, tma=tma) for tma in (True, False) if aligned or not tma]
    # consumer Blackwell has no room for the others
    generation = 80 if capability >= 120 else max(chip for chip in SHIPPED if chip <= capability)
    return [config for config in SHIPPED[generation] if aligned or not config.tma]


def choose(capability: int, width: int, *, aligned: bool, plain: bool, l2_bytes: int = 50 * 2**20) -> Config:
    """The tile that the rule gives; see `candidates` for the capability.

    Args:
        width: D.
        aligned: every row of hidden, head and E starts at a multiple of 16 bytes.
        plain: neither bias nor soft cap.
    """
    possible = candidates(capability, aligned=aligned)
    if capability == 0:
        return possible[0]
    if not plain:
        possible = [config for config in possible if config not in PLAIN_ONLY]
    config = HOPPER_SMALL if HOPPER_SMALL in possible and width < WIDE else possible[0]
    rows = l2_bytes // 3 // (2 * width * config.BM)
    return replace(config, group_rows=max(8, min(64, rows)))
