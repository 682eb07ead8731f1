"""One case of the exact experiment: reproducible, right where theory gives the number, and refused in one line."""

import dataclasses
import itertools
import math

import pytest
import torch

from fdpg_fast.errors import UserError
from fdpg_fast.experiments.enumerable import (
    D_F,
    Tabular,
    constant_baseline_variance,
    leave_one_out_variance,
    make_bed,
    packed_loss,
    soft_target,
)
from fdpg_fast.experiments.exact import run_case
from fdpg_kernels import sequence_weights

SHORT = {"rounds": 20, "samples": 32, "gradient_batches": 5}


@pytest.mark.parametrize("policy", ["tabular", "low_rank", "transformer"])
def test_a_case_is_reproducible_and_finite(policy, tmp_path):
    first, again, other = (run_case(SHORT | {"policy": policy}, seed, tmp_path) for seed in (0, 0, 1))
    assert dataclasses.replace(first, seconds=0) == dataclasses.replace(again, seconds=0) != other
    assert all(math.isfinite(found.value) for found in first.metrics.values())
    assert all(math.isfinite(value) for point in first.curve for value in point.values())
    assert {f"divergence/{name}" for name in D_F} < set(first.metrics)


@pytest.mark.parametrize("target", ["hard", "rare"])
def test_what_is_infinite_on_zeros_is_left_out(target, tmp_path):
    metrics = run_case(SHORT | {"target": target}, 0, tmp_path).metrics
    assert {"divergence/reverse_kl", "divergence/neyman_chi2"}.isdisjoint(metrics)
    assert all(math.isfinite(found.value) for found in metrics.values())


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "total_variation", "jensen_shannon"])
def test_a_policy_that_can_be_the_target_becomes_it(divergence, tmp_path):
    run = {"divergence": divergence, "beta": 0.3, "rounds": 200}
    start, end = (run_case(run | {"rounds": rounds}, 0, tmp_path).metrics for rounds in (0, 200))
    name = f"divergence/{divergence}"
    assert start[name].value > 0.3 and end[name].value < start[name].value / 10
    assert end["feature/word"].value == pytest.approx(end["feature_of_target"].value, abs=0.1)
    assert end["rounds_to_moment"].value < 200


def test_the_expected_gradient_leads_there_without_samples(tmp_path):
    run = {"samples": None, "baseline": "none", "rounds": 200, "learning_rate": 0.02, "beta": 0.3}
    assert run_case(run, 0, tmp_path).metrics["divergence/jensen_shannon"].value < 1e-3


@pytest.mark.parametrize("baseline", ["leave_one_out", "running", "none", -1.0])
# none whose rewards grow like a power of p/π: such tails leave the variance of 400 batches uncertain by a fifth
@pytest.mark.parametrize("divergence", ["reverse_kl", "total_variation", "jensen_shannon"])
def test_sampled_gradients_vary_as_enumeration_says(divergence, baseline, tmp_path):
    run = {"rounds": 0, "start": "other", "samples": 8, "gradient_batches": 400}
    metrics = run_case(run | {"divergence": divergence, "baseline": baseline}, 1, tmp_path).metrics
    ratio = metrics["gradient/variance_ratio"]
    assert abs(ratio.value - 1) < 5 * ratio.standard_error < 0.7
    assert metrics["gradient/bias"].value < 1e-9
    assert metrics["gradient/bias_sampled"].value < 4


def test_the_variance_with_a_leave_one_out_baseline_counts_every_batch():
    # all 7³ batches of three texts, each with its probability
    bed = make_bed(vocab=3, max_length=2)
    policy, target = Tabular(bed, 1), soft_target(bed, Tabular(bed, 0))
    with torch.no_grad():
        behavior, log_pi = policy.logprob(bed)
    ends = torch.nn.functional.pad(bed.length.cumsum(0), (1, 0))
    rewards = sequence_weights(behavior, behavior, ends, target.log_score, target.log_z).pseudo_reward
    pi, scores = log_pi.exp(), policy.scores(bed)

    def variance(offset):
        gradients, weights = [], []
        for batch in itertools.product(range(len(pi)), repeat=3):
            picks = torch.tensor(batch)
            options = dict(divergence="jensen_shannon", baseline=offset(rewards[picks]))
            gradients.append(policy.flat_grad(packed_loss(bed, policy, picks, behavior, target, **options).loss))
            weights.append(pi[picks].prod())
        found, weight = torch.stack(gradients), torch.stack(weights)
        return float(weight @ (found - weight @ found).square().sum(1))

    others = variance(lambda drawn: (drawn.sum() - drawn) / 2)
    assert leave_one_out_variance(scores, pi, rewards, 3) == pytest.approx(others, rel=1e-9)
    constant = variance(lambda drawn: torch.full_like(drawn, 0.3))
    assert constant_baseline_variance(scores, pi, rewards - 0.3, 3) == pytest.approx(constant, rel=1e-9)
    assert others != pytest.approx(constant, rel=0.01)


def test_a_wrong_z_turns_the_gradient_of_some(tmp_path):
    run = {"rounds": 0, "start": "other", "z_scale": 2.0, "gradient_batches": 2}
    turned = {
        name: run_case(run | {"divergence": name}, 0, tmp_path).metrics["gradient/direction_error"].value
        for name in ("forward_kl", "reverse_kl", "alpha:0.5", "jensen_shannon", "total_variation")
    }
    assert max(turned[name] for name in ("forward_kl", "reverse_kl", "alpha:0.5")) < 1e-9
    assert min(turned[name] for name in ("jensen_shannon", "total_variation")) > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "hellinger"}, "divergence: 'hellinger': unknown divergence"),
        ({"divergence": "alpha:0.4"}, "divergence: 'alpha:0.4': no closed form"),
        ({"divergence": "reverse_kl", "target": "hard"}, "take the soft one"),
        ({"samples": None}, "samples null draws none"),
        ({"sample": 3}, "sample: there is no such setting"),
        ({"policy": "gpt2"}, "policy: 'gpt2': Input should be 'tabular', 'low_rank' or 'transformer'"),
    ],
)
def test_a_wrong_setting_is_named(settings, message, tmp_path):
    with pytest.raises(UserError) as failure:
        run_case(settings, 0, tmp_path)
    assert message in str(failure.value) and "\n" not in str(failure.value)
