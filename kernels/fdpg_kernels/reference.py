"""Every op in plain float64 PyTorch: slow, obvious, the definition that other implementations must meet."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .divergences import Divergence

IGNORED = -100


class SequenceWeights(NamedTuple):
    """Everything the f-DPG gradient needs to know about B sequences; all detached.

    Attributes:
        policy_logprob: log π(x|c), [B].
        behavior_logprob: log q(x|c), [B].
        log_t: log π(x|c) − log p(x|c), [B]; +inf where the target is zero.
        log_ratio: log π − log q after the cap, [B].
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


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> Tensor:
    """log softmax(head(hidden))[target] per row, [N] float64."""
    logits = hidden.double() @ weight.double().T  # [N, V]
    if bias is not None:
        logits = logits + bias.double()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    ignored = target_ids == IGNORED
    picked = logprobs.gather(1, target_ids.masked_fill(ignored, 0).long()[:, None])[:, 0]
    return torch.where(ignored, 0.0, picked)


def sequence_weights(
    policy_logprob: Tensor,
    behavior_logprob: Tensor,
    cu_seqlens: Tensor,
    target_log_score: Tensor,
    log_z: Tensor,
    *,
    divergence: Divergence,
    baseline: Tensor | float | None,
    ratio: str,
    ratio_cap: float | None,
    reward_cap: float | None,
) -> SequenceWeights:
    """The definition, sequence by sequence: exponentials are formed where they are written."""
    num_sequences = len(cu_seqlens) - 1
    baselines = torch.as_tensor(0.0 if baseline is None else baseline, dtype=torch.float64).expand(num_sequences)
    log_zs = torch.as_tensor(log_z, dtype=torch.float64).expand(num_sequences)
    rows = []
    for i in range(num_sequences):
        tokens = slice(int(cu_seqlens[i]), int(cu_seqlens[i + 1]))
        log_pi = policy_logprob[tokens].detach().double().sum()
        log_q = behavior_logprob[tokens].detach().double().sum()
        if log_zs[i] == -math.inf:
            log_t, reward, weight_factor = torch.tensor(0.0).double(), torch.tensor(0.0).double(), 0.0
        else:
            log_t, weight_factor = log_pi - target_log_score[i].double() + log_zs[i], 1.0
            reward = -divergence.f_prime(log_t)
        log_ratio = log_pi - log_q if ratio == "sequence" else torch.zeros_like(log_pi)
        capped_ratio = log_ratio if ratio_cap is None else log_ratio.clamp(max=math.log(ratio_cap))
        capped_reward = reward if reward_cap is None else reward.clamp(-reward_cap, reward_cap)
        weight = weight_factor * capped_ratio.exp() * (capped_reward - baselines[i])
        clipped = weight_factor > 0 and bool((capped_ratio != log_ratio) | (capped_reward != reward))
        rows.append((log_pi, log_q, log_t, capped_ratio, capped_reward, weight, torch.tensor(clipped)))
    return SequenceWeights(*(torch.stack(column) for column in zip(*rows, strict=True)))


def fdpg_loss(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    cu_seqlens: Tensor,
    behavior_logprob: Tensor,
    target_log_score: Tensor,
    log_z: Tensor,
    *,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    total_sequences: int,
    weight_grad_out: Tensor | None,
    **options,
) -> tuple[Tensor, SequenceWeights]:
    """mean over sequences of −weight·log π, left to autograd."""
    if weight_grad_out is not None:
        weight = weight.detach().requires_grad_()
    policy = linear_logprob(hidden, weight, target_ids, bias=bias, temperature=temperature, softcap=softcap)
    behavior = torch.where(target_ids == IGNORED, 0.0, behavior_logprob.double())
    weights = sequence_weights(policy, behavior, cu_seqlens, target_log_score, log_z, **options)
    num_sequences = len(cu_seqlens) - 1
    log_pi = torch.stack([policy[cu_seqlens[i] : cu_seqlens[i + 1]].sum() for i in range(num_sequences)])
    loss = -(weights.weight * log_pi).sum() / total_sequences
    if weight_grad_out is not None and torch.is_grad_enabled():
        weight_grad_out += torch.autograd.grad(loss, weight, retain_graph=True)[0]
    return loss, weights
