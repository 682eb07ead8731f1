"""Targets: log φ of every kind, λ against closed forms and moments recomputed here, and the fits that are refused."""

import math
from dataclasses import replace

import pytest
import torch

from fdpg_fast.errors import RunError, UserError
from fdpg_fast.features import Feature
from fdpg_fast.moments import BaseSample, solve_exponents
from fdpg_fast.targets import Target, Term, distributional, pointwise, rlhf

F64 = torch.float64
NAN, INF = math.nan, math.inf


def named(name):
    return Feature(name, lambda completions: [0.0] * len(completions))


def column(*values):
    return torch.tensor(values, dtype=F64)[:, None]


def one_context(values):
    return torch.zeros(len(values), dtype=torch.long)


# --- log φ ---


def test_pointwise_is_the_log_of_the_feature():
    target = pointwise(named("f"))
    assert target.log_phi(column(1, 0, 0.25, 3, NAN)).tolist() == [0, -INF, math.log(0.25), math.log(3), 0]
    assert target.can_be_zero and not target.needs_fit


def test_pointwise_refuses_negative_values():
    with pytest.raises(RunError, match="'f' returned -0.5; a pointwise target needs values ≥ 0.*rlhf"):
        pointwise(named("f")).log_phi(column(1, -0.5, NAN))


def test_rlhf_is_the_reward_over_beta():
    target = rlhf(named("r"), beta=0.1)
    assert target.log_phi(column(2, -3, 0, NAN)).tolist() == pytest.approx([20, -30, 0, 0])
    assert not target.can_be_zero and not target.needs_fit
    for beta in (0, -1, NAN, INF):
        with pytest.raises(UserError, match=f"beta={beta:g}; it must be a positive number"):
            rlhf(named("r"), beta)


def test_distributional_is_exponential_in_the_distance_to_the_moments():
    target = distributional([named("f"), named("g")], [0.5, 2.0])
    assert target.needs_fit and not target.can_be_zero
    with pytest.raises(ValueError, match=r"no λ before fit"):
        target.log_phi(torch.zeros(1, 2, dtype=F64))
    fitted = replace(target, exponents=(3.0, -1.0))
    assert not fitted.needs_fit and fitted.moments == [("f", 0.5), ("g", 2.0)]
    values = torch.tensor([[1.0, 2.0], [0.0, 5.0], [NAN, 2.5], [NAN, NAN]], dtype=F64)
    assert fitted.log_phi(values).tolist() == pytest.approx([1.5, -1.5 - 3.0, -0.5, 0.0])
    for features, moments in (([named("f")], [0.5, 0.5]), ([], [])):
        with pytest.raises(UserError, match=f"{len(features)} features but {len(moments)} moments"):
            distributional(features, moments)


def test_a_product_adds_log_phi_and_keeps_features_in_order():
    """Each term reads its own columns, each distributional term its own λ."""
    target = (
        distributional([named("d1")], [1.0])
        * pointwise(named("hard"))
        * distributional([named("d2"), named("d3")], [0.0, 0.0])
        * rlhf(named("r"), beta=0.5)
    )
    assert [feature.name for feature in target.features] == ["d1", "hard", "d2", "d3", "r"]
    assert target.can_be_zero and target.needs_fit
    fitted = replace(target, exponents=(2.0, 10.0, 100.0))
    values = torch.tensor([[1.5, 1, 0.1, 0.02, 4], [1.5, 0, 0.1, 0.02, 4], [1, 0.5, 0, 0, NAN]], dtype=F64)
    assert fitted.log_phi(values).tolist() == pytest.approx([1 + 0 + 1 + 2 + 8, -INF, math.log(0.5)])
    assert not (rlhf(named("r"), 1.0) * rlhf(named("s"), 1.0)).can_be_zero


def test_a_user_s_own_term_and_target():
    """A term may read several features and do what it likes with them."""
    term = Term((named("x"), named("y")), lambda values: -((values[:, 0] - values[:, 1]) ** 2), can_be_zero=False)
    target = Target((term,)) * pointwise(named("hard"))
    values = torch.tensor([[1, 3, 1], [2, 2, 0], [0, 1, 2]], dtype=F64)
    assert target.log_phi(values).tolist() == pytest.approx([-4, -INF, -1 + math.log(2)])
    assert target.can_be_zero and not Target((term,)).can_be_zero
    assert Target(()).log_phi(values).tolist() == [0, 0, 0] and not Target(()).needs_fit


def raises(values):
    raise ValueError("first\nsecond \x1b[2J")


def mutates(values):
    values[:] = 0.0
    return values[:, 0]


# what a term's function returns for the values 1 and 2, whether it may be 0, and the complaint
DAMAGES = {
    "exception": (raises, False, r"raised ValueError: first second \\x1b\[2J$"),
    "list": (lambda values: [0.0, 0.0], False, r"is list, not a tensor \[2\] of torch.float64"),
    "nothing": (lambda values: None, False, "is NoneType"),
    "number": (lambda values: -1.0, False, "is float"),
    "one for all": (lambda values: values[:1, 0], False, r"is \[1\] of torch.float64, not a tensor \[2\]"),
    "0-d": (lambda values: values.sum(), False, r"is \[\] of"),
    "a column": (lambda values: values, False, r"is \[2, 1\] of"),
    "too many": (lambda values: torch.zeros(3), False, r"is \[3\] of"),
    "a condition": (lambda values: values[:, 0] > 1, False, r"is \[2\] of torch.bool"),
    "complex": (lambda values: values[:, 0].to(torch.complex128), False, r"is \[2\] of torch.complex128"),
    "NaN": (lambda values: values[:, 0] * NAN, True, r"is nan, not a finite number, where the features are \[1.0\]"),
    "+inf": (lambda values: (values[:, 0] - 1) * INF, True, "is nan"),
    "overflow": (
        lambda values: (values[:, 0] * 1e3).exp(),
        False,
        "is inf, not a finite number, or −inf with",
    ),
    "log of 0": (lambda values: (values[:, 0] - 2).abs().log(), False, r"is -inf, .* features are \[2.0\]$"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_a_term_returns_is_checked(name):
    function, can_be_zero, complaint = DAMAGES[name]
    target = rlhf(named("g"), 1.0) * Target((Term((named("f"),), function, can_be_zero),))
    with pytest.raises(RunError, match=f"^target: log φ of f {complaint}") as failure:
        target.log_phi(torch.tensor([[0.0, 1.0], [0.0, 2.0]], dtype=F64))
    assert "\n" not in str(failure.value)


def test_a_term_may_return_any_float_and_does_as_it_likes_with_its_values():
    weight = torch.ones((), requires_grad=True)
    for function in (lambda v: v[:, 0].float() * weight, lambda v: v[:, 0].bfloat16(), lambda v: v.log()[:, 0].exp()):
        log_phi = Target((Term((named("f"),), function, False),)).log_phi(column(1, 2))
        assert log_phi.tolist() == [1, 2] and log_phi.dtype == F64 and not log_phi.requires_grad
    values = column(1, 2)
    assert Target((Term((named("f"),), mutates, False),)).log_phi(values).tolist() == [0, 0]
    assert values.tolist() == [[1], [2]]


@pytest.mark.parametrize(
    "target",
    [rlhf(named("f"), 1e-300), replace(distributional([named("f")], [-1e308]), exponents=(9.0,))],
    ids=["rlhf", "distributional"],
)
@pytest.mark.parametrize("value", [1e300, -1e300])
def test_values_beyond_float64_end_in_one_line(target, value):
    value = value if target.exponents is None else 1e308
    with pytest.raises(RunError, match=r"^target: log φ of f is -?inf, not a finite number.* features are \["):
        target.log_phi(column(value))


@pytest.mark.parametrize("terms", [(named("f"),), (Term(named("f"), raises, False),), (Term(("f",), raises, False),)])
def test_a_target_of_something_else_than_terms_is_refused(terms):
    with pytest.raises((UserError, TypeError)):
        Target(terms)


# --- λ ---


def jackknifed(weights, values, context_index):
    """Mean over contexts of E_p[values] from weights [S] and values [S, F]: n·m − (n − 1)·mean of m without one."""
    means = []
    for c in context_index[weights > 0].unique():
        here = (context_index == c) & (weights > 0)
        weighted, weight, n = (weights[:, None] * values)[here], weights[here, None], int(here.sum())
        without_one = (weighted.sum(0) - weighted) / (weight.sum() - weight)
        means.append(n * weighted.sum(0) / weight.sum() - (n - 1) * without_one.mean(0))
    return torch.stack(means).mean(0)


def moments_of(target, values, context_index):
    return jackknifed(target.log_phi(values).exp(), values.nan_to_num(0), context_index)


def random_sample(contexts=1, per_context=2000, seed=0):
    """A binary and a real feature, correlated, with means that differ between contexts; and a rarer hard one."""
    generator = torch.Generator().manual_seed(seed)
    context_index = torch.arange(contexts).repeat_interleave(per_context)
    real = torch.randn(len(context_index), generator=generator, dtype=F64) + 0.3 * context_index
    binary = (torch.rand(len(real), generator=generator, dtype=F64) < torch.sigmoid(real - 1)).double()
    hard = (torch.rand(len(real), generator=generator, dtype=F64) < 0.3).double()
    return binary, real, hard, context_index


@pytest.mark.parametrize("moment", [0.05, 0.2, 0.5, 0.9])
def test_lambda_of_a_binary_feature_is_a_difference_of_logits(moment):
    """E_p[b] = s·e^λ / (s·e^λ + 1 − s) for a share s of n: λ = logit(moment) − logit(s), less the bias of order 1/n."""
    values = column(*[1.0] * 20_000, *[0.0] * 80_000)
    (exponent,) = distributional([named("f")], [moment]).fit(values, one_context(values)).exponents
    logit = torch.logit(torch.tensor([moment, 0.2], dtype=F64))
    bias = (moment / 0.2 - (1 - moment) / 0.8) / 100_000  # E_p[(p/a)·(b − moment)]/(n·Var_p[b])
    assert exponent == pytest.approx(float(logit[0] - logit[1]) - bias, abs=1e-8)


def test_moments_of_correlated_features_hold_after_the_fit():
    binary, real, _, context_index = random_sample()
    values = torch.stack([binary, real], dim=1)
    fitted = distributional([named("b"), named("x")], [0.5, -0.2]).fit(values, context_index)
    torch.testing.assert_close(moments_of(fitted, values, context_index), column(0.5, -0.2)[:, 0], atol=1e-6, rtol=0)
    alone = distributional([named("b")], [0.5]).fit(values[:, :1], context_index)
    assert abs(fitted.exponents[0] - alone.exponents[0]) > 0.3  # they really are correlated


def test_gaussian_feature_gives_the_known_lambda():
    """Tilting N(0, σ²) to mean m needs λ = m/σ²; quantiles stand for the sample, 1 % for their coarse tails."""
    quantiles = torch.special.ndtri((torch.arange(20_000, dtype=F64) + 0.5) / 20_000)
    values = 2.0 * quantiles[:, None]
    (exponent,) = distributional([named("x")], [1.0]).fit(values, one_context(values)).exponents
    assert exponent == pytest.approx(1.0 / 4.0, rel=0.01)


def test_weights_are_normalised_within_each_context():
    """A context where the feature is likely must not outvote one where it is not."""
    binary, real, _, context_index = random_sample(contexts=3, per_context=700)
    values = torch.stack([binary, real], dim=1)
    fitted = distributional([named("b"), named("x")], [0.6, 0.7]).fit(values, context_index)
    wanted = column(0.6, 0.7)[:, 0]
    torch.testing.assert_close(moments_of(fitted, values, context_index), wanted, atol=1e-6, rtol=0)
    pooled = moments_of(fitted, values, torch.zeros_like(context_index))
    assert float((pooled - wanted).abs().max()) > 1e-3  # the two readings differ on this sample
    shuffled = torch.randperm(len(values), generator=torch.Generator().manual_seed(1))
    again = distributional([named("b"), named("x")], [0.6, 0.7]).fit(values[shuffled], context_index[shuffled] + 40)
    assert again.exponents == pytest.approx(fitted.exponents, abs=1e-7)  # any order, any context numbers


@pytest.mark.parametrize("hard_first", [True, False])
def test_hybrid_keeps_the_hard_term_hard_and_fits_the_moments_under_it(hard_first):
    """The hard feature correlates with the soft one, and one context never meets it."""
    binary, real, _, context_index = random_sample(contexts=3, per_context=1000)
    hard = (real > 0.5).double()
    hard[context_index == 2] = 0
    columns = [hard, binary] if hard_first else [binary, hard]
    values = torch.stack(columns, dim=1)
    soft = distributional([named("b")], [0.4])
    target = pointwise(named("h")) * soft if hard_first else soft * pointwise(named("h"))
    fitted = target.fit(values, context_index)
    log_phi = fitted.log_phi(values)
    assert bool((torch.isneginf(log_phi) == (hard == 0)).all())
    wanted = column(1.0, 0.4)[:, 0] if hard_first else column(0.4, 1.0)[:, 0]
    torch.testing.assert_close(moments_of(fitted, values, context_index), wanted, atol=1e-6, rtol=0)


def test_the_fit_weighs_by_the_other_terms():
    """Under a·exp(r/β) the moment is fitted on samples weighted by exp(r/β)."""
    binary, real, _, context_index = random_sample()
    values = torch.stack([real, binary], dim=1)
    fitted = (rlhf(named("r"), beta=2.0) * distributional([named("b")], [0.7])).fit(values, context_index)
    assert float(moments_of(fitted, values, context_index)[1]) == pytest.approx(0.7, abs=1e-6)


def test_sequences_to_which_a_feature_does_not_apply_are_left_as_they_are():
    """f − moment counts 0 there: the moment is that of the others."""
    binary, _, _, context_index = random_sample()
    values = binary[:, None].clone()
    values[::3] = NAN
    fitted = distributional([named("b")], [0.5]).fit(values, context_index)
    applies = ~values[:, 0].isnan()
    assert bool((fitted.log_phi(values)[~applies] == 0).all())
    centred = (values - 0.5).nan_to_num(0)
    assert float(jackknifed(fitted.log_phi(values).exp(), centred, context_index)) == pytest.approx(0, abs=1e-6)


def test_newton_survives_a_far_start():
    """Wanted means in the tail of heavy, differently scaled features: full Newton steps overshoot there."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5000, 3, generator=generator, dtype=F64) ** 3 * torch.tensor([1.0, 100.0, 0.01])
    wanted = torch.tensor([1.5, -120.0, 0.012], dtype=F64)
    log_weights = torch.randn(5000, generator=generator, dtype=F64)
    owner = torch.zeros(5000, dtype=torch.long)
    exponents, _, ess = solve_exponents(BaseSample(features - wanted, log_weights, owner, 1.0))
    weights = torch.softmax(log_weights + features @ exponents, 0)
    torch.testing.assert_close(jackknifed(weights, features, owner), wanted, atol=1e-6, rtol=1e-6)
    assert ess == pytest.approx(float(1 / weights.square().sum()), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_every_moment_within_reach_is_found(scale):
    """In any unit, and without luck: rounding of the dual near its minimum must not look like failure."""
    for seed in range(40):
        occurs = torch.rand(2000, generator=torch.Generator().manual_seed(seed), dtype=F64) < 0.3
        moment = 0.1 + 0.8 * seed / 40
        values = scale * occurs.double()[:, None]
        fitted = distributional([named("f")], [scale * moment]).fit(values, one_context(values))
        assert float(moments_of(fitted, values, one_context(values))) == pytest.approx(scale * moment, rel=1e-7)


def test_effective_samples_are_those_of_a_typical_context():
    """λ = 0: 100 in one context and 500 in the other, the errors of which average as 1/100 and 1/500."""
    centred = column(*[1.0, -1.0] * 300)
    context_index = torch.arange(2).repeat_interleave(torch.tensor([100, 500]))
    for owner, expected in ((context_index, 2 / (1 / 100 + 1 / 500)), (one_context(centred), 600)):
        exponents, _, ess = solve_exponents(BaseSample(centred, torch.zeros(600, dtype=F64), owner, 1.0))
        assert exponents.tolist() == pytest.approx([0]) and ess == pytest.approx(expected)


# --- fits that cannot be had ---


def mixed(ones, zeros):
    return column(*[1.0] * ones, *[0.0] * zeros)


def test_a_feature_that_never_or_always_occurs_is_refused():
    for values, span in ((mixed(0, 500), r"\[0, 0\]"), (mixed(500, 0), r"\[1, 1\]")):
        with pytest.raises(UserError, match=rf"'rare' lies in {span} on 500 samples.*has mean 0.5.*target_fit_samples"):
            distributional([named("rare")], [0.5]).fit(values, one_context(values))


@pytest.mark.parametrize("moment", [1.0, 1.2, 0.0, -0.3])
def test_a_moment_at_or_outside_the_edge_is_refused(moment):
    values = mixed(200, 300)
    with pytest.raises(UserError, match=rf"'f' lies in \[0, 1\].* no reweighting of them has mean {moment:g}"):
        distributional([named("f")], [moment]).fit(values, one_context(values))


def test_contradictory_moments_are_refused():
    """b ≤ c on every sample, so E[b] = 0.6 and E[c] = 0.4 exclude each other, though each alone is possible."""
    generator = torch.Generator().manual_seed(0)
    either = torch.rand(2000, generator=generator, dtype=F64)
    values = torch.stack([(either < 0.3).double(), (either < 0.6).double()], dim=1)
    features = [named("b"), named("c")]
    assert distributional(features, [0.4, 0.6]).fit(values, one_context(values)).exponents is not None
    with pytest.raises(UserError, match="no λ gives the wanted moments together"):
        distributional(features, [0.6, 0.4]).fit(values, one_context(values))


def test_duplicated_features_share_their_lambda():
    """A singular Hessian is no reason to fail where the moments agree."""
    values = mixed(30_000, 70_000).expand(-1, 2).contiguous()
    fitted = distributional([named("f"), named("again")], [0.5, 0.5]).fit(values, one_context(values))
    bias = (0.5 / 0.3 - 0.5 / 0.7) / 100_000
    assert sum(fitted.exponents) == pytest.approx(math.log(7 / 3) - bias, abs=1e-6)
    with pytest.raises(UserError, match="no λ gives the wanted moments together"):
        distributional([named("f"), named("again")], [0.5, 0.6]).fit(values, one_context(values))


def test_too_few_effective_samples_are_refused():
    """3 of 3000 samples would have to carry half the weight, less what their small number lets them overstate: a share
    of 0.456 gives ESS ≈ 1/(3·(0.456/3)²) = 14.4."""
    values = mixed(3, 2997)
    message = r"\[0.5\] of \['rare'\] rest on 14\.4 effective samples out of 3000.*target_fit_samples"
    with pytest.raises(UserError, match=message):
        distributional([named("rare")], [0.5]).fit(values, one_context(values))


def test_a_hard_term_that_is_hardly_ever_met_is_refused():
    for met in (0, 49):
        values = torch.cat([mixed(met, 1000 - met), mixed(500, 500).flip(0)], dim=1)
        with pytest.raises(UserError, match=rf"{met} of 1000 samples are of use .hard terms.*target_fit_samples"):
            (pointwise(named("h")) * distributional([named("f")], [0.5])).fit(values, one_context(values))


def test_too_few_effective_samples_of_a_context_are_refused():
    """As many as anybody could wish in all, and 8 in each context."""
    values = torch.cat([mixed(4, 4)] * 500)
    message = r"rest on 4000\.0 effective samples out of 4000, 8\.0 a context \(at least 50, and 16 a context"
    with pytest.raises(UserError, match=message):
        distributional([named("f")], [0.5]).fit(values, torch.arange(500).repeat_interleave(8))


def test_contexts_that_hardly_meet_the_hard_terms_are_left_out():
    """5 of 64 samples say nothing of a context's λ, and would outvote the rest by their noise."""
    generator = torch.Generator().manual_seed(0)
    hard = torch.ones(20, 64, dtype=F64)
    hard[10:, 5:] = 0
    soft = (torch.rand(20, 64, generator=generator, dtype=F64) < 0.3).double()
    values, owner = torch.stack([hard.flatten(), soft.flatten()], dim=1), torch.arange(20).repeat_interleave(64)
    target = pointwise(named("h")) * distributional([named("f")], [0.5])
    assert target.fit(values, owner).exponents == target.fit(values[: 10 * 64], owner[: 10 * 64]).exponents
    few = hard.clone()
    few[3:, 5:] = 0
    values = torch.stack([few.flatten(), soft.flatten()], dim=1)
    assert target.fit(values, owner).exponents is not None  # these contexts are all there are
    with pytest.raises(UserError, match="8 or more in 3 of 20 contexts; .* and 4 such contexts"):
        target.fit(values, owner, contexts=1000)
