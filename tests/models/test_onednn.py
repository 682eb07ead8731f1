"""oneDNN's products beside float64, on every processor that has them: also where MKL is as fast."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fdpg_fast.models import onednn

ROWS, IN, OUT = 66, 272, 240
GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def chosen(monkeypatch):
    monkeypatch.setattr(onednn, "AVAILABLE", True)
    monkeypatch.setattr(onednn, "SMALLEST", ROWS * IN * OUT)


class Calls(TorchDispatchMode):
    """Of oneDNN's product, [M, K] @ [K, N]: (M, K, N) of each."""

    def __init__(self):
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.mkldnn._linear_pointwise:
            self.shapes.append((*args[0].shape, len(args[1])))
        return func(*args, **(kwargs or {}))

    @property
    def count(self) -> int:
        return len(self.shapes)


def drawn(*shape: int, transposed: bool = False, **options) -> torch.Tensor:
    if transposed:
        return torch.randn(*shape[::-1], generator=GENERATOR, **options).T
    return torch.randn(*shape, generator=GENERATOR, **options)


def assert_near(found: torch.Tensor, exact: torch.Tensor) -> None:
    assert found.shape == exact.shape
    assert float((found - exact).abs().max() / exact.abs().max()) < 1e-6


@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize("a_transposed", [False, True])
def test_products(a_transposed, b_transposed):
    a, b = drawn(ROWS, IN, transposed=a_transposed), drawn(IN, OUT, transposed=b_transposed)
    exact, total = a.double() @ b.double(), drawn(ROWS, OUT)
    with Calls() as calls:
        assert_near(onednn.matmul(a, b), exact)
        exact += total.double()
        onednn.add_matmul(total, a, b)
    assert_near(total, exact)
    assert calls.count == 2


@pytest.mark.parametrize("rows", [ROWS, 80], ids=["padded", "whole"])
def test_sums_of_outer_products(monkeypatch, rows):
    monkeypatch.setattr(onednn, "TILE_BYTES", 70 * IN * 4)  # the last of four tiles has 30 rows
    left, right, total = drawn(rows, OUT), drawn(rows, IN), drawn(OUT, IN)
    exact = total.double() + left.double().T @ right.double()
    with Calls() as calls:
        onednn.add_outer(total, left, right)
    assert_near(total, exact)
    assert calls.count == 4


def test_numbers_of_rows_are_few():
    # oneDNN never forgets the code that it made for a shape: a thousand rounds must not fill the memory with it
    weight = drawn(1, 1)
    found = {m: len(onednn.pad_rows(torch.zeros(m, 1), weight)) for m in range(5000)}
    assert all(m <= padded <= max(m + 15, 1.125 * m) for m, padded in found.items())
    assert len(set(found.values())) < 60
    assert all(len(onednn.pad_rows(torch.zeros(m), weight)) == m for m in found.values())  # once is enough
    assert onednn.pad_rows(torch.zeros(17), weight.double()).shape == (17,)

    layer = drawn(OUT, IN).requires_grad_()
    with Calls() as calls:
        for m in range(130, 145):
            onednn.linear(drawn(m, IN).requires_grad_(), layer).sum().backward()
    assert calls.count == 3 * 15 and set(calls.shapes) == {(144, IN, OUT), (144, OUT, IN), (OUT, 144, IN)}


@pytest.mark.parametrize("shape", [(ROWS, IN), (3, ROWS // 3, IN)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
def test_linear_and_its_gradients(shape, bias, transposed):
    inputs = [drawn(*shape), drawn(OUT, IN, transposed=transposed), drawn(OUT) if bias else None]
    upstream = drawn(*shape[:-1], OUT)

    def run(linear, dtype):
        arguments = [None if x is None else x.detach().to(dtype).requires_grad_() for x in inputs]
        result = linear(*arguments)
        return [result, *torch.autograd.grad(result, [x for x in arguments if x is not None], upstream.to(dtype))]

    with Calls() as calls:
        found = run(onednn.linear, torch.float32)
    assert calls.count == 3
    for ours, exact in zip(found, run(F.linear, torch.float64), strict=True):
        assert_near(ours.detach(), exact.detach())


def test_only_the_gradients_that_are_wanted_are_formed():
    weight = drawn(OUT, IN).requires_grad_()
    with Calls() as calls:
        onednn.linear(drawn(ROWS, IN), weight).sum().backward()
    assert calls.count == 2 and weight.grad is not None


@pytest.mark.parametrize(
    ("rows", "dtype", "autocast"),
    [(ROWS - 1, torch.float32, False), (0, torch.float32, False), (ROWS, torch.float64, False)]
    + [(ROWS, torch.bfloat16, False), (ROWS, torch.float32, True)],
    ids=["small", "empty", "float64", "bfloat16", "autocast"],
)
def test_everything_else_is_left_to_pytorch(rows, dtype, autocast):
    x, weight, bias = drawn(rows, IN, dtype=dtype), drawn(OUT, IN, dtype=dtype), drawn(OUT, dtype=dtype)
    with torch.autocast("cpu", enabled=autocast), Calls() as calls:
        assert torch.equal(onednn.linear(x, weight, bias), F.linear(x, weight, bias))
    assert calls.count == 0


@pytest.mark.parametrize("instructions", ["avx2", "avx512_f"])
def test_another_processor_uses_pytorch(instructions, monkeypatch):
    for name in ("Intel(R) Xeon(R)", "AMD EPYC"):
        for there in (True, False):
            found = {"cpu_name": name, instructions: there}
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
            assert onednn._is_faster_here(instructions) == (there and name.startswith("AMD"))
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not onednn._is_faster_here(instructions)
