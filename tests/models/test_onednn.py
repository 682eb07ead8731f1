"""oneDNN's products beside float64, on every processor that has them: also where MKL is as fast."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fdpg_fast.models import onednn

ROWS, IN, OUT = 66, 272, 240
GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def chosen(monkeypatch):
    monkeypatch.setattr(onednn, "IS_FASTER", True)
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


def test_numbers_of_rows_are_few():
    # oneDNN never forgets the code that it made for a shape: a thousand rounds must not fill the memory with it
    found = {m: len(onednn._padded(torch.zeros(m, 1))) for m in range(5000)}
    assert all(m <= padded <= max(m + 15, 1.125 * m) for m, padded in found.items())
    assert len(set(found.values())) < 60
    assert all(len(onednn._padded(torch.zeros(m, 1))) == m for m in found.values())  # once is enough

    layer = drawn(OUT, IN).requires_grad_()
    with Calls() as calls:
        for m in range(130, 145):
            onednn.linear(drawn(m, IN).requires_grad_(), layer).sum().backward()
    assert calls.count == 3 * 15 and set(calls.shapes) == {(144, IN, OUT), (144, OUT, IN), (OUT, 144, IN)}


@pytest.mark.parametrize("shape", [(ROWS, IN), (80, IN), (3, ROWS // 3, IN)], ids=["padded", "whole", "three axes"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("input_transposed", [False, True])
def test_linear_and_its_gradients(shape, bias, transposed, input_transposed):
    inputs = [drawn(*shape), drawn(OUT, IN, transposed=transposed), drawn(OUT) if bias else None]
    if input_transposed:
        inputs[0] = inputs[0].mT.contiguous().mT
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


def test_another_processor_uses_pytorch(monkeypatch):
    for name in ("Intel(R) Xeon(R)", "AMD EPYC"):
        for there in (True, False):
            found = {"cpu_name": name, "avx512_f": there}
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
            assert onednn._is_faster_here() == (there and name.startswith("AMD"))
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not onednn._is_faster_here()


# --- whole models ---


MODELS = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            attention_bias=True,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=32)),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_whose_layers_multiply_in_another_way_is_the_same_model(kind, monkeypatch):
    monkeypatch.setattr(onednn, "SMALLEST", 0)
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    ours = copy.deepcopy(model)
    onednn.speed_up(ours)
    ours = copy.deepcopy(ours)  # which multiplies by its own weights
    for module in ours.modules():
        assert "forward" not in vars(module) or module.forward.__self__ is module
    assert [type(module) for module in ours.modules()] == [type(module) for module in model.modules()]
    assert [*ours.state_dict()] == [*model.state_dict()]

    ids = torch.randint(96, (3, 11))
    with Calls() as calls:
        for one in (model, ours):
            one(ids, labels=ids).loss.backward()
    assert calls.count == 3 * {"llama": 2 * 7 + 1, "gpt2": 2 * 4 + 1}[kind]  # all layers, forward and backward
    torch.testing.assert_close(ours(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    for a, b in zip(ours.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_nothing_changes_where_pytorch_is_as_fast(monkeypatch):
    monkeypatch.setattr(onednn, "IS_FASTER", False)
    model = MODELS["llama"]()
    onednn.speed_up(model)
    assert not any("forward" in vars(module) for module in model.modules())
    x, weight = drawn(ROWS, IN), drawn(OUT, IN)
    with Calls() as calls:
        assert torch.equal(onednn.linear(x, weight), F.linear(x, weight))
    assert calls.count == 0
