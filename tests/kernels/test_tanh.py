"""The tanh of the soft cap, under Triton's interpreter, over what logits can be."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fdpg_kernels.triton.gemm import tanh, tanh_of_small


@triton.jit
def tanh_of_all(x_ptr, out_ptr, SMALL: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tanh_of_small(x) if SMALL else tanh(x))


def found(x, small=False):
    out = torch.empty_like(x)
    tanh_of_all[(len(x) // 1024,)](x, out, SMALL=small, BLOCK=1024)
    return out


@pytest.mark.parametrize(("largest", "small"), [(1.0, True), (1e2, False)])
def test_right_to_a_part_in_a_million_everywhere(largest, small):
    half = np.geomspace(1e-8, largest, 2**15)
    x = torch.from_numpy(np.concatenate([-half, half])).float()
    expected = x.double().tanh()
    assert float((found(x, small).double() / expected - 1).abs().max()) < (2e-7 if small else 5e-7)


def test_what_is_no_number_and_the_ends():
    x = torch.tensor([0.0, float("inf"), -float("inf"), float("nan")]).repeat(256)
    assert torch.equal(found(x)[:3], torch.tensor([0.0, 1.0, -1.0])) and bool(found(x)[3].isnan())
