"""The estimate says of these compiled kernels what docs/kernels.md says of it."""

from pathlib import Path

import pytest

from benchmarks import estimate

ROOT = Path(__file__).parents[2]
COMPILED = ROOT / "benchmarks/results/2026-11-30-compiled-triton-3.9.json"


def test_the_table_of_the_documents_is_what_it_prints(capsys):
    estimate.main(str(COMPILED))
    printed = capsys.readouterr().out
    assert printed.count("\n") == 2 + len(estimate.SHAPES)
    assert printed in (ROOT / "docs/kernels.md").read_text()


@pytest.mark.parametrize("shape", estimate.SHAPES, ids=str)
def test_the_targets_are_met_in_the_middle_case(shape):
    epilogues = estimate.epilogues_of(COMPILED)
    h200, b200 = (estimate.ratio(chip, shape, "after", 1, epilogues) for chip in estimate.CHIPS)
    assert h200 <= (1.20 if shape[1] < 1024 else 1.10) and b200 <= 1.35


def test_a_product_takes_no_less_than_its_operations_and_its_bytes():
    (chip, _) = estimate.CHIPS
    cells = 8192 * 4096
    assert estimate.bare(chip, 8192, 4096, 4096) >= 2 * cells * 4096 / (132 * 4096 * chip.clock)
    assert estimate.bare(chip, 8192, 4096, 8) >= 2 * cells / chip.bandwidth
