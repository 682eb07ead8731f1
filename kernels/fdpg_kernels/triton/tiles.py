"""Tiles of the matrix product: a handful, compiled and checked ahead of time, chosen by a written rule.

The rule, from counts of bytes and instructions (docs/kernels.md):
* a tile of 128×256 asks L2 for a byte every 85 operations, one of 128×128 every 64. The wide one holds an SM alone,
  so its epilogue has nothing beside it: the price of 128×256 exponentials, whatever D is. Two square ones hide each
  other's. By estimate (benchmarks/estimate.py) the wide one is faster from D ≈ 690 on an H200, from 970 on a B200;
* a bias, a soft cap, row temperatures or float32 in two halves need registers: a square tile, alone, with its loads
  four deep instead;
* chips that multiply from registers (Ampere, Ada, consumer Blackwells) load square tiles through pointers: by TMA they
  spill with Triton 3.6;
* TMA needs rows that start at multiples of 16 bytes, wide loads through pointers a D that ends with a tile. What has
  neither (no model that we know) takes a tile small enough for the addresses that it then needs;
* row tiles that share a slice of the head: as many as keep their hidden states in a third of L2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

WIDE_FROM = 768  # D
REGISTERS = 65_536  # of an SM


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

    @property
    def registers(self) -> int:
        """That a thread may take. Told nothing, the assembler spills where it sees room for one program more."""
        return min(255, REGISTERS // (32 * self.num_warps * self.programs_per_sm))


WIDE = Config(128, 256, 64, num_warps=8, num_stages=3, tma=True, programs_per_sm=1)
PAIR = Config(128, 128, 64, num_warps=8, num_stages=2, tma=True, programs_per_sm=2)
SQUARE = Config(128, 128, 64, num_warps=8, num_stages=4, tma=True, programs_per_sm=1)
POINTERS = Config(128, 128, 32, num_warps=8, num_stages=3, tma=False, programs_per_sm=1)
UNALIGNED = Config(128, 64, 32, num_warps=8, num_stages=3, tma=False, programs_per_sm=1)
INTERPRETED = Config(16, 32, 16, num_warps=4, num_stages=1, tma=True, programs_per_sm=1, group_rows=2)

PLAIN_ONLY = (WIDE, PAIR)  # with a bias or a soft cap they spill, or leave no registers for the second program
SHIPPED = {
    80: (POINTERS, UNALIGNED),
    89: (POINTERS, UNALIGNED),
    90: (WIDE, PAIR, SQUARE, UNALIGNED),
    100: (WIDE, PAIR, SQUARE, UNALIGNED),
    103: (WIDE, PAIR, SQUARE, UNALIGNED),
    120: (POINTERS, UNALIGNED),
}
# compiled like the others but chosen by nothing: for a GPU to time beside them
CANDIDATES = (
    Config(128, 128, 64, num_warps=4, num_stages=2, tma=True, programs_per_sm=2),  # a warpgroup each
    Config(128, 128, 32, num_warps=8, num_stages=4, tma=True, programs_per_sm=2),  # more, smaller loads on their way
)
# bytes that a program may have; the compiler does not check it
SHARED_MEMORY = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448, 120: 101_376}


def candidates(capability: int, *, aligned: bool) -> list[Config]:
    """The tiles that a chip of this compute capability can run, those that `choose` never takes among them."""
    if capability == 0:
        return [replace(INTERPRETED, tma=tma) for tma in (True, False) if aligned or not tma]
    chip = max(chip for chip in SHIPPED if chip <= capability)
    extra = CANDIDATES if WIDE in SHIPPED[chip] else ()
    return [config for config in SHIPPED[chip] + extra if aligned or not config.tma]


def choose(capability: int, width: int, *, aligned: bool, plain: bool, l2_bytes: int) -> Config:
    """The tile that the rule gives.

    Args:
        capability: 90 is a Hopper; 0 Triton's interpreter.
        width: D.
        aligned: every row of hidden, head and E starts at a multiple of 16 bytes.
        plain: neither bias nor soft cap nor row temperatures nor halves of float32.
        l2_bytes: size of the chip's L2.
    """
    if capability == 0:
        return replace(INTERPRETED, tma=aligned)
    from_registers = capability < 90 or capability >= 120
    if not aligned or (from_registers and width % POINTERS.BD):
        config = UNALIGNED
    elif from_registers:
        config = POINTERS
    elif not plain:
        config = SQUARE
    else:
        config = WIDE if width >= WIDE_FROM else PAIR
    rows = l2_bytes // 3 // (2 * width * config.BM)
    return replace(config, group_rows=max(8, min(64, rows)))
