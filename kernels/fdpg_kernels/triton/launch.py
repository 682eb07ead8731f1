"""The ops on Triton: from tensors to launches.

Nothing here waits for the GPU, except where cu_seqlens lies there: chunks are cut on its values.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from ..arguments import IGNORED, Gradients, Head, LogitGradients, Logprobs, Options, Sequences, Wants
from ..chunks import Group
from ..reference import SequenceWeights
from . import weigh
from .head import LOG2_E, Products
from .sequences import BLOCK, finish, make_blocks, make_weighing


def linear_logprob(hidden: Tensor, target_ids: Tensor, head: Head, with_entropy: bool) -> Logprobs:
    """log π of ids [N, K], and log-sum-exp and entropy of each row; of ignored ones anything."""
    with _on(hidden):
        products = Products(hidden, target_ids, head)
        products.find_targets()
        entropy = torch.empty_like(products.anchor) if with_entropy else None
        products.statistics(slice(0, len(hidden)), entropy)
        lse = products.anchor / -LOG2_E
        return Logprobs(products.target - lse[:, None], lse.double(), entropy)


def linear_logprob_backward(
    hidden: Tensor, target_ids: Tensor, head: Head, results: Logprobs, given: LogitGradients, wants: Wants
) -> Gradients:
    """Gradients of hidden, weight and bias from those of the logits, which are formed again in row chunks."""
    with _on(hidden):
        products = Products(hidden, target_ids, head, wants)
        given = LogitGradients(*(None if x is None else x.contiguous() for x in given))  # type: ignore[arg-type]
        results = results._replace(lse=results.lse.float())
        products.anchor = (results.lse * -LOG2_E).masked_fill(products.row_ids == IGNORED, -torch.inf)
        for chunk in products.chunks(0, len(hidden)):
            products.add_logit_gradients(chunk, results, given)
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
        products = Products(hidden, target_ids[:, None], head, wants, ends)
        weighing = make_weighing(sequences, options, torch.float64)
        blocks = make_blocks(ends, hidden.device)
        products.find_targets(weighing.behavior if training else None)
        groups = products.groups if training else [Group(0, len(ends) - 1, slice(0, len(hidden)), [])]
        for group in groups:
            unit = products.sums.apart(group.rows) if len(group.chunks) > 1 else None
            for chunk in group.chunks:
                products.anchored(chunk)
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
