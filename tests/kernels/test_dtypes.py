"""float16 heads, and float32 heads multiplied as two bfloat16 halves, under Triton's interpreter against float64.

Stated errors, of z = x·w with |z| up to `largest`:

| what | float16 | float32 in halves |
|---|---|---|
| token log-probs, nats | 1e-6 + 3e-7·largest, as of bfloat16 | 1e-6 + 1e-5·largest |
| gradients, relative | the error of PyTorch's own bfloat16 path | 5e-6 + 1e-5·largest |
"""

import math
from types import SimpleNamespace

import pytest
import torch

from fdpg_kernels import fdpg_loss, linear_logprob, operators
from fdpg_kernels.triton import precision
from support.kernel_cases import head_batch

pytestmark = pytest.mark.usefixtures("poisoned", "rounding")

DTYPES = {"float16": torch.float16, "halves": torch.float32}
LENGTHS = [3, 0, 20, 9, 40, 4]  # with chunks of 32 rows: groups, an empty sequence, one that spans chunks
HEADS = [
    dict(),
    dict(bias=True, temperature=0.6),
    dict(bias=True, softcap=2.5, temperature=torch.linspace(0.7, 1.5, 37)),
]


@pytest.fixture(params=DTYPES)
def dtype(request, monkeypatch):
    monkeypatch.setattr(precision, "SPLIT_FLOAT32", True)
    return DTYPES[request.param]


def head(n, d, v, dtype, std=1.5):
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=rng)
    weight = torch.randn(v, d, generator=rng) * std / d**0.5
    bias = torch.randn(v, generator=rng)
    target_ids = torch.randint(v, (n,), generator=rng)
    return [x.to(dtype) for x in (hidden, weight, bias)], target_ids


def logprob_and_gradients(leaves, target_ids, upstream, impl, dtype, **options):
    leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
    bias = leaves[2] if options.pop("bias", False) else None
    logprob = linear_logprob(*leaves[:2], target_ids, bias=bias, impl=impl, **options)
    logprob.backward(upstream.to(logprob.dtype))
    return logprob.detach().double(), [x.grad.double() for x in leaves if x.grad is not None]


def relative(found, expected):
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def bound(dtype, largest):
    return 1e-6 + (3e-7 if dtype == torch.float16 else 1e-5) * largest


def torchs_own_bfloat16(leaves, target_ids, upstream, bias=False, softcap=None, temperature=1.0):
    """Gradients of plain PyTorch where all is bfloat16."""
    own = [x.bfloat16().requires_grad_() for x in leaves]
    logits = torch.nn.functional.linear(*own) if bias else torch.nn.functional.linear(*own[:2])
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.float() / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    picked = logits.log_softmax(-1).gather(1, target_ids.clamp(min=0)[:, None])[:, 0]
    (picked * upstream).masked_fill(target_ids == -100, 0).sum().backward()
    return [x.grad.double() for x in own if x.grad is not None]


@pytest.mark.parametrize("options", HEADS, ids=["plain", "bias", "bias, soft cap, row temperatures"])
def test_log_probs_and_their_gradients(loads, dtype, options):
    leaves, target_ids = head(37, 40, 70, dtype)
    leaves[0][4] = 0
    largest = float((leaves[0].double() @ leaves[1].double().T).abs().max()) / 0.6
    target_ids[4::5], leaves[0][4] = -100, math.nan
    upstream = torch.randn(37, generator=torch.Generator().manual_seed(1))
    found, gradients = logprob_and_gradients(leaves, target_ids, upstream, "triton", dtype, **options)
    expected, exact = logprob_and_gradients(leaves, target_ids, upstream, "reference", torch.float64, **options)
    assert float((found - expected).abs().max()) < bound(dtype, largest)
    leaves[0][4] = 0
    own = torchs_own_bfloat16(leaves, target_ids, upstream, **options)
    assert len(gradients) == len(own) == 2 + ("bias" in options)
    for mine, theirs, truth in zip(gradients, own, exact, strict=True):
        limit = 5e-6 + bound(dtype, largest) if dtype == torch.float32 else relative(theirs, truth)
        assert relative(mine, truth) < limit


@pytest.mark.parametrize(("width", "std"), [(64, 8), (576, 4), (2048, 8)])
def test_precision_of_halves(width, std, monkeypatch):
    monkeypatch.setattr(precision, "SPLIT_FLOAT32", True)
    (hidden, weight, _), _ = head(16, width, 32, torch.float32, std)
    exact = hidden.double() @ weight.double().T
    target_ids = exact.softmax(-1).multinomial(1, generator=torch.Generator().manual_seed(1))[:, 0]
    found, gradients = logprob_and_gradients([hidden, weight], target_ids, torch.ones(16), "triton", torch.float32)
    expected, truths = logprob_and_gradients([hidden, weight], target_ids, torch.ones(16), "reference", torch.float64)
    limit = bound(torch.float32, float(exact.abs().max()))
    assert float((found - expected).abs().max()) < limit
    for mine, truth in zip(gradients, truths, strict=True):
        assert relative(mine, truth) < 5e-6 + limit
    monkeypatch.setattr(precision, "SPLIT_FLOAT32", False)
    as_it_is, _ = logprob_and_gradients([hidden, weight], target_ids, torch.ones(16), "triton", torch.float32)
    assert not torch.equal(found, as_it_is)  # so it was split


@pytest.mark.parametrize("frozen", [False, True])
def test_loss(dtype, frozen):
    """Small weights, too: a mean over a million sequences, whose gradients float16 would not hold."""
    arguments = head_batch(LENGTHS, vocab=67, width=19, zeros=True)
    arguments = {k: x.detach().to(dtype) if k in ("hidden", "weight", "bias") else x for k, x in arguments.items()}
    arguments["target_ids"][5::7] = -100
    hidden, _ = arguments["hidden"].requires_grad_(), arguments["weight"].requires_grad_(not frozen)
    exact = {k: arguments[k].detach().double().requires_grad_() for k in ("hidden", "weight", "bias")}
    expected = fdpg_loss(**arguments | exact, impl="reference")
    expected.loss.backward()
    into = None if frozen else torch.zeros(67, 19)
    out = fdpg_loss(**arguments, impl="triton", weight_grad_out=into)
    out.loss.backward()
    # a weight is the exponential of a sum of 40 log-probs, each wrong by up to 1e-4 where float32 is split
    weight_limit, limit = (1e-3, 1e-3) if dtype == torch.float32 else (5e-5, 5e-3)
    for found, truth in zip(out.weights, expected.weights, strict=True):
        torch.testing.assert_close(found.to(truth.dtype), truth, rtol=weight_limit, atol=weight_limit)
    assert relative(hidden.grad.double(), exact["hidden"].grad) < limit
    if not frozen:
        few = torch.zeros(67, 19)
        fdpg_loss(**arguments, impl="triton", weight_grad_out=few, total_sequences=10**6).loss.backward()
        for made in (into, few * 10**6 / len(LENGTHS)):
            assert relative(made, exact["weight"].grad) < limit


def test_entropies_and_several_ids(dtype):
    """In one chunk, where gradients need no float32 sum."""
    leaves, _ = head(9, 40, 70, dtype)
    rng = torch.Generator().manual_seed(1)
    target_ids, upstream = torch.randint(70, (9, 3), generator=rng), torch.randn(5, 9, generator=rng)
    target_ids[2, 1], target_ids[3, 1] = target_ids[2, 0], -100
    results, gradients = [], []
    for impl, of in (("triton", dtype), ("reference", torch.float64)):
        hidden, weight, bias = (x.to(of).requires_grad_() for x in leaves)
        found = linear_logprob(hidden, weight, target_ids, bias=bias, return_entropy=True, return_lse=True, impl=impl)
        columns = torch.stack([*found.logprob.unbind(1), found.entropy, found.lse]).double()
        gradients.append(torch.autograd.grad((columns * upstream).sum(), [hidden, weight, bias]))
        results.append(columns.detach())
    largest = float(results[1].abs().max())
    assert float((results[0] - results[1]).abs().max()) < bound(dtype, 2 * largest)
    for mine, truth in zip(*gradients, strict=True):
        assert relative(mine.double(), truth) < (5e-5 if dtype == torch.float32 else 4e-3)


def test_autocast_to_float16():
    (hidden, weight, _), target_ids = head(9, 24, 33, torch.float32)
    with torch.autocast("cpu", torch.float16):
        found = linear_logprob(hidden, weight, target_ids, impl="triton")
    expected = linear_logprob(hidden.half().double(), weight.half().double(), target_ids, impl="reference")
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-6)


def test_what_a_gpu_takes(monkeypatch):
    """float16, bfloat16 and float32 there go to Triton by themselves, float64 does not."""
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        tensor = SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
        expected = "chunked" if dtype == torch.float64 else "triton"
        assert operators.choose_impl("auto", tensor, multiplies=True) == expected
