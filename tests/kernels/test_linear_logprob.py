"""linear_logprob against the float64 definition: values and gradients, over ragged shapes and dtypes."""

import pytest
import torch

from fdpg_kernels import linear_logprob, vocabulary_walk

SHAPES = [(1, 1, 1), (1, 3, 2), (2, 1, 7), (7, 5, 13), (33, 17, 101), (64, 64, 257), (130, 3, 1031)]  # N, D, V
OPTIONS = [
    dict(),
    dict(temperature=0.7),
    dict(softcap=2.0),
    dict(temperature=1.7, softcap=30.0),
]


def head(n, d, v, *, dtype=torch.float64, bias=True, seed=0):
    """hidden, weight, target_ids, bias with logits of order 1; every fifth token ignored."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=rng, dtype=torch.float64)
    weight = torch.randn(v, d, generator=rng, dtype=torch.float64) * 2 / d**0.5
    shift = torch.randn(v, generator=rng, dtype=torch.float64)
    target_ids = torch.randint(v, (n,), generator=rng)
    target_ids[4::5] = -100
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight, shift)]
    return leaves[0], leaves[1], target_ids, leaves[2] if bias else None


def reference(hidden, weight, target_ids, bias, upstream, **options):
    """The definition and its gradients in float64, from the inputs as they are rounded."""
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    logprob = linear_logprob(*leaves[:2], target_ids, bias=leaves[2], impl="reference", **options)
    logprob.backward(upstream.double())
    return logprob.detach(), *(None if x is None else x.grad for x in leaves)


def few_rows(monkeypatch, rows, vocab, itemsize):
    """Chunks of `rows` rows, and tiles of a third of the vocabulary and a bit."""
    monkeypatch.setattr(vocabulary_walk, "TILE_ROWS", rows)
    monkeypatch.setattr(vocabulary_walk, "TILE_BYTES", rows * (vocab // 3 + 1) * itemsize)


def test_the_definition_is_log_softmax():
    hidden, weight, target_ids, bias = head(6, 4, 9)
    options = dict(temperature=0.5, softcap=3.0, impl="reference")
    hidden, weight, bias = hidden.detach(), weight.detach(), bias.detach()
    logprob = linear_logprob(hidden, weight, target_ids, bias=bias, **options)
    for i, target in enumerate(target_ids.tolist()):
        logits = (3.0 * torch.tanh((weight @ hidden[i] + bias) / 3.0) / 0.5).exp()
        expected = 0.0 if target == -100 else (logits[target] / logits.sum()).log()
        assert float(logprob[i]) == pytest.approx(float(expected), abs=1e-13)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "value_atol", "gradient_rtol"),
    [
        (torch.float64, 1e-12, 1e-11),
        (torch.float32, 1e-5, 1e-5),
        (torch.bfloat16, 1e-4, 2**-8),  # computed in float32 from the bf16 inputs; gradients are rounded to bf16
    ],
    ids=["float64", "float32", "bfloat16"],
)
def test_chunked_meets_the_definition(monkeypatch, shape, options, bias, dtype, value_atol, gradient_rtol):
    few_rows(monkeypatch, 5, shape[2], 8)
    inputs = head(*shape, dtype=dtype, bias=bias)
    upstream = torch.randn(shape[0], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logprob = linear_logprob(*inputs[:3], bias=inputs[3], impl="chunked", **options)
    assert logprob.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    logprob.backward(upstream.to(logprob.dtype))

    expected, *gradients = reference(*inputs, upstream.to(logprob.dtype), **options)
    torch.testing.assert_close(logprob.double(), expected, rtol=0, atol=value_atol)
    for leaf, gradient in zip((inputs[0], inputs[1], inputs[3]), gradients, strict=True):
        if leaf is not None:
            assert leaf.grad.dtype == dtype
            atol = gradient_rtol * float(gradient.abs().max())
            torch.testing.assert_close(leaf.grad.double(), gradient, rtol=gradient_rtol, atol=atol)


def test_auto_takes_a_path_that_meets_the_definition():
    inputs = head(9, 4, 11)
    logprob = linear_logprob(*inputs[:3], bias=inputs[3])
    torch.testing.assert_close(logprob, reference(*inputs, torch.ones(9))[0], rtol=0, atol=1e-4)


def test_a_tile_of_forbidden_words(monkeypatch):
    few_rows(monkeypatch, 5, 9, 8)  # tiles of 4
    hidden, weight, _, _ = head(7, 3, 9, bias=False)
    bias = torch.zeros(9, dtype=torch.float64).masked_fill_(torch.arange(9) < 5, -torch.inf)
    target_ids = torch.tensor([5, 6, 7, 8, -100, 5, 6])
    logprob = linear_logprob(hidden, weight, target_ids, bias=bias, impl="chunked")
    logprob.sum().backward()
    allowed = torch.where(target_ids < 0, -100, target_ids - 5)
    expected, *gradients = reference(hidden, weight[5:], allowed, None, torch.ones(7))
    torch.testing.assert_close(logprob, expected)
    torch.testing.assert_close(hidden.grad, gradients[0])
    torch.testing.assert_close(weight.grad[5:], gradients[1])
    assert bool((weight.grad[:5] == 0).all())


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_ignored_tokens_count_for_nothing(impl):
    hidden, weight, target_ids, _ = head(10, 4, 9, bias=False)
    logprob = linear_logprob(hidden, weight, target_ids, impl=impl)
    ignored = target_ids == -100
    assert ignored.sum() == 2 and bool((logprob[ignored] == 0).all()) and bool((logprob[~ignored] < 0).all())
    logprob.backward(torch.ones_like(logprob))
    assert bool((hidden.grad[ignored] == 0).all())


def test_what_lies_under_ignored_tokens_is_not_read():
    hidden, weight, target_ids, _ = head(10, 4, 9, bias=False)
    ignored = target_ids == -100
    poisoned = hidden.detach().masked_fill(ignored[:, None], torch.nan).requires_grad_()
    linear_logprob(poisoned, weight, target_ids, impl="chunked").sum().backward()
    assert not poisoned.grad.isnan().any() and not weight.grad.isnan().any()


def test_everything_ignored():
    hidden, weight, _, _ = head(3, 4, 9, bias=False)
    logprob = linear_logprob(hidden, weight, torch.full((3,), -100), impl="chunked")
    assert logprob.tolist() == [0, 0, 0]
    logprob.sum().backward()
    assert bool((hidden.grad == 0).all()) and bool((weight.grad == 0).all())


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_no_tokens_at_all(impl):
    hidden, weight, target_ids, bias = head(0, 4, 9)
    logprob = linear_logprob(hidden, weight, target_ids, bias=bias, impl=impl)
    assert logprob.shape == (0,)
    logprob.sum().backward()
    assert hidden.grad.shape == (0, 4) and bool((weight.grad == 0).all()) and bool((bias.grad == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_logits_of_800(dtype):
    # exp(800) overflows even float64; 800 and 400 are exact in bfloat16
    logits = torch.tensor([[800.0, -800.0, 0.0], [-800.0, -800.0, -800.0], [400.0, 400.0, -800.0]])
    hidden = logits.to(dtype).requires_grad_()
    weight = torch.eye(3, dtype=dtype, requires_grad=True)
    for target in range(3):
        target_ids = torch.full((3,), target)
        logprob = linear_logprob(hidden, weight, target_ids, impl="chunked")
        expected, *gradients = reference(hidden, weight, target_ids, None, torch.ones(3))
        torch.testing.assert_close(logprob.double(), expected, rtol=1e-6, atol=1e-6)
        hidden.grad = weight.grad = None
        logprob.sum().backward()
        rtol = 2**-8 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(hidden.grad.double(), gradients[0], rtol=rtol, atol=1e-6)
        torch.testing.assert_close(weight.grad.double(), gradients[1], rtol=rtol, atol=1e-3)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck_across_chunks(monkeypatch, options):
    few_rows(monkeypatch, 3, 7, 8)  # 8 tokens kept of 10: three chunks, the last one short
    hidden, weight, target_ids, bias = head(10, 4, 7)

    def logprobs(hidden, weight, bias):
        return linear_logprob(hidden, weight, target_ids, bias=bias, impl="chunked", **options)

    assert torch.autograd.gradcheck(logprobs, (hidden, weight, bias))


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, target_ids, bias = head(6, 4, 9)
    expected = reference(hidden, weight, target_ids, bias, torch.ones(6))[1]
    frozen = weight.detach(), bias.detach()
    linear_logprob(hidden, frozen[0], target_ids, bias=frozen[1], impl="chunked").sum().backward()
    torch.testing.assert_close(hidden.grad, expected)
    assert frozen[0].grad is None and frozen[1].grad is None


def test_only_the_head_learns():
    hidden, weight, target_ids, _ = head(6, 4, 9, bias=False)
    expected = reference(hidden, weight, target_ids, None, torch.ones(6))[2]
    linear_logprob(hidden.detach(), weight, target_ids, impl="chunked").sum().backward()
    torch.testing.assert_close(weight.grad, expected)


def test_the_head_gradient_is_summed_in_float32_over_chunks(monkeypatch):
    # 2,048 chunks of one row: a bfloat16 running sum stops growing after 256 equal terms
    few_rows(monkeypatch, 1, 2, 4)
    hidden = torch.ones(2048, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    linear_logprob(hidden, weight, torch.zeros(2048, dtype=torch.int32), impl="chunked").sum().backward()
    assert weight.grad.flatten().tolist() == [1024.0, -1024.0]


def test_strided_inputs():
    hidden, weight, target_ids, bias = head(12, 6, 9)
    expected = reference(hidden[::2, ::2], weight[:, ::2], target_ids[::2], bias, torch.ones(6))
    logprob = linear_logprob(hidden[::2, ::2], weight[:, ::2], target_ids[::2], bias=bias, impl="chunked")
    logprob.sum().backward()
    torch.testing.assert_close(logprob, expected[0])
    torch.testing.assert_close(hidden.grad[::2, ::2], expected[1])
    torch.testing.assert_close(weight.grad[:, ::2], expected[2])
