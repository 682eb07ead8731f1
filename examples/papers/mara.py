"""MARA's target (arXiv 2510.20817): the same for all completions that reach a threshold, however likely the base."""

import torch
from torch import Tensor

from fdpg_fast.features import regex
from fdpg_fast.targets import Target, Term

BETA, THRESHOLD = 0.5, 1.0
ANCHOR = -2.0  # log a of a good completion, to which the others are lifted or lowered


def log_phi(values: Tensor, log_a: Tensor) -> Tensor:
    """Reward/β, [B], where what is good gets the reward of the anchor: reward + β·(log a(anchor) − log a)."""
    reward = values[:, 0]
    return reward / BETA + torch.where(reward >= THRESHOLD, ANCHOR - log_a, 0.0)


def target() -> Target:
    return Target((Term((regex(r"^ (True|False|None)$"),), log_phi, can_be_zero=False, reads_base=True),))
