"""What counts as a sampler that does not have the learner's weights."""

from types import SimpleNamespace

import pytest
import torch

from fdpg_fast.config.load import parse_config
from fdpg_fast.contexts import Context
from fdpg_fast.measure.agreement import Disagreement, compare_with_learner
from fdpg_fast.rollouts import pack

BFLOAT16 = parse_config(
    {"model": "m", "run_dir": "r", "dtype": "bfloat16", "target": [{"kind": "import", "path": "a:b"}]}
)


def compare(errors, every=False, seed=0):
    """Completions whose tokens err by so many nats; the learner gives log-probs of −1."""
    drawn = [([5] * len(e), [-1.0 + x for x in e], False) for e in errors]
    policy = SimpleNamespace(token_logprobs=lambda rollouts, _: torch.full((rollouts.num_tokens,), -1.0))
    return compare_with_learner(pack([Context(0, "", (1,))], [drawn]), policy, BFLOAT16, seed, 64, every=every)


@pytest.mark.parametrize("every", [False, True])
def test_a_single_token_may_err_as_bfloat16_does(every):
    """The last completion of a round may be all that is compared, and have one token."""
    errors = [[0.5]] if every else [[0.0] * 40, [0.5]]
    assert compare(errors, every, seed=1)["logprob_gap_mean"] == pytest.approx(0.5)


@pytest.mark.parametrize("errors", [[[0.5]] * 8, [[3.0]], [[0.5] * 8], [[float("nan")]]])
def test_more_than_that_is_another_model(errors):
    with pytest.raises(Disagreement) as caught:
        compare(errors, every=True)
    assert list(caught.value.rows) == list(range(len(errors)))
