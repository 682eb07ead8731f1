"""linear_logprob with entropies, log-sum-exps, K ids a row and leading dimensions, against the float64 definition."""

import pytest
import torch

from fdpg_kernels import LinearLogprob, linear_logprob, vocabulary_walk

IMPLEMENTATIONS = ("chunked", "triton")
HEADS = {
    "plain": {},
    "soft cap": dict(softcap=2.5),
    "temperature": dict(temperature=0.6),
    "row temperature, soft cap": dict(temperature="rows", softcap=3.0),
}
FLAGS = dict(return_entropy=True, return_lse=True)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(vocabulary_walk, "TILE_ROWS", 5)
    monkeypatch.setattr(vocabulary_walk, "TILE_BYTES", 5 * 16 * 4)
    monkeypatch.setattr("fdpg_kernels.triton.head.CHUNK_ROWS", 16)
    monkeypatch.setattr("fdpg_kernels.triton.head.STATISTICS_BYTES", 2048)


def head(n=23, d=7, v=41, ids=3, *, dtype=torch.float64, bias=True, seed=0):
    """Arguments with ids [N, K]: some twice in a row, some ignored, and row 4 of ignored ones alone."""
    rng = torch.Generator().manual_seed(seed)
    target_ids = torch.randint(v, (n, ids), generator=rng)
    target_ids[1::5] = target_ids[1::5, :1]
    target_ids[2::5, -1] = -100
    target_ids[4] = -100
    arguments = dict(
        hidden=torch.randn(n, d, generator=rng),
        weight=torch.randn(v, d, generator=rng) * 1.5 / d**0.5,
        bias=torch.randn(v, generator=rng),
    )
    if not bias:
        del arguments["bias"]
    return {k: x.to(dtype) for k, x in arguments.items()} | {"target_ids": target_ids}


def results(arguments, impl, upstream, dtype=None, **options):
    """Values, and gradients of Σ upstream·value, by name."""
    leaves = {
        k: x.detach().to(dtype or x.dtype).requires_grad_() for k, x in arguments.items() if x.is_floating_point()
    }
    if options.get("temperature") == "rows":
        options["temperature"] = torch.linspace(0.5, 2.0, len(arguments["target_ids"]))
    found = linear_logprob(**arguments | leaves, impl=impl, **FLAGS, **options)
    loss = sum((x * upstream[k].to(x)).sum() for k, x in found._asdict().items() if k in upstream)
    gradients = torch.autograd.grad(loss, leaves.values())
    return found, dict(zip(leaves, gradients, strict=True))


def upstream_of(target_ids):
    rng = torch.Generator().manual_seed(1)
    rows = len(target_ids)
    shapes = dict(logprob=target_ids.shape, entropy=(rows,), lse=(rows,))
    return {k: torch.randn(shape, generator=rng) for k, shape in shapes.items()}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize(
    ("impl", "dtype", "bound", "rtol"),
    [
        ("chunked", torch.float64, 1e-12, 1e-11),
        ("chunked", torch.float32, 1e-5, 1e-5),
        ("chunked", torch.bfloat16, 1e-5, 2**-8),
        ("triton", torch.float32, 1e-5, 1e-5),
        ("triton", torch.bfloat16, 1e-5, 2**-7),
    ],
)
def test_values_and_gradients(impl, dtype, bound, rtol, options, bias):
    arguments = head(dtype=dtype, bias=bias)
    upstream = upstream_of(arguments["target_ids"])
    found, gradients = results(arguments, impl, upstream, **options)
    expected, exact = results(arguments, "reference", upstream, torch.float64, **options)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(mine.double(), theirs, rtol=bound, atol=bound)
    for k, theirs in exact.items():
        assert gradients[k].dtype == dtype
        assert float((gradients[k].double() - theirs).norm()) < rtol * float(theirs.norm()), k


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("wanted", [("entropy",), ("lse",), ("logprob", "lse"), ("logprob", "entropy")], ids=str)
def test_each_result_has_its_gradient_alone(impl, wanted):
    arguments = head(dtype=torch.float32)
    upstream = {k: x for k, x in upstream_of(arguments["target_ids"]).items() if k in wanted}
    gradients = results(arguments, impl, upstream)[1]
    exact = results(arguments, "reference", upstream, torch.float64)[1]
    for k, theirs in exact.items():
        assert float((gradients[k].double() - theirs).norm()) < 1e-5 * float(theirs.norm()), k


@pytest.mark.parametrize("options", [{}, dict(softcap=3.0, temperature=1.7)], ids=str)
def test_gradcheck(options):
    arguments = head(n=9, d=4, v=7)

    def op(hidden, weight, bias):
        return tuple(
            linear_logprob(hidden, weight, arguments["target_ids"], bias=bias, impl="chunked", **FLAGS, **options)
        )

    leaves = [arguments[k].requires_grad_() for k in ("hidden", "weight", "bias")]
    assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.parametrize("impl", ("reference", *IMPLEMENTATIONS))
def test_the_columns_are_those_of_one_id_each_and_the_rest_follows_from_all_ids(impl):
    arguments = head(dtype=torch.float32)
    arguments["target_ids"] = torch.arange(41).expand(23, 41)
    every, entropy, lse = linear_logprob(**arguments, impl=impl, **FLAGS)
    one = linear_logprob(**arguments | {"target_ids": torch.full((23,), 7)}, impl=impl)
    torch.testing.assert_close(every[:, 7], one)
    torch.testing.assert_close(entropy, -(every.exp() * every).sum(1), rtol=1e-5, atol=1e-5)
    logits = torch.nn.functional.linear(*(arguments[k] for k in ("hidden", "weight", "bias")))
    torch.testing.assert_close(lse.float(), logits.logsumexp(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ("reference", *IMPLEMENTATIONS))
def test_what_is_ignored(impl):
    arguments = head(dtype=torch.float32)
    ignored = arguments["target_ids"] == -100
    poisoned = arguments | {"hidden": arguments["hidden"].masked_fill(ignored.all(1)[:, None], torch.nan)}
    upstream = upstream_of(ignored)
    spoilt = {k: x.masked_fill(ignored if x.ndim > 1 else ignored.all(1), torch.nan) for k, x in upstream.items()}
    clean = results(arguments, impl, upstream | {k: x.nan_to_num(0.0) for k, x in spoilt.items()})
    found = results(poisoned, impl, spoilt) if impl != "reference" else results(poisoned, impl, upstream)
    for mine, theirs in zip(found[0], clean[0], strict=True):
        assert torch.equal(mine, theirs)
    assert not bool(found[0].logprob[ignored].any()) and found[0].entropy[4] == found[0].lse[4] == 0
    assert not bool(found[1]["hidden"][4].any())
    for k, gradient in found[1].items():
        torch.testing.assert_close(gradient, clean[1][k])


@pytest.mark.parametrize("impl", ("reference", *IMPLEMENTATIONS))
def test_forbidden_words_have_no_entropy(impl):
    arguments = head(dtype=torch.float32)
    arguments["bias"][20:] = -torch.inf
    arguments["target_ids"].clamp_(max=19)
    allowed = arguments | {k: arguments[k][:20] for k in ("weight", "bias")}
    upstream = upstream_of(arguments["target_ids"])
    (found, gradients), (expected, exact) = (results(x, impl, upstream) for x in (arguments, allowed))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(gradients["hidden"], exact["hidden"])
    torch.testing.assert_close(gradients["weight"][:20], exact["weight"])
    assert not bool(gradients["weight"][20:].any())


@pytest.mark.parametrize("impl", ("reference", *IMPLEMENTATIONS))
@pytest.mark.parametrize("leading", [(), (0,), (3,), (2, 3), (2, 1, 3), (2, 0)], ids=str)
def test_leading_dimensions(impl, leading):
    rows = torch.Size(leading).numel()
    flat = head(n=max(rows, 5), dtype=torch.float32)
    flat |= {k: flat[k][:rows] for k in ("hidden", "target_ids")}
    temperature = torch.linspace(0.5, 2.0, rows)
    expected = linear_logprob(**flat, temperature=temperature, impl=impl, **FLAGS)
    shaped = flat | {k: flat[k].reshape(*leading, flat[k].shape[1]) for k in ("hidden", "target_ids")}
    found = linear_logprob(**shaped, temperature=temperature.reshape(leading), impl=impl, **FLAGS)
    assert isinstance(found, LinearLogprob)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs.reshape((*leading, *theirs.shape[1:])))
    shaped["target_ids"] = shaped["target_ids"][..., 0]
    first = linear_logprob(**shaped, temperature=temperature.reshape(leading), impl=impl)
    assert torch.equal(first, found.logprob[..., 0])


def test_results_are_what_was_asked_for():
    arguments = head()
    assert isinstance(linear_logprob(**arguments), torch.Tensor)
    for entropy, lse in ((True, False), (False, True), (True, True)):
        found = linear_logprob(**arguments, return_entropy=entropy, return_lse=lse)
        assert (found.entropy is not None, found.lse is not None) == (entropy, lse)


@pytest.mark.parametrize("shape", [(23, 0), (22, 3), (23, 3, 1), (22,)], ids=str)
def test_ids_that_fit_no_rows(shape):
    with pytest.raises(ValueError, match=r"target_ids must be \[N\]=\[23\], or K ≥ 1 for each"):
        linear_logprob(**head() | {"target_ids": torch.zeros(shape, dtype=torch.int64)})


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_only_what_is_trained_costs_a_second_tile(monkeypatch, impl):
    """An entropy that is logged, not trained on, leaves the backward pass as it was."""
    seen = []
    module = f"fdpg_kernels.{'triton.launch' if impl == 'triton' else impl}.linear_logprob_backward"
    monkeypatch.setattr(module, lambda h, ids, head, made, given, wants: seen.append(given) or (h, None, None))
    hidden, weight = head(dtype=torch.float32)["hidden"].requires_grad_(), torch.ones(41, 7)
    found = linear_logprob(hidden, weight, torch.zeros(23, dtype=torch.int64), impl=impl, **FLAGS)
    found.logprob.sum().backward(retain_graph=True)
    found.entropy.sum().backward()
    assert [given.beta is None for given in seen] == [True, False]
