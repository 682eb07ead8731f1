"""linear_logprob where the vocabulary of the head is sharded over the ranks of a process group.

Rank r holds rows vocab_start : vocab_start + V_r of the head; hidden states and targets are the same everywhere.
With z_y the logit of the target and lse_r the log-sum-exp of a shard, log π(y) = z_y − log Σ_r exp(lse_r). No op
returns lse_r, but z_t − linear_logprob(t) is lse_r for any token t of the shard: here the target where the shard has
it, else the shard's first token. So a shard is the business of `linear_logprob`, whichever impl runs it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import choose_impl
from .linear_logprob import check_head, linear_logprob
from .reference import IGNORED
from .sequence_weights import result_dtype


def sharded_linear_logprob(
    hidden: Tensor,
    weight_shard: Tensor,
    target_ids: Tensor,
    *,
    vocab_start: int,
    group: dist.ProcessGroup | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """log softmax(head(hidden))[target] of every row, each rank holding a part of the head.

    All ranks of the group call this with the same hidden, target_ids and options, get the same log-probs, and run
    `backward` of the same function of them. The forward is one all-gather of [2, N] numbers, the backward one
    all-reduce of the gradient of hidden (none if hidden wants no gradient).

    The f-DPG loss of a sharded head is written out, the same on every rank; its gradients are those of `fdpg_loss`:

        logprob = sharded_linear_logprob(hidden, weight_shard, target_ids, vocab_start=start, group=group)  # [N]
        weights = sequence_weights(logprob, behavior_logprob, cu_seqlens, target_log_score, log_z)
        token_weight = weights.weight.repeat_interleave(cu_seqlens.diff())  # [N]
        loss = -(token_weight * logprob).sum() / len(weights.weight)

    Args:
        hidden: final hidden states, [N, D] floating point, replicated.
        weight_shard: rows vocab_start : vocab_start + V_r of the head, [V_r, D], same dtype as hidden; V_r may
            differ between ranks and be 0.
        target_ids: ids in the whole vocabulary, [N] integer, replicated; -100 marks an ignored row.
        vocab_start: id of this shard's first token.
        group: the ranks that share the head, None for the default group.
        bias: of this shard, [V_r], finite, or None.
        temperature, softcap, impl: as in `linear_logprob`.

    Returns:
        [N] as from `linear_logprob`: float32 (float64 for float64 inputs, and from the reference), 0 in ignored rows.
        The gradient of hidden is of the whole head, the same on all ranks; those of weight_shard and bias stay local.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit. On CPU tensors also, on all ranks at once, where a
            target lies in no shard or in several; on a GPU, which is not asked to wait, the first gives -inf.
    """
    anywhere = torch.full_like(target_ids, IGNORED)  # that each target has an owner is known after the gather only
    check_head(hidden, weight_shard, anywhere, bias, temperature, softcap)
    impl = choose_impl(impl, hidden, multiplies=True)
    if vocab_start < 0:
        raise ValueError(f"vocab_start={vocab_start}; it must be the id of the shard's first token, 0 or more")
    if bias is not None and bias.device.type == "cpu" and not bool(bias.isfinite().all()):
        raise ValueError("bias must be finite")
    scaling, with_grad = (temperature, softcap), torch.is_grad_enabled()
    return _ShardedLogprob.apply(
        hidden, weight_shard, bias, target_ids.long(), vocab_start, group, scaling, impl, with_grad
    )


class _ShardedLogprob(torch.autograd.Function):
    """The graph of the shard's own log-probs is kept inside: what flows into it is known after the gather."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target_ids, vocab_start, group, scaling, impl, with_grad):
        dtype = torch.float64 if impl == "reference" else result_dtype(hidden)
        kept, local_ids = target_ids != IGNORED, target_ids - vocab_start
        owned = kept & (local_ids >= 0) & (local_ids < len(weight))
        local_ids = local_ids.masked_fill(~owned, 0)  # [N], the token whose log-prob tells the log-sum-exp

        lse = target_logit = torch.full(target_ids.shape, -torch.inf, dtype=dtype, device=hidden.device)  # [N]
        if len(weight):
            leaves: list[Any] = [
                None if x is None else x.detach().requires_grad_(wanted)
                for x, wanted in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
            ]
            with torch.set_grad_enabled(with_grad):
                logprob = linear_logprob(
                    leaves[0],
                    leaves[1],
                    local_ids.masked_fill(~kept, IGNORED),
                    bias=leaves[2],
                    temperature=scaling[0],
                    softcap=scaling[1],
                    impl=impl,
                )
            ctx.logprob, ctx.leaves = logprob, leaves
            logit, _ = _logits(_rows(hidden, kept, dtype), weight, bias, local_ids, *scaling)
            lse = logit - logprob.detach()
            target_logit = logit.masked_fill(~owned, -torch.inf)

        mine = torch.stack([lse, target_logit])
        ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(ranks, mine, group=group)
        lses, target_logits = torch.stack(ranks).unbind(1)  # [R, N] each
        if hidden.device.type == "cpu":
            _check_owners(target_ids[kept], (~target_logits[:, kept].isneginf()).sum(0))
        total_lse = lses.logsumexp(0)
        ctx.save_for_backward(hidden, weight, bias, local_ids, kept, owned, lse, total_lse)
        ctx.group, ctx.scaling = group, scaling
        return (target_logits.amax(0) - total_lse).masked_fill(~kept, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        hidden_grad, weight_grad, bias_grad = _shard_gradients(ctx, gradient)
        if hidden_grad is not None:
            dist.all_reduce(hidden_grad, group=ctx.group)
        hidden, weight, bias, *_ = ctx.saved_tensors
        pairs = (hidden_grad, hidden), (weight_grad, weight), (bias_grad, bias)
        return *(None if g is None else g.to(x.dtype) for g, x in pairs), *[None] * 6


def _shard_gradients(ctx, gradient: Tensor) -> list[Tensor | None]:
    """What this shard contributes to the gradients of hidden, weight and bias, in the dtype of the log-probs.

    d log π = owned·dz − share·d lse with lse = z − logprob: z is the logit of local_ids, logprob the shard's own
    log-prob of it, share the part of the probability that lies in this shard.
    """
    hidden, weight, bias, local_ids, kept, owned, lse, total_lse = ctx.saved_tensors
    wanted, dtype = ctx.needs_input_grad[:3], lse.dtype
    if not len(weight):
        pairs = zip((hidden, weight, bias), wanted, strict=True)
        return [torch.zeros_like(x, dtype=dtype) if w else None for x, w in pairs]
    gradient = gradient.masked_fill(~kept, 0.0)
    share = (lse - total_lse).exp()  # [N]
    leaves = [x for x, w in zip(ctx.leaves, wanted, strict=True) if w]
    found = iter(torch.autograd.grad(ctx.logprob, leaves, gradient * share, retain_graph=True))
    hidden_grad, weight_grad, bias_grad = (next(found).to(dtype) if w else None for w in wanted)

    x = _rows(hidden, kept, dtype)
    z_grad = gradient * (owned.to(dtype) - share) * _logits(x, weight, bias, local_ids, *ctx.scaling)[1]  # [N]
    if hidden_grad is not None:
        hidden_grad.addcmul_(z_grad[:, None], weight[local_ids].to(dtype))
    # Rows that are not owned send the first token two opposite gradients, through z and through logprob, which leave
    # their rounding behind: in bfloat16 2⁻⁸ of a sum over the batch. What it should get is computed directly.
    first = local_ids.new_zeros(1)
    first_logit, first_slope = _logits(x, weight, bias, first, *ctx.scaling)
    is_target = (owned & (local_ids == 0)).to(dtype)
    first_grad = gradient * (is_target - (first_logit - total_lse).exp()) * first_slope  # [N]
    z_grad = z_grad.masked_fill(~owned, 0.0)
    if weight_grad is not None:
        weight_grad.index_add_(0, local_ids, z_grad[:, None] * x)[0] = first_grad @ x
    if bias_grad is not None:
        bias_grad.index_add_(0, local_ids, z_grad)[0] = first_grad.sum()
    return [hidden_grad, weight_grad, bias_grad]


def _rows(hidden: Tensor, kept: Tensor, dtype: torch.dtype) -> Tensor:
    """hidden without what lies under ignored tokens, [N, D]."""
    return hidden.detach().masked_fill(~kept[:, None], 0.0).to(dtype)


def _logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The logit of token ids[i] in row i, [N], and its derivative in the raw product; ids [1] is one for all rows."""
    logit = (x * weight[ids].to(x.dtype)).sum(1)
    if bias is not None:
        logit = logit + bias[ids].to(x.dtype)
    slope = torch.ones_like(logit)
    if softcap is not None:
        tanh = (logit / softcap).tanh()
        logit, slope = softcap * tanh, 1 - tanh.square()
    return logit / temperature, slope / temperature


def _check_owners(target_ids: Tensor, owners: Tensor) -> None:
    wrong = owners != 1
    if bool(wrong.any()):
        target, count = int(target_ids[wrong][0]), int(owners[wrong][0])
        raise ValueError(
            f"target {target} lies in {count or 'no'} shards; check vocab_start and the sizes of the shards"
        )
