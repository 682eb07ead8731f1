"""Inputs of the checks of kernels, where they run, and what PyTorch makes of them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdpg_kernels import linear_logprob
from fdpg_kernels.triton import head as head_module

from .kernel_cases import IGNORED, packing

Values = dict[str, Tensor]
DRIFT = 0.1  # nats between sampler and learner on a token


class Place(NamedTuple):
    """Where the checks run, and how large: sequences, hidden units, vocabulary."""

    device: str
    lengths: list[int]
    width: int
    vocabulary: int
    chunk_rows: int
    nats: float  # bound of a token's log-prob
    relative: float  # bound of a float32 gradient
    block: int  # tokens of a sequence beyond which several programs share it
    repeats: int  # runs compared bit by bit
    sequences: int  # in each of them


INTERPRETER = Place("cpu", [3, 0, 2, 20, 6], 24, 45, 16, 5e-6, 1e-5, 16, 2, 3)
GPU = Place("cuda", [300, 0, 129, 40, 1, 700, 128, 0, 250], 320, 3000, 512, 1e-4, 1e-4, 128, 200, 4096)


class Inputs(NamedTuple):
    """On the CPU in float64, rounded to the dtype of the check already."""

    leaves: dict[str, Tensor]  # hidden, weight and perhaps bias
    target_ids: Tensor
    options: dict[str, Any]  # of the head
    sequences: dict[str, Tensor]  # further arguments of fdpg_loss

    def on(self, place: Place, dtype: torch.dtype, transposed: bool = False) -> tuple[dict[str, Tensor], dict]:
        """Leaves that want gradients, and the other arguments of the head."""
        leaves = {name: x.to(place.device, dtype) for name, x in self.leaves.items()}
        if transposed:
            leaves["weight"] = leaves["weight"].T.contiguous().T
        options = {k: x.to(place.device) if isinstance(x, Tensor) else x for k, x in self.options.items()}
        leaves = {name: x.requires_grad_() for name, x in leaves.items()}
        return leaves, {"target_ids": self.target_ids.to(place.device), **options}


def make(
    place: Place, dtype: torch.dtype, *, odd: bool = False, even: bool = False, bias: bool = False,
    rows: bool = False, ignored: bool = False, **options: Any,
) -> Inputs:  # fmt: skip
    """odd: widths that only pointers take; even: whole tiles; rows: a temperature of each; ignored: they hold NaN."""
    rng = torch.Generator().manual_seed(0)
    num_tokens, width = sum(place.lengths), place.width + odd
    vocabulary = place.vocabulary + odd if not even else -(-place.vocabulary // 256) * 256

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    leaves = {"hidden": randn(num_tokens, width), "weight": randn(vocabulary, width) * 1.5 * width**-0.5}
    if bias:
        leaves["bias"] = randn(vocabulary)
    leaves = {name: x.to(dtype).double() for name, x in leaves.items()}
    target_ids = torch.randint(vocabulary, (num_tokens,), generator=rng)
    if rows:
        options["temperature"] = 0.5 + torch.rand(num_tokens, generator=rng)
    if ignored:
        target_ids[2::3] = IGNORED
        leaves["hidden"][2::3] = torch.tensor([math.nan, math.inf, 3e38]).repeat(num_tokens)[: num_tokens // 3, None]
    exact = linear_logprob(**leaves, target_ids=target_ids, **options, impl="reference")
    ends = packing(place.lengths)
    log_pi = torch.stack([exact[a:b].sum() for a, b in pairwise(ends.tolist())])
    sequences = {
        "behavior_logprob": (exact + DRIFT * randn(num_tokens)).masked_fill(target_ids == IGNORED, math.nan).float(),
        "target_log_score": (log_pi - 1 + randn(len(log_pi))).float(),
    }
    return Inputs(leaves, target_ids, options, sequences)


@contextlib.contextmanager
def poisoned(chunk_rows: int) -> Iterator[None]:
    """Fresh memory holds NaN, and chunks are small, so that there are several."""
    before, head_module.CHUNK_ROWS = head_module.CHUNK_ROWS, chunk_rows
    torch.use_deterministic_algorithms(True, warn_only=True)  # PyTorch then fills what it allocates
    try:
        yield
    finally:
        head_module.CHUNK_ROWS = before
        torch.use_deterministic_algorithms(False)


def plain_values(leaves: dict[str, Tensor], target_ids: Tensor, temperature: Any = 1.0, softcap: Any = None) -> Values:
    """What people write in PyTorch: logits in the dtype of the head (bfloat16 for float16), the rest in float32."""
    ids = target_ids.view(len(target_ids), -1)  # [N, K]
    ignored = ids == IGNORED
    dead = ignored.all(1)
    head = leaves["hidden"].masked_fill(dead[:, None], 0.0), leaves["weight"], leaves.get("bias")
    if head[0].dtype == torch.float16:
        head = tuple(None if x is None else x.bfloat16() for x in head)
    logits = torch.nn.functional.linear(*head)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    rows = temperature[:, None] if isinstance(temperature, Tensor) and temperature.ndim else temperature
    logits = logits.float() / rows
    logprobs = logits.log_softmax(-1)
    picked = logprobs.gather(1, ids.masked_fill(ignored, 0)).masked_fill(ignored, 0.0).view_as(target_ids)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return {"logprob": picked} | {
        name: x.masked_fill(dead, 0.0) for name, x in (("entropy", entropy), ("lse", logits.logsumexp(-1)))
    }


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().cpu().double() - exact).norm() / exact.norm().clamp(min=1e-30))


def gradients(objective: Tensor, leaves: Values) -> Values:
    return dict(zip(leaves, torch.autograd.grad(objective, list(leaves.values())), strict=True))
