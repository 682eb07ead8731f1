"""Forward KL and Jensen–Shannon on exact samples of p: where φ is 0 or 1, the samples of the base that it allows.

They hold all that p has, as often as p has it, also what π never samples. Contexts weigh alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fdpg_kernels import sum_by_sequence

from .. import by_context
from ..models.language_model import LanguageModel
from ..rollouts import Rollouts
from ..scoring import Scorer
from .estimators import Estimate, mean


@dataclass(frozen=True)
class TargetSamples:
    """S exact samples of p."""

    rollouts: Rollouts  # of the contexts that have some; behavior_logprob is log a on the scoring path
    draws: int  # samples of the base of each context, of which these are left

    def logprob(self, model: LanguageModel, micro_batch_tokens: int) -> Tensor:
        """Of each sample under a model, [S] float64."""
        return sum_by_sequence(model.token_logprobs(self.rollouts, micro_batch_tokens), self.rollouts.cu_seqlens)


def accepted(base: Rollouts, log_phi: Tensor, scorer: Scorer) -> TargetSamples | None:
    """Those of the base's samples, as many of each context, that φ allows; None without any, or where φ is not 0 or 1.

    log_phi: of each sample, [B].
    """
    allowed = log_phi == 0
    if not bool(allowed.any() & (allowed | log_phi.isneginf()).all()):
        return None
    rollouts = base.where(allowed)
    with scorer.base.as_base() as model:
        base_logprob = model.token_logprobs(rollouts, scorer.micro_batch_tokens)
    return TargetSamples(replace(rollouts, behavior_logprob=base_logprob), len(base) // len(base.contexts))


def measure(
    samples: TargetSamples,
    logprob_of_samples: Tensor,
    policy_logprob: Tensor,
    target_log_score: Tensor,
    context_index: Tensor,
) -> dict[str, Estimate]:
    """KL(p‖π), Jensen–Shannon and its half, KL(p‖a), by name, in nats; and how many contexts have no sample of p.

    With Z_c the part k/n of the base's samples that φ allows:

        KL(p‖π) = E_p[log a − log π] − log Z_c
        JS = E_p[log p/m] + E_π[log π/m], m = (π + p)/2; twice the ½–½ value

    Of log Z_c the bias is taken off, −(1/k − 1/n)/2 to first order (delta method). JS does not change with Z_c to first
    order, for E_p[π/(π + p)] = E_π[p/(π + p)]. Errors are as in `estimators.mean`; in one context those of both samples
    and, of KL, of Z_c.

    Args:
        logprob_of_samples: log π of the S samples of p, [S] float64.
        policy_logprob, target_log_score, context_index: of B samples of π, as `estimators` takes them.
    """
    owner = samples.rollouts.dataset_index
    found = owner.bincount(minlength=int(context_index[-1]) + 1).double()  # k of each context
    variance = 1 / found - 1 / samples.draws  # of log Z_c
    log_z = (found / samples.draws).log() + variance / 2
    base_logprob = sum_by_sequence(samples.rollouts.behavior_logprob, samples.rollouts.cu_seqlens)
    log_t = logprob_of_samples - base_logprob + log_z[owner]  # log π/p of p's samples
    used = found[context_index] > 0
    log_t_policy = (policy_logprob - target_log_score + log_z[context_index])[used]  # of π's
    log_z, owner = log_z[owner], samples.rollouts.context_index
    context_index, _ = by_context.renumber(context_index[used])
    from_both = [(math.log(2) - softplus(log_t), owner), (math.log(2) - softplus(-log_t_policy), context_index)]
    error_of_z = float(variance[found > 0][0].sqrt())  # where there is one context

    whole = _sum(from_both, 0.0)
    return {
        "forward_kl": _sum([(-log_t, owner)], error_of_z),
        "jensen_shannon": whole,
        "jensen_shannon_half": replace(whole, value=whole.value / 2, standard_error=whole.standard_error / 2),
        "kl_of_target_to_base": _sum([(-log_z, owner)], error_of_z),
        "contexts_left_out": Estimate(float((found == 0).sum()), math.nan, float(len(found))),
    }


def _sum(parts: list[tuple[Tensor, Tensor]], error_of_z: float) -> Estimate:
    """The sum of means of independent samples, values and contexts of each, the first those of p."""
    means = [mean(values, owner) for values, owner in parts]
    each = torch.stack([by_context.means(values.double(), owner, owner.bincount()) for values, owner in parts]).sum(0)
    error = mean(each, torch.arange(len(each))).standard_error
    if len(each) == 1:
        error = math.hypot(error_of_z, *(estimate.standard_error for estimate in means))
    return Estimate(float(each.mean()), error, float(len(parts[0][0])))
