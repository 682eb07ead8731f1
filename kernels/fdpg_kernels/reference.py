"""Every op in plain float64 PyTorch: slow, obvious, the definition that other implementations must meet."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import IGNORED, Head, Logprobs, Options, Sequences, is_ignored


class SequenceWeights(NamedTuple):
    """Everything the f-DPG gradient needs to know about B sequences; all detached.

    Attributes:
        policy_logprob: log π(x|c), [B].
        behavior_logprob: log q(x|c), [B].
        log_t: log π(x|c) − log p(x|c), [B]; +inf where the target is zero.
        log_ratio: log π − log q after the cap, [B]; −inf where it was above `ratio_drop`.
        pseudo_reward: −f'(t) after the cap, [B].
        weight: ratio·(pseudo_reward − baseline), [B].
        clipped: whether a cap changed this sequence's ratio or pseudo-reward, [B] bool.
    """

    policy_logprob: Tensor
    behavior_logprob: Tensor
    log_t: Tensor
    log_ratio: Tensor
    pseudo_reward: Tensor
    weight: Tensor
    clipped: Tensor

    @property
    def dropped(self) -> Tensor:
        """Whether the ratio was above `ratio_drop`, so that this sequence has weight 0, [B] bool."""
        return self.log_ratio.isneginf() & (self.policy_logprob - self.behavior_logprob > -torch.inf)


def linear_logprob(hidden: Tensor, target_ids: Tensor, head: Head) -> Logprobs:
    """log softmax(head(hidden)) at the ids of every row, its entropy and the log-sum-exp, in float64."""
    ignored, ignored_rows = target_ids == IGNORED, is_ignored(target_ids)
    hidden = hidden.double().masked_fill(ignored_rows[:, None], 0.0)  # 0·NaN would be NaN in the gradient of the head
    logits = hidden @ head.weight.double().T  # [N, V]
    if head.bias is not None:
        logits = logits + head.bias.double()
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    temperature = head.temperature if head.row_temperature is None else head.row_temperature.double()[:, None]
    logits = logits / temperature
    logprobs = torch.log_softmax(logits, dim=-1)
    picked = logprobs.gather(1, target_ids.masked_fill(ignored, 0).long()).masked_fill(ignored, 0.0)
    finite = logprobs.masked_fill(logprobs.isneginf(), 0.0)  # an entry of probability 0 adds 0
    entropy = -(logprobs.exp() * finite).sum(1)
    lse = logits.logsumexp(1)
    return Logprobs(picked, lse.masked_fill(ignored_rows, 0.0), entropy.masked_fill(ignored_rows, 0.0))


def sequence_weights(policy_logprob: Tensor, sequences: Sequences, options: Options) -> SequenceWeights:
    """The definition, sequence by sequence: exponentials are formed where they are written."""
    divergence, baseline, ratio, ratio_cap, ratio_drop, reward_cap = options
    cu_seqlens, behavior_logprob, target_log_score, log_z, _ = sequences
    num_sequences = len(cu_seqlens) - 1
    baselines = torch.as_tensor(0.0 if baseline is None else baseline, dtype=torch.float64).expand(num_sequences)
    log_zs = log_z.double().expand(num_sequences)
    rows = []
    for i in range(num_sequences):
        tokens = slice(int(cu_seqlens[i]), int(cu_seqlens[i + 1]))
        log_pi = policy_logprob[tokens].detach().double().sum()
        log_q = behavior_logprob[tokens].double().sum()
        known, zero = bool(log_zs[i] != -math.inf), torch.zeros((), dtype=torch.float64)
        log_t = log_pi - target_log_score[i].double() + log_zs[i] if known else zero
        reward = -divergence.f_prime(log_t) if known else zero
        log_ratio = log_pi - log_q if ratio == "sequence" else torch.zeros_like(log_pi)
        capped_ratio = log_ratio if ratio_cap is None else log_ratio.clamp(max=math.log(ratio_cap))
        capped_reward = reward if reward_cap is None else reward.clamp(-reward_cap, reward_cap)
        weight = capped_ratio.exp() * (capped_reward - baselines[i]) if known else zero
        clipped = known and bool((capped_ratio != log_ratio) | (capped_reward != reward))
        if ratio_drop is not None and log_ratio > math.log(ratio_drop):
            capped_ratio, weight, clipped = -torch.full_like(log_ratio, math.inf), zero, False
        rows.append((log_pi, log_q, log_t, capped_ratio, capped_reward, weight, torch.tensor(clipped)))
    return SequenceWeights(*(torch.stack(column) for column in zip(*rows, strict=True)))


def fdpg_loss(
    hidden: Tensor, target_ids: Tensor, head: Head, sequences: Sequences, options: Options
) -> tuple[Tensor, SequenceWeights]:
    """Σ over sequences of −weight·log π, divided by their total, left to autograd."""
    policy = linear_logprob(hidden, target_ids[:, None], head).logprob[:, 0]
    behavior = torch.where(target_ids == IGNORED, 0.0, sequences.behavior_logprob.double())
    weights = sequence_weights(policy, sequences._replace(behavior_logprob=behavior), options)
    ends = sequences.cu_seqlens
    log_pi = torch.stack([policy[ends[i] : ends[i + 1]].sum() for i in range(len(ends) - 1)])
    return -(weights.weight * log_pi).sum() / sequences.total, weights
