"""What several kernel tests share: the divergences by name, and packed batches of random sequences."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from fdpg_kernels import divergences

NAMES = (*divergences.NAMES, "alpha:0.3", "alpha:0.5")
ALLOW_ZEROS = tuple(name for name in NAMES if divergences.get(name).allows_zeros)
IGNORED = -100


def packing(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)  # cu_seqlens [B+1]


def batch(lengths: list[int], *, zeros: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of sequence_weights; a third of the target scores are −inf where `zeros`."""
    rng = torch.Generator().manual_seed(seed)
    num_tokens, num_sequences = sum(lengths), len(lengths)
    policy = -torch.rand(num_tokens, dtype=torch.float64, generator=rng) * 2
    behavior = policy + torch.randn(num_tokens, dtype=torch.float64, generator=rng) / 4
    cu_seqlens = packing(lengths)
    log_pi = torch.stack([policy[a:b].sum() for a, b in zip(cu_seqlens, cu_seqlens[1:], strict=False)])
    score = log_pi - 1 + torch.randn(num_sequences, dtype=torch.float64, generator=rng)
    if zeros:
        score[::3] = -torch.inf
    return dict(
        policy_logprob=policy,
        behavior_logprob=behavior,
        cu_seqlens=cu_seqlens,
        target_log_score=score,
        log_z=torch.tensor(-0.7, dtype=torch.float64),
    )


def head_batch(lengths: list[int], *, vocab: int = 11, width: int = 5, zeros: bool = False, seed: int = 0):
    """Arguments of fdpg_loss in float64, gradients wanted for hidden, weight and bias."""
    rng = torch.Generator().manual_seed(seed)
    arguments = batch(lengths, zeros=zeros, seed=seed + 1)
    del arguments["policy_logprob"]
    num_tokens = sum(lengths)
    leaf = dict(dtype=torch.float64, generator=rng, requires_grad=True)
    arguments["hidden"] = torch.randn(num_tokens, width, **leaf)
    arguments["weight"] = torch.randn(vocab, width, **leaf)
    arguments["bias"] = torch.randn(vocab, **leaf)
    arguments["target_ids"] = torch.randint(vocab, (num_tokens,), generator=rng)
    # the sampler is the learner of a moment ago, so that ratios stay near 1
    logits = arguments["hidden"].detach() @ arguments["weight"].detach().T + arguments["bias"].detach()
    policy = logits.log_softmax(-1).gather(1, arguments["target_ids"][:, None])[:, 0]
    arguments["behavior_logprob"] = policy + torch.randn(num_tokens, dtype=torch.float64, generator=rng) / 10
    ends = arguments["cu_seqlens"].tolist()
    log_pi = torch.stack([policy[a:b].sum() for a, b in zip(ends, ends[1:], strict=False)])
    spread = torch.randn(len(lengths), dtype=torch.float64, generator=rng)
    zero = torch.isneginf(arguments["target_log_score"])
    arguments["target_log_score"] = torch.where(zero, -torch.inf, log_pi - 1 + spread)
    return arguments
