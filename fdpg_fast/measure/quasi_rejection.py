"""Quasi-rejection sampling: nearer to the target than the policy is, paid for with draws (Eikema et al. 2022).

A draw x ~ q is kept with probability min(1, p(x)/(β·q(x))). What is kept has the law p_β ∝ min(p, β·q): p itself once
β·q covers p, and q (where p > 0) as β → 0. β is in units of Z: p is the normalised target P/Z_c, so that one β means
the same in every context. Where a text has accept with P/(β·q), its β is ours times Z_c.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from .. import by_context
from ..errors import UserError
from .estimators import Estimate, log_partition, mean

BETAS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
MEASURED = 256  # draws, over all contexts, that measure Z_c before any is kept; at least LEAST of each context
LEAST = 16


@dataclass(frozen=True)
class Quality:
    """What a β costs and what it buys, averaged over contexts."""

    beta: float
    acceptance: Estimate  # the part of the draws that is kept
    total_variation: Estimate  # ½Σ|p − p_β|
    forward_kl: Estimate  # KL(p‖p_β) in nats


def estimate(log_weights: Tensor, context_index: Tensor, betas: Sequence[float] = BETAS) -> list[Quality]:
    """Acceptance rate, TV and KL for every β, from one sample of q.

    With w = p/q, m = min(w, β) and S = E_q[m]: acceptance S/β, TV = ½E_q|w − m/S|, KL = E_q[w·log(w/m)] + log S.
    Z_c is the mean of P/q over the same sample, so w cannot exceed the number of samples of a context: a β near it is
    not judged. Errors as in `estimators.mean`, in one context by the delta method, Z_c's part in them included.
    Contexts without P > 0 and those of one sample are left out.

    Args:
        log_weights: log P/q, [B] float64; −inf where P = 0.
        context_index: [B], values 0..C−1.
    """
    partition = log_partition(torch.zeros_like(log_weights), log_weights, context_index)
    usable = partition.log_z.isfinite() & (context_index.bincount() > 1)
    log_weights = log_weights[usable[context_index]].double()
    context_index, counts = by_context.renumber(context_index[usable[context_index]])

    def measure(share: Tensor, beta: float) -> tuple[Tensor, ...]:
        """The three, [C] each, as functions of the masses: their derivatives are the samples' influences."""
        log_w = log_weights - by_context.log_sum_exp(log_weights, context_index, len(counts), share)[context_index]
        w, m = log_w.exp(), log_w.clamp(max=math.log(beta)).exp()
        accepted = by_context.sums(share * m, context_index, len(counts))  # S
        distances = (w - m / accepted[context_index]).abs() / 2
        excesses = w * (log_w - math.log(beta)).clamp(min=0)
        distance, excess = (by_context.sums(share * x, context_index, len(counts)) for x in (distances, excesses))
        return accepted / beta, distance, excess + accepted.log()

    share = (1 / counts.double())[context_index].requires_grad_()  # each sample's mass in its context's empirical q
    qualities = []
    for beta in betas:
        estimates = []
        for values in measure(share, beta):
            (influence,) = torch.autograd.grad(values.sum(), share, retain_graph=True)
            influence = influence - by_context.means(influence, context_index, counts)[context_index]
            influenced = mean(values.detach()[context_index] + influence, context_index)
            estimates.append(replace(influenced, ess=float(partition.ess.sum()), per_context=partition.per_context))
        qualities.append(Quality(beta, *estimates))
    return qualities


def acceptance_probability(log_weights: Tensor, log_z: Tensor, beta: float) -> Tensor:
    """min(1, P/(β·Z·q)) from log P/q and log Z, which broadcast; 0 where P = 0."""
    return (log_weights - log_z - math.log(beta)).clamp(max=0).exp()


@dataclass(frozen=True)
class Kept:
    """What `sample` found."""

    items: list[Any]  # those that were kept, by context in turn
    draws: int  # how many were drawn, those that measured Z_c included
    unreachable: list[int]  # contexts in which no measured draw had P > 0; nothing is kept there
    quality: list[Quality]  # for every β of the grid and the one asked for, from all the draws
    beta_error: float  # relative standard error of β, which is that of the Z_c that the draws were judged by


Draw = Callable[[list[int], int], tuple[list[Any], Tensor, Tensor]]
"""Indices of contexts, draws of each → the drawn items, their log P/q [B] and contexts' indices [B]."""


def sample(draw: Draw, *, contexts: int, count: int, beta: float, max_draws: int, seed: int) -> Kept:
    """Draw until `count` items are kept, as evenly over the contexts as can be, or `max_draws` are spent.

    The first draws only measure Z_c and are not handed out: a draw must not move the threshold that it is judged by.

    Raises:
        UserError: max_draws is too small to measure Z_c.
    """
    if max_draws < 2 * LEAST * contexts:
        raise UserError(
            f"--max-draws: {max_draws} is too small for {contexts} contexts: half of the draws, at least {LEAST} of "
            f"each context, measure Z; give {2 * LEAST * contexts} or more, or a lower --count"
        )
    generator = torch.Generator().manual_seed(seed)
    first = min(max(LEAST, MEASURED // contexts), max_draws // (2 * contexts))
    _, log_weights, context_index = draw(list(range(contexts)), first)
    partition = log_partition(torch.zeros_like(log_weights), log_weights, context_index)
    log_z = partition.log_z
    reachable = log_z.isfinite().nonzero()[:, 0].tolist()
    wanted = {c: len(range(place, count, len(reachable))) for place, c in enumerate(reachable)}
    rate = float(acceptance_probability(log_weights, log_z[context_index].nan_to_num(neginf=0.0), beta).mean())
    items: dict[int, list[Any]] = {c: [] for c in reachable}
    while (left := max_draws - len(log_weights)) and (lacking := [c for c in reachable if len(items[c]) < wanted[c]]):
        lacking = lacking[:left]
        lack = max(wanted[c] - len(items[c]) for c in lacking)
        each = min(math.ceil(lack / max(rate, 1e-9)), MEASURED, left // len(lacking))
        drawn, drawn_log_weights, drawn_index = draw(lacking, each)
        uniform = torch.rand(len(drawn), generator=generator, dtype=torch.float64)
        accepted = uniform < acceptance_probability(drawn_log_weights, log_z[drawn_index], beta)
        for item, c, yes in zip(drawn, drawn_index.tolist(), accepted.tolist(), strict=True):
            if yes and len(items[c]) < wanted[c]:
                items[c].append(item)
        log_weights = torch.cat([log_weights, drawn_log_weights])
        context_index = torch.cat([context_index, drawn_index])
    by_turn = [item for turn in zip_longest(*items.values()) for item in turn if item is not None]
    quality = estimate(log_weights, context_index, sorted({*BETAS, beta}))
    error = float(partition.relative_standard_error[reachable].square().mean().sqrt())
    return Kept(by_turn, len(log_weights), [c for c in range(contexts) if c not in wanted], quality, error)
