"""Forward KL and Jensen–Shannon on exact samples of p, against sums over every text of enumerable models."""

import math
from types import SimpleNamespace

import pytest
import torch

from fdpg_fast.contexts import Context
from fdpg_fast.experiments.enumerable import D_F, Tabular, hard_target, make_bed
from fdpg_fast.measure.estimators import divergence_matrix
from fdpg_fast.measure.target_samples import accepted, measure
from fdpg_fast.rollouts import pack

BED = make_bed(vocab=3, max_length=3)
POOL, LEAST = 120, 0.05  # contexts, and the least Z of them
NAMES = ("forward_kl", "jensen_shannon", "jensen_shannon_half", "kl_of_target_to_base")


class World:
    """Contexts that differ: log a, log π and log P of every text in each, [C, K], and the exact values, [C] each."""

    def __init__(self, contexts, spread):
        bases = [Tabular(BED, seed, spread=0.8) for seed in range(3 * contexts)]
        bases = [base for base in bases if float(hard_target(BED, base).log_z) > math.log(LEAST)][:contexts]
        policies = [Tabular(BED, 1000 + seed, spread=spread) for seed in range(contexts)]
        targets = [hard_target(BED, base) for base in bases]
        with torch.no_grad():
            self.log_a, self.log_pi = (torch.stack([m.logprob(BED)[1] for m in x]) for x in (bases, policies))
        self.log_score, p = (torch.stack([getattr(t, x).double() for t in targets]) for x in ("log_score", "p"))
        pairs = list(zip(self.log_pi.exp(), p, strict=True))
        values = {name: torch.stack([D_F[name](*pair) for pair in pairs]) for name in NAMES[:2]}
        values["jensen_shannon_half"] = values["jensen_shannon"] / 2
        values["kl_of_target_to_base"] = -torch.stack([target.log_z for target in targets])
        self.exact = values

    def estimates(self, generator, places, draws, samples):
        """From `draws` samples of the base and `samples` of the policy of each context in `places`."""
        texts = torch.multinomial(self.log_a[places].exp(), draws, replacement=True, generator=generator)
        owner = torch.arange(len(places)).repeat_interleave(draws)
        log_a = self.log_a[places][owner, texts.flatten()]
        log_phi = (self.log_score - self.log_a)[places][owner, texts.flatten()]
        groups = [[([text], [0.0], True) for text in row] for row in texts.tolist()]
        base = pack([Context(i, "", (0,)) for i in range(len(places))], groups)
        found = accepted(base, log_phi, self.scorer(places))
        assert found.draws == draws and len(found.rollouts) == int((log_phi == 0).sum())
        chosen = found.rollouts
        torch.testing.assert_close(chosen.behavior_logprob, log_a[log_phi == 0].float())
        log_pi_of_samples = self.log_pi[places][chosen.dataset_index, chosen.token_ids]
        outcomes = torch.multinomial(self.log_pi[places].exp(), samples, replacement=True, generator=generator)
        owner = torch.arange(len(places)).repeat_interleave(samples)
        log_pi, log_score = (x[places][owner, outcomes.flatten()] for x in (self.log_pi, self.log_score))
        return measure(found, log_pi_of_samples, log_pi, log_score, owner), (log_pi, log_score, owner)

    def scorer(self, places):
        """A base whose only token is the text."""

        class Base:
            def as_base(self):
                return self

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

            def token_logprobs(base, rollouts, _):
                return self.log_a[places][rollouts.dataset_index, rollouts.token_ids].float()

        return SimpleNamespace(base=Base(), micro_batch_tokens=1)


@pytest.fixture(scope="module")
def world():
    return World(POOL, spread=2.0)


def coverage(estimates, truth):
    return sum(low <= truth <= high for low, high in (e.interval for e in estimates)) / len(estimates)


def test_intervals_cover_in_one_context(world):
    generator, place = torch.Generator().manual_seed(0), torch.tensor([3])
    runs = [world.estimates(generator, place, 200, 100)[0] for _ in range(300)]
    for name in NAMES:
        found, truth = [run[name] for run in runs], float(world.exact[name][3])
        values = torch.tensor([e.value for e in found])
        assert coverage(found, truth) == pytest.approx(0.95, abs=0.035), name
        assert float(values.mean()) == pytest.approx(truth, abs=4 * float(values.std()) / math.sqrt(len(runs)) + 0.003)


def test_intervals_cover_over_contexts_drawn_at_random(world):
    generator, runs = torch.Generator().manual_seed(1), []
    for _ in range(300):
        places = torch.randint(POOL, (25,), generator=generator)
        runs.append(world.estimates(generator, places, 64, 32)[0])
    for name in NAMES:
        found, truth = [run[name] for run in runs], float(world.exact[name].mean())
        values = torch.tensor([e.value for e in found])
        assert coverage(found, truth) == pytest.approx(0.95, abs=0.06), name
        assert float(values.mean()) == pytest.approx(truth, abs=4 * float(values.std()) / math.sqrt(len(runs)) + 0.01)


def test_what_the_policy_never_samples_is_counted(world):
    """Its own samples, reweighted, do not know of it."""
    generator, places = torch.Generator().manual_seed(2), torch.arange(POOL)
    found, of_policy = world.estimates(generator, places, 64, 32)
    reweighted = divergence_matrix(*of_policy).estimates["forward_kl"]
    truth = float(world.exact["forward_kl"].mean())
    assert reweighted.value + 4 * reweighted.standard_error < truth - 1
    assert abs(found["forward_kl"].value - truth) < 3 * found["forward_kl"].standard_error


def test_contexts_without_a_sample_are_left_out_and_counted(world):
    generator, places = torch.Generator().manual_seed(3), torch.arange(POOL)
    found, _ = world.estimates(generator, places, 4, 2)
    left_out = found["contexts_left_out"]
    assert 0 < left_out.value < POOL / 2 and left_out.ess == POOL
    truth = float(world.exact["jensen_shannon"].mean())  # which four samples do not bias much
    assert abs(found["jensen_shannon"].value - truth) < 4 * found["jensen_shannon"].standard_error


@pytest.mark.parametrize("log_phi", [[0.0, 0.5], [0.0, -0.1], [-math.inf, -math.inf]])
def test_no_exact_samples_where_none_meets_the_target_or_it_is_not_0_or_1(log_phi):
    base = pack([Context(0, "", (0,))], [[([1], [0.0], True)] * 2])
    assert accepted(base, torch.tensor(log_phi), None) is None
