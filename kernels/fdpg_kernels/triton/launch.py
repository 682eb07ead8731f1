"""The ops on Triton: from tensors to launches.

Nothing here waits for the GPU, except where cu_seqlens lies there: chunks are cut on its values.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from ..arguments import Gradients, Head, Logprobs, Options, Sequences, Wants
from ..chunks import Group
from ..reference import SequenceWeights
from . import weigh
from .head import LOG2_E, Products
from .sequences import BLOCK, finish, make_blocks, make_weighing


def linear_logprob(hidden: Tensor, target_ids: Tensor, head: Head) -> Logprobs:
    """log-probs [N]; and for the backward the log-sum-exp of each row and 1, [2, N]."""
    with _on(hidden):
        products = Products(hidden, target_ids, head)
        products.find_targets()
        products.statistics(slice(0, len(hidden)))
        return products.top, torch.stack([products.anchor / -LOG2_E, torch.ones_like(products.anchor)])


def linear_logprob_backward(
    gradient: Tensor, hidden: Tensor, target_ids: Tensor, head: Head, results: Logprobs, wants: Wants
) -> Gradients:
    """Gradients of hidden, weight and bias; logits are formed again in row chunks."""
    with _on(hidden):
        products = Products(hidden, target_ids, head, wants)
        if head.softcap is not None:
            products.find_targets()  # for the slope of the cap
        products.top, statistics = results
        products.anchor, products.total = statistics[0] * -LOG2_E, statistics[1]
        for chunk in products.chunks(0, len(hidden)):
            products.anchored(chunk, guard=False)
            products.add_gradients(chunk, gradient.contiguous())
        return products.gradients()


def sequence_weights(policy_logprob: Tensor, sequences: Sequences, options: Options) -> SequenceWeights:
    """One launch; float32, or float64 where the policy's log-probs are."""
    dtype = torch.float64 if policy_logprob.dtype == torch.float64 else torch.float32
    with _on(policy_logprob):
        weighing = make_weighing(sequences, options, dtype)
        num_sequences = len(weighing.score)
        weigh.weigh_sequences[(num_sequences,)](
            policy_logprob.contiguous(), weighing.behavior, sequences.cu_seqlens.contiguous(), *weighing.per_sequence,
            num_sequences, *weighing.strides, BT=BLOCK, **weighing.constants,
        )  # fmt: skip
        return weighing.results()


def fdpg_loss(
    hidden: Tensor, target_ids: Tensor, head: Head, sequences: Sequences, options: Options, wants: Wants
) -> tuple[Tensor, SequenceWeights, Gradients]:
    """loss, weights (float64), and the gradients of hidden, weight and bias.

    Where no gradient is wanted the online kernel alone runs and nothing [C, V] is allocated.
    """
    ends, training, total = sequences.cu_seqlens.tolist(), any(wants), sequences.total
    by_pytorch = options.divergence.kernel_family is None
    with _on(hidden):
        products = Products(hidden, target_ids, head, wants, ends)
        weighing = make_weighing(sequences, options, torch.float64)
        blocks = make_blocks(ends, hidden.device)
        products.find_targets(weighing.behavior if training else None)
        groups = products.groups if training else [Group(0, len(ends) - 1, slice(0, len(hidden)), [])]
        for group in groups:
            unit = products.sums.apart(group.rows) if len(group.chunks) > 1 else None
            for chunk in group.chunks:
                products.anchored(chunk, guard=True)
                if unit is not None:  # its weight is not known yet: 1
                    ones = torch.ones_like(weighing.score)
                    products.add_gradients(chunk, ones, blocks.sequence_index, -1.0, into=unit)
            if not training:
                products.statistics(group.rows)
            finish(products, weighing, blocks, group[:2])
            if by_pytorch:
                weighing.weigh_by_pytorch(slice(group.first, group.last), options)
            if unit is not None:
                products.sums.add(unit, (weighing.columns[5, group.first] / -total).float())
                continue
            for chunk in group.chunks:
                products.add_gradients(chunk, weighing.columns[5], blocks.sequence_index, total)
        weights = weighing.results()
        loss = (-(weights.weight * weights.policy_logprob).sum() / total).float()
        return loss, weights, products.gradients()


def _on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launch where the tensors are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
