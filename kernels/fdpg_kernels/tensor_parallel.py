"""linear_logprob where the vocabulary of the head is sharded over the ranks of a process group.

Rank r holds rows vocab_start : vocab_start + V_r of the head; hidden states and targets are the same everywhere.
With z_y the logit of the target and lse_r the log-sum-exp of a shard, log π(y) = z_y − log Σ_r exp(lse_r), and a
shard's gradients are those of its own logits under the log-sum-exp of all.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import operators
from .arguments import ELSEWHERE, IGNORED, Head, Number, check_head, make_head, result_dtype


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
    hidden, head = make_head(hidden, target_ids, weight_shard, bias, temperature, softcap)
    check_head(hidden, anywhere, head)
    weight_shard, bias = head.weight, head.bias
    impl = operators.choose_impl(impl, hidden, multiplies=True)
    if vocab_start < 0:
        raise ValueError(f"vocab_start={vocab_start}; it must be the id of the shard's first token, 0 or more")
    if bias is not None and bias.device.type == "cpu" and not bool(bias.isfinite().all()):
        raise ValueError("bias must be finite")
    if impl == "reference":
        hidden, weight_shard = hidden.double(), weight_shard.double()
        bias = None if bias is None else bias.double()
    impl = "triton" if impl == "triton" and len(weight_shard) else "chunked"  # which takes an empty shard, too
    settings = vocab_start, group, impl
    return _ShardedLogprob.apply(hidden, weight_shard, bias, target_ids.long(), head[2:], settings)


class _ShardedLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target_ids, scaling, settings):
        vocab_start, group, impl = settings
        ignored, local_ids = target_ids == IGNORED, target_ids - vocab_start
        owned = ~ignored & (local_ids >= 0) & (local_ids < len(weight))
        local_ids = local_ids.masked_fill(~owned, ELSEWHERE).masked_fill(ignored, IGNORED)
        head = Head(weight, bias, *scaling)
        logprob, (offset, total) = operators.linear_logprob(hidden, local_ids, head, impl)
        lse = offset + total.log()
        mine = torch.stack([lse, (logprob + lse).masked_fill(~owned, -torch.inf)])  # [2, N]
        ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(ranks, mine, group=group)
        lses, target_logits = torch.stack(ranks).unbind(1)  # [R, N] each
        owners = (~target_logits.isneginf()).sum(0)
        wrong = ~ignored & (owners != 1)
        if hidden.device.type == "cpu" and bool(wrong.any()):
            target, count = int(target_ids[wrong][0]), int(owners[wrong][0])
            raise ValueError(
                f"target {target} lies in {count or 'no'} shards; check vocab_start and the sizes of the shards"
            )
        total_lse = lses.logsumexp(0).masked_fill(ignored, 0.0)
        logprob = (target_logits.amax(0) - total_lse).masked_fill(ignored, 0.0)
        statistics = torch.stack([total_lse, torch.ones_like(total_lse)])
        ctx.save_for_backward(hidden, weight, bias, local_ids, logprob, statistics)
        ctx.scaling, ctx.settings = scaling, settings
        return logprob

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        hidden, weight, bias, local_ids, *results = ctx.saved_tensors
        _, group, impl = ctx.settings
        head, wants = Head(weight, bias, *ctx.scaling), ctx.needs_input_grad[:3]
        hidden_grad, *of_shard = operators.linear_logprob_backward(
            gradient, hidden, local_ids, head, results, wants, impl
        )
        if hidden_grad is not None:
            wide = hidden_grad.to(result_dtype(hidden))  # the sum over ranks is rounded once
            dist.all_reduce(wide, group=group)
            hidden_grad = wide.to(hidden.dtype)
        return hidden_grad, *of_shard, None, None, None
