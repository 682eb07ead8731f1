"""What only the tests need of the enumerable bed: a user's own divergences, everything by name, per-text gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fdpg_fast.experiments import enumerable
from fdpg_fast.experiments.enumerable import Bed, ExactTarget, Policy, alpha
from fdpg_kernels import Divergence, FDPGLoss, divergences, sequence_weights

D_F = {name: enumerable.D_F[name] for name in divergences.NAMES} | {
    "alpha:0.3": alpha(0.3),
    "triangular": lambda pi, p: ((pi - p) ** 2 / (pi + p)).sum(),
    "jeffreys": lambda pi, p: ((pi - p) * (pi / p).log()).sum(),
}
USER = {  # what a user might bring along, with and without a price for zeros
    "triangular": Divergence("triangular", lambda t: (t - 1) ** 2 / (t + 1), 1.0),
    "jeffreys": Divergence("jeffreys", lambda t: t * t.log() - t.log(), torch.inf),
}
NAMES = tuple(D_F)
STEPS, SAMPLES = 400, 256
HARD = tuple(name for name in NAMES if name not in ("reverse_kl", "neyman_chi2", "jeffreys"))


def divergence(name: str) -> str | Divergence:
    return USER.get(name, name)


def packed_loss(
    bed: Bed, policy: Policy, picks: Tensor, behavior: Tensor, target: ExactTarget, name: str, **options
) -> FDPGLoss:
    return enumerable.packed_loss(bed, policy, picks, behavior, target, divergence(name), **options)


def gradient_per_text(bed: Bed, policy: Policy, behavior: Tensor, target: ExactTarget, name: str, **options) -> Tensor:
    """∇ of fdpg_loss of each text alone, [B, parameters]; E_q of its rows is the expected gradient."""
    rows = []
    for i in range(len(bed.length)):
        loss = packed_loss(bed, policy, torch.tensor([i]), behavior, target, name, **options).loss
        rows.append(policy.flat_grad(loss))
    return torch.stack(rows)


def exact_gradient(bed: Bed, policy: Policy, target: ExactTarget, name: str) -> Tensor:
    return enumerable.exact_gradient(bed, policy, target, D_F[name])


def exact_divergence(bed: Bed, policy: Policy, target: ExactTarget, name: str) -> float:
    with torch.no_grad():
        return float(D_F[name](policy.logprob(bed)[1].exp(), target.p))


def leave_one_out(values: Tensor) -> Tensor:
    """Mean of the other samples' values, [S]: a baseline that does not depend on its own sample."""
    return (values.sum() - values) / (len(values) - 1)


def train(
    bed: Bed, policy: Policy, target: ExactTarget, name: str, *, stale: int = 0, steps: int = STEPS, **options
) -> None:
    """Adam on fdpg_loss, lr falling to zero; texts come from the policy of `stale` steps ago."""
    rng = torch.Generator().manual_seed(0)
    ends = torch.nn.functional.pad(bed.length.cumsum(0), (1, 0))
    optimiser = torch.optim.Adam(policy.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    samplers: list[tuple[Tensor, Tensor]] = []
    for _ in range(steps):
        with torch.no_grad():
            samplers = [*samplers, policy.logprob(bed)][-1 - stale :]
        behavior, log_q = samplers[0]
        picks = torch.multinomial(log_q.exp(), SAMPLES, replacement=True, generator=rng)
        known = sequence_weights(behavior, behavior, ends, target.log_score, target.log_z, divergence=divergence(name))
        baseline = leave_one_out(known.pseudo_reward[picks])
        loss = packed_loss(bed, policy, picks, behavior, target, name, baseline=baseline, **options).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
