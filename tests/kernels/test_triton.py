"""Every Triton kernel under Triton's interpreter, against the float64 definition, with memory poisoned by NaN.

Stated errors (logits of standard deviation 1 to 2 unless a test says otherwise):

| what | inputs | bound |
|---|---|---|
| token log-probs | float32 | 1e-6 nats, plus 3e-7 for each unit of the largest logit |
| token log-probs | bfloat16 | the same: products are accumulated in float32 |
| gradients | float32 | 1e-5 relative, plus 1e-6 |
| gradients | bfloat16 | 2× the error of PyTorch's own bfloat16 path |
| sequence weights | token log-probs of either dtype | 1e-6 relative (float32 results), 1e-12 (float64) |
"""

import math

import pytest
import torch

from fdpg_kernels import Divergence, divergences, fdpg_loss, linear_logprob, sequence_weights
from fdpg_kernels.triton import tiles as configs
from support.kernel_cases import ALLOW_ZEROS, NAMES, batch, head_batch

pytestmark = pytest.mark.usefixtures("poisoned", "rounding")

LENGTHS = [3, 0, 20, 9, 2, 0, 40, 4]  # with chunks of 32 rows: groups, empty sequences, one that spans chunks
LEAVES = ("hidden", "weight", "bias")
HEADS = [dict(), dict(temperature=0.6), dict(softcap=2.5), dict(softcap=30.0, temperature=1.3)]


def head(n, d, v, dtype, seed=0):
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=rng)
    weight = torch.randn(v, d, generator=rng) * 1.5 / d**0.5
    bias = torch.randn(v, generator=rng)
    target_ids = torch.randint(v, (n,), generator=rng)
    target_ids[4::5] = -100
    return [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)], target_ids


def logprob_and_gradients(leaves, target_ids, upstream, impl, dtype=None, **options):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in leaves]
    bias = {"bias": leaves[2]} if len(leaves) == 3 else {}
    logprob = linear_logprob(*leaves[:2], target_ids, impl=impl, **bias, **options)
    logprob.backward(upstream.to(logprob.dtype))
    return logprob.detach().double(), [x.grad.double() for x in leaves]


def relative(found, expected):
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize("shape", [(1, 4, 2), (7, 24, 33), (37, 19, 70), (70, 72, 129)], ids=str)
def test_logprob_float32(loads, shape, options, with_bias):
    leaves, target_ids = head(*shape, torch.float32)
    leaves = leaves if with_bias else leaves[:2]
    upstream = torch.randn(shape[0], generator=torch.Generator().manual_seed(1))
    found, gradients = logprob_and_gradients(leaves, target_ids, upstream, "triton", **options)
    expected, exact = logprob_and_gradients(leaves, target_ids, upstream, "reference", torch.float64, **options)
    largest = float((leaves[0] @ leaves[1].T).detach().abs().max()) / options.get("temperature", 1.0)
    assert float((found - expected).abs().max()) < 1e-6 + 3e-7 * largest
    for mine, theirs in zip(gradients, exact, strict=True):
        assert float((mine - theirs).norm()) < 1e-5 * float(theirs.norm()) + 1e-6


@pytest.mark.parametrize("options", [HEADS[0], HEADS[2]], ids=str)
def test_bfloat16_log_probs_are_float32_and_gradients_no_worse_than_twice_pytorchs(loads, options):
    leaves, target_ids = head(70, 72, 129, torch.bfloat16)
    upstream = torch.randn(70, generator=torch.Generator().manual_seed(1))
    found, gradients = logprob_and_gradients(leaves, target_ids, upstream, "triton", **options)
    expected, exact = logprob_and_gradients(leaves, target_ids, upstream, "reference", torch.float64, **options)
    assert float((found - expected).abs().max()) < 3e-6

    own = [x.detach().requires_grad_() for x in leaves]
    logits = torch.nn.functional.linear(*own)
    if "softcap" in options:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    picked = logits.float().log_softmax(-1).gather(1, target_ids.clamp(min=0)[:, None])[:, 0]
    (picked * upstream).masked_fill(target_ids == -100, 0).sum().backward()
    for mine, theirs, truth in zip(gradients, own, exact, strict=True):
        assert relative(mine, truth) < 2 * relative(theirs.grad.double(), truth)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 30.0], ids=["flat", "nearly flat", "peaked"])
def test_flat_and_peaked_logits(loads, scale):
    leaves, target_ids = head(37, 24, 70, torch.float32)
    leaves = [leaves[0].detach() * scale, leaves[1].detach()]
    upstream = torch.ones(37)
    found, gradients = logprob_and_gradients(leaves, target_ids, upstream, "triton")
    expected, exact = logprob_and_gradients(leaves, target_ids, upstream, "reference", torch.float64)
    largest = float((leaves[0] @ leaves[1].T).detach().abs().max())
    assert float((found - expected).abs().max()) < 1e-6 + 3e-7 * largest
    for mine, theirs in zip(gradients, exact, strict=True):
        assert float((mine - theirs).norm()) < 1e-5 * float(theirs.norm()) + 1e-6


def test_padding_columns_of_minus_infinity_and_no_rows(loads):
    leaves, target_ids = head(9, 24, 70, torch.float32)
    with torch.no_grad():
        leaves[2][40:] = -math.inf  # whole tiles of them
    target_ids = target_ids.clamp(max=39)
    found, gradients = logprob_and_gradients(leaves, target_ids, torch.ones(9), "triton")
    short = [leaves[0], leaves[1][:40], leaves[2][:40]]
    expected, exact = logprob_and_gradients(short, target_ids, torch.ones(9), "reference", torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert relative(gradients[1][:40], exact[1]) < 1e-5 and not bool(gradients[1][40:].any())
    empty = [leaves[0][:0], *leaves[1:]]
    found, gradients = logprob_and_gradients(empty, target_ids[:0], torch.ones(0), "triton")
    assert len(found) == 0 and not bool(gradients[1].any())


@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)], ids=str)
def test_entropy_lse_and_three_ids_a_row(loads, dtype, rtol, options):
    leaves, target_ids = head(37, 24, 70, dtype)
    ids = torch.stack([target_ids, target_ids.roll(1), target_ids], 1)  # the first and the last are the same
    found = {}
    for impl, wide in (("triton", dtype), ("reference", torch.float64)):
        own = [x.detach().to(wide).requires_grad_() for x in leaves]
        flags = dict(return_entropy=True, return_lse=True)
        made = linear_logprob(*own[:2], ids, bias=own[2], impl=impl, **flags, **options)
        loss = (made.logprob * torch.linspace(-1, 2, 3)).sum() + (made.entropy * torch.linspace(-1, 2, 37)).sum()
        (loss + made.lse.sum()).backward()
        found[impl] = [*(x.detach().double() for x in made), *(x.grad.double() for x in own)]
    for k, (mine, exact) in enumerate(zip(*found.values(), strict=True)):
        if k < 3:
            torch.testing.assert_close(mine, exact, rtol=2e-6, atol=3e-6)
        else:
            assert relative(mine, exact) < rtol


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize("outside", [11, 40, -1])
def test_a_target_outside_the_vocabulary_spoils_its_own_row_alone(monkeypatch, outside, impl):
    monkeypatch.setattr("fdpg_kernels.checks._may_look", lambda tensor: False)
    leaves, target_ids = head(6, 8, 11, torch.float32)
    found = {}
    for target_ids[2] in (-100, outside):
        found[int(target_ids[2])] = logprob_and_gradients(leaves[:2], target_ids, torch.ones(6), impl)
    logprob, gradients = found[outside]
    assert logprob.isnan().tolist() == [i == 2 for i in range(6)]
    assert bool(gradients[0][2].isnan().all()) and bool(gradients[1].isnan().all())
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(gradients[0][others], found[-100][1][0][others], rtol=1e-6, atol=1e-6)


def single(arguments):
    """float32 where the trainer has float32; the inputs of both sides are the rounded ones."""
    return {k: x.detach().float() if x.is_floating_point() else x for k, x in arguments.items()}


def run(arguments, impl, dtype=torch.float32, **options):
    leaves = {k: arguments[k].detach().to(dtype).requires_grad_() for k in LEAVES if k in arguments}
    out = fdpg_loss(**arguments | leaves, impl=impl, **options)
    out.loss.backward()
    return out, {k: x.grad.double() for k, x in leaves.items()}


def assert_meets_the_definition(arguments, weight_rtol=2e-5, **options):
    out, gradients = run(arguments, "triton", **options)
    expected, exact = run(arguments, "reference", torch.float64, **options)
    assert out.loss.dtype == out.weights.weight.dtype == torch.float32
    # weights are exponentials of sums over a sequence: an error of 1e-6 a token is one of 4e-5 there
    for found, truth in zip(out.weights, expected.weights, strict=True):
        torch.testing.assert_close(found.to(truth.dtype), truth, rtol=weight_rtol, atol=weight_rtol)
    terms = float((expected.weights.weight * expected.weights.policy_logprob).abs().mean())  # they may cancel
    assert abs(float(out.loss) - float(expected.loss)) < weight_rtol * (1 + terms)
    for k in gradients:
        assert relative(gradients[k], exact[k]) < max(1e-5, weight_rtol), k
    return out


@pytest.mark.parametrize("caps", [{}, dict(ratio_cap=1.1, ratio_drop=1.4, reward_cap=0.3)], ids=str)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_loss_of_every_divergence(name, zeros, caps):
    arguments = single(head_batch(LENGTHS, vocab=70, width=24, zeros=zeros and name in ALLOW_ZEROS))
    spread = torch.linspace(-1, 1, len(LENGTHS))
    options = dict(divergence=name, **caps)
    # sums of 128 nats and more are rounded by up to 8e-6 in float32; f' is t to a power, pearson_chi2's doubles that
    power = divergences.get(name).power
    options["weight_rtol"] = 2e-5 * max(1.0, abs(power[0]) if power else 1.0)
    for log_z, baseline in ((arguments["log_z"], None), (spread.masked_fill(spread > 0, -math.inf), spread)):
        assert_meets_the_definition(arguments | {"log_z": log_z}, baseline=baseline, **options)


@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_loss_of_every_head(loads, options, with_bias):
    arguments = single(head_batch(LENGTHS, vocab=67, width=19, zeros=True))
    if not with_bias:
        del arguments["bias"]
    # the sampler is another one with these options: ratios far from 1, so only sums are compared closely
    assert_meets_the_definition(arguments, ratio="none", weight_rtol=1e-4, **options)


@pytest.mark.parametrize("drift", [0.0, 5.0, 20.0])
def test_the_anchor_may_be_off_by_20_nats_a_token(drift):
    arguments = single(head_batch(LENGTHS, vocab=70, width=24))
    noise = torch.randn(sum(LENGTHS), generator=torch.Generator().manual_seed(3))
    arguments["behavior_logprob"] = (arguments["behavior_logprob"] + drift * noise.sign()).clamp(max=-1e-3)
    assert_meets_the_definition(arguments, ratio="none")


def test_rows_out_of_range_are_done_again_around_their_own_maximum():
    arguments = single(head_batch(LENGTHS, vocab=70, width=24))
    arguments["behavior_logprob"][[1, 30, 31, 70]] = -150.0  # π/q of e^150: e^-150 is no float32
    arguments["behavior_logprob"][33] = 200.0  # nonsense that must not hurt anyone else
    out = assert_meets_the_definition(arguments, ratio="none")
    assert bool(out.weights.policy_logprob.isfinite().all())


def test_ignored_tokens_and_no_gradient():
    arguments = single(head_batch(LENGTHS, vocab=70, width=24))
    ignored = torch.arange(sum(LENGTHS)) % 3 == 1
    arguments["target_ids"][ignored] = -100
    arguments["behavior_logprob"][ignored] = math.nan  # not to be read
    out = assert_meets_the_definition(arguments)
    with torch.no_grad():
        quiet = fdpg_loss(**arguments, impl="triton")
    torch.testing.assert_close(quiet.loss, out.loss.detach(), rtol=2e-5, atol=2e-5)  # an online softmax, not anchored
    assert not quiet.loss.requires_grad


def test_a_frozen_head_and_an_accumulated_one():
    arguments = single(head_batch(LENGTHS, vocab=70, width=24))
    del arguments["bias"]
    _, expected = run(arguments, "reference", torch.float64)
    hidden = arguments["hidden"].requires_grad_()
    fdpg_loss(**arguments, impl="triton").loss.backward()
    assert relative(hidden.grad.double(), expected["hidden"]) < 1e-5 and arguments["weight"].grad is None
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2**-8)):
        arguments["weight"] = arguments["weight"].to(dtype)
        arguments["hidden"] = hidden.detach().to(dtype)
        _, expected = run(arguments, "reference", torch.float64)
        into = torch.ones(70, 24, dtype=torch.float32)
        fdpg_loss(**arguments, impl="triton", weight_grad_out=into).loss.backward()
        assert relative(into.double() - 1, expected["weight"]) < limit


def test_bfloat16_loss_is_no_worse_than_twice_pytorchs():
    arguments = single(head_batch([20, 9, 31, 4], vocab=70, width=24))
    del arguments["bias"]
    out, gradients = run(arguments, "triton", torch.bfloat16)
    rounded = arguments | {k: arguments[k].bfloat16().double() for k in ("hidden", "weight")}
    expected, exact = run(rounded, "reference", torch.float64)
    torch.testing.assert_close(out.weights.weight.double(), expected.weights.weight, rtol=1e-4, atol=1e-4)
    own = [arguments[k].bfloat16().requires_grad_() for k in ("hidden", "weight")]
    logits = torch.nn.functional.linear(*own)
    token = logits.float().log_softmax(-1).gather(1, arguments["target_ids"][:, None])[:, 0]
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor([20, 9, 31, 4]))
    (-(expected.weights.weight.float()[owner] * token).sum() / 4).backward()
    for k, theirs in zip(("hidden", "weight"), own, strict=True):
        assert relative(gradients[k], exact[k]) < 2 * relative(theirs.grad.double(), exact[k]), k


def test_a_users_own_divergence():
    mine = Divergence("mine", lambda t: (t - 1) ** 2 / (t + 1), f_prime_at_infinity=1.0)
    arguments = single(head_batch(LENGTHS, vocab=70, width=24, zeros=True))
    assert_meets_the_definition(arguments, divergence=mine, baseline=torch.linspace(0, 1, len(LENGTHS)))
    weights = sequence_weights(**batch(LENGTHS, zeros=True), divergence=mine, impl="triton")
    torch.testing.assert_close(
        weights, sequence_weights(**batch(LENGTHS, zeros=True), divergence=mine, impl="reference")
    )


CAPS = [{}, dict(ratio_cap=1.1, ratio_drop=1.4), dict(reward_cap=0.3, ratio_drop=1.1)]


@pytest.mark.parametrize("ratio", ["sequence", "none"])
@pytest.mark.parametrize("caps", CAPS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_sequence_weights(name, caps, ratio):
    arguments = batch([3, 0, 17, 1, 40, 5], zeros=name in ALLOW_ZEROS)
    spread = torch.linspace(-1, 1, 6, dtype=torch.float64)
    options = dict(divergence=name, ratio=ratio, **caps)
    for log_z in (arguments["log_z"], spread.masked_fill(spread > 0.5, -math.inf)):
        for baseline in (None, 0.3, spread):
            both = [
                sequence_weights(**arguments | {"log_z": log_z}, baseline=baseline, impl=impl, **options)
                for impl in ("triton", "reference")
            ]
            torch.testing.assert_close(*both, rtol=1e-12, atol=1e-12)
    low = {k: x.float() if x.is_floating_point() else x for k, x in arguments.items()}
    found, expected = (sequence_weights(**low, impl=impl, **options) for impl in ("triton", "reference"))
    assert found.weight.dtype == torch.float32
    torch.testing.assert_close(found.weight.double(), expected.weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", ["triton", "chunked"])
def test_no_cap_hides_a_nan(impl):
    arguments = batch([3, 2, 4])
    arguments["policy_logprob"][4] = math.nan
    found = sequence_weights(**arguments, ratio_cap=2.0, ratio_drop=3.0, reward_cap=0.3, impl=impl)
    expected = sequence_weights(**arguments, ratio_cap=2.0, ratio_drop=3.0, reward_cap=0.3, impl="reference")
    for mine, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, exact.to(mine.dtype), equal_nan=True)
    assert found.weight.isnan().tolist() == [False, True, False]


def test_results_do_not_depend_on_the_run():
    arguments = single(head_batch(LENGTHS, vocab=70, width=24))
    first, second = (run(arguments, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[0].weights, second[0].weights, strict=True))
    assert all(torch.equal(first[1][k], second[1][k]) for k in LEAVES)


@pytest.mark.parametrize(
    ("width", "aligned", "plain", "chip", "expected"),
    [
        (4096, True, True, 90, configs.WIDE),
        (576, True, True, 90, configs.PAIR),
        (4096, True, False, 90, configs.SQUARE),
        (4096, False, True, 90, configs.UNALIGNED),
        (4096, True, True, 80, configs.POINTERS),
        (4096, True, False, 89, configs.POINTERS),
        (4104, True, True, 89, configs.UNALIGNED),
        (576, True, True, 100, configs.PAIR),
        (576, True, False, 103, configs.SQUARE),
        (4096, True, True, 110, configs.WIDE),
        (4096, True, True, 120, configs.POINTERS),
    ],
)
def test_the_choice_of_a_tile(width, aligned, plain, chip, expected):
    chosen = configs.choose(chip, width, aligned=aligned, plain=plain, l2_bytes=50 * 2**20)
    assert configs.replace(chosen, group_rows=expected.group_rows) == expected
    assert 8 <= chosen.group_rows <= 64
    assert expected in configs.candidates(chip, aligned=aligned)


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    leaves, target_ids = head(6, 8, 11, torch.float64)
    with pytest.raises(ValueError, match="float16, bfloat16 or float32, not torch.float64.*'chunked' runs everywhere"):
        linear_logprob(*leaves[:2], target_ids, impl="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="needs an NVIDIA GPU, not cpu"):
        sequence_weights(**batch([2, 4]), impl="triton")
