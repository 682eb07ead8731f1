"""linear_logprob where the vocabulary of the head is sharded over the ranks of a process group.

Rank r holds rows vocab_start : vocab_start + V_r of the head; hidden states and targets are the same everywhere. Of its
shard it finds the log-sum-exp lse_r, the entropy H_r and the logits z_y of the targets that are its own. With
s_r = exp(lse_r − lse) the share of a shard in the softmax of all,

    lse = log Σ_r exp(lse_r),    log π(y) = z_y − lse,    H = Σ_r s_r·(H_r − log s_r).

A rank differentiates these in what it found itself; what came from the others is constant to it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .arguments import IGNORED, Logprobs, Number, result_dtype, to_device
from .checks import make_head
from .logprob import as_asked, token_logprobs
from .operators import choose_impl

NOTHING = -1e30  # the log-sum-exp of an empty shard, −inf, as a number that has a gradient


def sharded_linear_logprob(
    hidden: Tensor,
    weight_shard: Tensor,
    target_ids: Tensor,
    *,
    vocab_start: int,
    group: dist.ProcessGroup | None = None,
    bias: Tensor | None = None,
    temperature: Number = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    return_lse: bool = False,
    chunk_bytes: int | None = None,
    impl: str = "auto",
) -> Any:
    """log softmax(head(hidden))[target] of every row, each rank holding a part of the head.

    All ranks of the group call this with the same hidden, target_ids and options, get the same log-probs, and run
    `backward` of the same function of them. The forward is one all-gather of [1 + K, N] numbers ([2 + K, N] with the
    entropy), the backward one all-reduce of the gradient of hidden (none if hidden wants no gradient).

    The f-DPG loss of a sharded head is written out, the same on every rank; its gradients are those of `fdpg_loss`:

        logprob = sharded_linear_logprob(hidden, weight_shard, target_ids, vocab_start=start, group=group)  # [N]
        weights = sequence_weights(logprob, behavior_logprob, cu_seqlens, target_log_score, log_z)
        token_weight = weights.weight.repeat_interleave(cu_seqlens.diff())  # [N]
        loss = -(token_weight * logprob).sum() / len(weights.weight)

    Args:
        hidden: final hidden states, [..., D] floating point, replicated.
        weight_shard: rows vocab_start : vocab_start + V_r of the head, [V_r, D], same dtype as hidden; V_r may
            differ between ranks and be 0.
        target_ids: ids in the whole vocabulary, [...] or [..., K] integer, replicated; -100 marks an ignored one.
        vocab_start: id of this shard's first token.
        group: the ranks that share the head, None for the default group.
        bias: of this shard, [V_r], finite, or None.
        temperature, softcap, return_entropy, return_lse, chunk_bytes, impl: as in `linear_logprob`.

    Returns:
        What `linear_logprob` returns, of the whole vocabulary, the same on all ranks. The gradient of hidden is of the
        whole head, too; those of weight_shard and bias stay local.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit. On CPU tensors also, on all ranks at once, where a
            target lies in no shard or in several; on a GPU, which is not asked to wait, the first gives -inf.
    """
    rows, ids, head = make_head(hidden, target_ids, weight_shard, bias, temperature, softcap, chunk_bytes)
    ids, impl = to_device(ids, rows.device), choose_impl(impl, rows, multiplies=True)
    if vocab_start < 0:
        raise ValueError(f"vocab_start={vocab_start}; it must be the id of the shard's first token, 0 or more")
    if head.bias is not None and head.bias.device.type == "cpu" and not bool(head.bias.isfinite().all()):
        raise ValueError("bias must be finite")
    if impl == "reference":
        rows, bias = rows.double(), None if head.bias is None else head.bias.double()
        head = head._replace(weight=head.weight.double(), bias=bias)
    size = len(head.weight)
    impl = "triton" if impl == "triton" and size else "chunked"  # which takes an empty shard, too
    ignored, local_ids = ids == IGNORED, ids.long() - vocab_start
    owned = ~ignored & (local_ids >= 0) & (local_ids < size)
    local_ids = local_ids.clamp(0, max(size - 1, 0)).masked_fill(ignored, IGNORED)  # of a target elsewhere any id
    own = token_logprobs(_SumGradients.apply(rows, group), local_ids, head, return_entropy, impl)
    own_target = (own.logprob + own.lse[:, None]).masked_fill(~owned, -torch.inf)  # [N, K]

    own_entropy = [] if own.entropy is None else [own.entropy.double()]
    mine = torch.stack([own.lse, *own_target.unbind(1), *own_entropy]).detach()
    ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(ranks, mine, group=group)
    targets = torch.stack([x[1 : 1 + ids.shape[1]].T for x in ranks])  # [R, N, K]
    owners = (~targets.isneginf()).sum(0)
    wrong = ~ignored & (owners != 1)
    if rows.device.type == "cpu" and bool(wrong.any()):
        target, count = int(ids[wrong][0]), int(owners[wrong][0])
        raise ValueError(
            f"target {target} lies in {count or 'no'} shards; check vocab_start and the sizes of the shards"
        )
    rank = dist.get_rank(group)
    lses = torch.stack([own.lse if r == rank else x[0] for r, x in enumerate(ranks)]).clamp(min=NOTHING)  # [R, N]
    lse = lses.logsumexp(0)
    logprob = (torch.where(owned, own_target, targets.amax(0)) - lse[:, None]).to(own.logprob)
    entropy, nothing = None, ignored.all(1)
    if own_entropy:
        entropies = torch.stack([own_entropy[0] if r == rank else x[-1] for r, x in enumerate(ranks)])
        log_shares = lses - lse
        terms = log_shares.exp() * (entropies.masked_fill(lses <= NOTHING, 0.0) - log_shares)
        entropy = terms.sum(0).masked_fill(nothing, 0.0).to(logprob)
    results = Logprobs(logprob.masked_fill(ignored, 0.0), lse.masked_fill(nothing, 0.0), entropy)
    return as_asked(results, target_ids.shape, return_entropy, return_lse, hidden.shape[:-1])


def local_shard(hidden: Any, weight: Any, bias: Any = None) -> dict[str, Any] | None:
    """What `sharded_linear_logprob` is to be told of a head that is split over the vocabulary; None if it is not.

    weight is Shard(0) on a mesh of one dimension, and hidden replicated on that mesh. Plain hidden states do not say
    that they are the same on all ranks, and a head that FSDP has sharded looks as one that is split.
    """
    mesh = getattr(weight, "device_mesh", None)  # a DTensor has one; importing the class takes long
    if mesh is None or mesh.ndim != 1 or mesh != getattr(hidden, "device_mesh", None):
        return None
    if not (weight.placements[0].is_shard(0) and hidden.placements[0].is_replicate()):
        return None
    if bias is not None and getattr(bias, "placements", None) != weight.placements:
        raise ValueError("bias must be a DTensor that is split as weight is")
    vocabulary, rows = len(weight), -(-len(weight) // mesh.size())
    return dict(
        weight_shard=weight.to_local(),
        bias=None if bias is None else bias.to_local(),
        vocab_start=min(mesh.get_local_rank() * rows, vocabulary),
        group=mesh.get_group(),
    )


class _SumGradients(torch.autograd.Function):
    """Hidden states, whose gradient is the sum of all ranks', rounded once."""

    @staticmethod
    def forward(ctx, hidden, group):
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, gradient):
        wide = gradient.to(result_dtype(gradient), copy=True)
        dist.all_reduce(wide, group=ctx.group)
        return wide.to(gradient.dtype), None
