"""The bed itself: what the other tests call exact has to be."""

import itertools

import pytest
import torch

from fdpg_fast.experiments.enumerable import EOS, Tabular, Transformer, hard_target, make_bed, soft_target
from support.exact_bed import D_F, HARD, NAMES, exact_divergence, exact_gradient

BED = make_bed()


def test_every_text_is_there_once():
    texts = [tuple(x.tolist()) for x in BED.tokens.split(BED.length.tolist())]
    words = [w for n in range(5) for w in itertools.product((1, 2, 3), repeat=n)]
    assert len(texts) == 1 + 3 + 9 + 27 + 81
    assert set(texts) == {w if len(w) == 4 else (*w, EOS) for w in words}


@pytest.mark.parametrize("policy", [Tabular(BED, 0), Transformer(BED, 0)], ids=["tabular", "transformer"])
def test_probabilities_sum_to_one(policy):
    log_pi = policy.logprob(BED)[1].detach()
    assert float(log_pi.exp().sum()) == pytest.approx(1, abs=1e-14)
    assert float(log_pi.exp().min()) > 1e-7


def test_the_transformer_reads_its_prefix_and_only_that():
    hidden = Transformer(BED, 0).hidden()
    assert len(hidden.unique(dim=0)) == len(BED.prefixes)
    padding = torch.arange(BED.prefixes.shape[1]) >= BED.prefix_length[:, None]
    other = make_bed()
    other.prefixes[padding] = 3
    torch.testing.assert_close(Transformer(other, 0).hidden(), hidden)


def test_targets():
    base = Tabular(BED, 0)
    a = base.logprob(BED)[1].detach().exp()
    soft, hard = soft_target(BED, base), hard_target(BED, base)
    assert bool((soft.p > 0).all()) and float(soft.p.sum()) == pytest.approx(1)
    assert float(hard.log_z.exp()) == pytest.approx(float(a[BED.contains(2)].sum()))
    assert 0.2 < float((hard.p == 0).double().mean()) < 0.8


@pytest.mark.parametrize("name", NAMES)
def test_divergences_and_their_gradients(name):
    base, policy = Tabular(BED, 0), Tabular(BED, 1)
    for target in [soft_target(BED, base)] + ([hard_target(BED, base)] if name in HARD else []):
        assert exact_divergence(BED, policy, target, name) > 0.05
        gradient, step = exact_gradient(BED, policy, target, name), 1e-6
        direction = torch.randn(len(gradient), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        theta = torch.nn.utils.parameters_to_vector(policy.parameters()).detach()
        values = []
        for sign in (1, -1):
            torch.nn.utils.vector_to_parameters(theta + sign * step * direction, policy.parameters())
            values.append(exact_divergence(BED, policy, target, name))
        torch.nn.utils.vector_to_parameters(theta, policy.parameters())
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx(float(gradient @ direction), rel=1e-5, abs=1e-7)
    p = soft_target(BED, base).p
    assert float(D_F[name](p, p)) == pytest.approx(0, abs=1e-12)
