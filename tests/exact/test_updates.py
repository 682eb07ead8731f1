"""The second and third update of a round follow the exact gradient at the weights that the ones before have moved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fdpg_fast.config.schema import LossConfig, OptimizerConfig
from fdpg_fast.contexts import Context
from fdpg_fast.engines import TransformersEngine
from fdpg_fast.experiments.enumerable import D_F
from fdpg_fast.learner import Learner
from fdpg_fast.models.load import load_model
from fdpg_fast.partition import Baseline, pseudo_rewards
from fdpg_fast.rollouts import pack
from fdpg_fast.updates import division, mini_batches, update
from fdpg_kernels import divergences, sum_by_sequence
from support.enumerable_llama import LONGEST, TEXTS, save_model

CONTEXTS = [Context(0, "c", (3,)), Context(1, "b", (2,)), Context(2, "ab", (1, 2))]
SAMPLES = 4096
DIRECTIONS, MAX_Z = 64, 4.0  # were they independent, one gradient in 250 would have a larger |z|


def every_text():
    """Rollouts of all texts in each context; nobody has drawn them."""
    ids = [[*text, *[0] * (len(text) < LONGEST)] for text in TEXTS]
    drawn = [(own, [0.0] * len(own), own[-1] == 0) for own in ids]
    return pack(CONTEXTS, [drawn] * len(CONTEXTS))


class Exact:
    """log π of every text in a context, its gradients, and those of D_f; all are enumerated."""

    def __init__(self, policy):
        self.policy, self.texts = policy, every_text()
        ids = self.texts.completion_ids()[: len(TEXTS)]
        self.place = {tuple(own): i for i, own in enumerate(ids)}

    def log_prob(self, context: int) -> Tensor:
        own = self.texts.where(self.texts.context_index == context)
        tokens = self.policy.head.logprob(self.policy.hidden(own), own.token_ids).double()
        sequence = torch.repeat_interleave(own.lengths)
        return torch.zeros(len(TEXTS), dtype=torch.float64).index_add(0, sequence, tokens)

    def gradients(self, values: Tensor) -> Tensor:
        """∇ of each of n values, [n, parameters]."""
        parameters = list(self.policy.model.parameters())
        rows = [torch.autograd.grad(value, parameters, retain_graph=True) for value in values]
        return torch.stack([torch.cat([dense(x).flatten() for x in row]) for row in rows]).double()


def dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.layout == torch.sparse_coo else gradient


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("num_contexts", [3, 1])
@pytest.mark.parametrize("ratio", ["sequence", "none"])
@pytest.mark.parametrize("name", ["jensen_shannon", "forward_kl", "reverse_kl"])
def test_every_update_is_unbiased_and_without_the_ratio_only_the_first(name, ratio, num_contexts, model, monkeypatch):
    policy = load_model(str(model), "float32", "cpu", trust_remote_code=False)
    rollouts = TransformersEngine(policy, [0], max_new_tokens=LONGEST).sample(
        CONTEXTS[:num_contexts], 3 * SAMPLES // num_contexts, seed=3
    )
    exact, divergence = Exact(policy), divergences.get(name)
    learner = Learner(policy, LossConfig(ratio=ratio), OptimizerConfig(learning_rate=7e-4), 1, 100_000)
    place = torch.tensor([exact.place[tuple(ids)] for ids in rollouts.completion_ids()])
    log_phi = torch.tensor([1.5 * text.count(2) for text in TEXTS], dtype=torch.float64)
    log_p = torch.stack([exact.log_prob(i).detach() + log_phi for i in range(len(CONTEXTS))])
    of_sample = (log_p, log_p.logsumexp(1, keepdim=True).expand_as(log_p))  # Z from samples would bring its own bias
    log_score, log_z = (x[rollouts.context_index, place] for x in of_sample)
    log_q = sum_by_sequence(rollouts.behavior_logprob, rollouts.cu_seqlens).double()
    part = division(rollouts, 3, seed=0)
    rewards = pseudo_rewards(log_q, log_score, log_z, divergence, None)
    baseline = Baseline()(rewards, rollouts.context_index * 3 + part)
    batches = mini_batches(rollouts, log_score, log_z, baseline, part)
    assert len({int(rollouts.context_index[batch.rows[0]]) for batch in batches}) == num_contexts

    step, largest = learner.step, []

    def compared(loss, weights, index):
        """The largest z of the gradient along random directions, by the samples' own scatter."""
        rows = batches[len(largest)].rows
        context = int(rollouts.context_index[rows[0]])
        log_pi = exact.log_prob(context)
        true = exact.gradients(D_F[name](log_pi.exp(), log_p[context].softmax(0))[None])[0]
        found = torch.cat([dense(p.grad).flatten() for p in policy.model.parameters()]).double()
        directions = torch.randn(len(true), DIRECTIONS, generator=torch.Generator().manual_seed(1)).double()
        scores = (exact.gradients(log_pi) @ directions)[place[rows]]  # along ∇log π of each sample
        terms = -weights.weight.double()[:, None] * scores
        error = terms.std(0) / len(rows) ** 0.5
        assert float(((terms.mean(0) - found @ directions) / error).abs().max()) < 0.05  # float32
        largest.append(float(((found - true) @ directions / error).abs().max()))
        return step(loss, weights, index)

    monkeypatch.setattr(learner, "step", compared)
    first = learner.backward(*batches[0][:4], divergence)
    done = update(learner, batches, first, divergence, 0)
    assert len(done.made) == 3 and max(done.ratio_ess[1:]) < 0.99
    assert largest[0] < MAX_Z
    if ratio == "sequence":
        assert max(largest) < MAX_Z
    else:
        assert min(largest[1:]) > 1.5 * MAX_Z
