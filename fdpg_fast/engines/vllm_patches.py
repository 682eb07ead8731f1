"""What is replaced inside vLLM while it samples for us: one function a patch, each of which may go by itself.

A name that another vLLM no longer has is said once in a warning, and the engine works without the patch.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_said: set[str] = set()


@contextlib.contextmanager
def sampled_logprobs_only() -> Iterator[None]:
    """All patches at once; vLLM is as it was afterwards."""
    with without_ranks(), without_lists():
        yield


def without_ranks() -> contextlib.AbstractContextManager[None]:
    """The rank of each sampled token is not counted: nobody reads it here.

    Seen with vLLM 0.32: counting takes longer than the log-prob itself, and 20 s to compile at the first call. May go
    when `SamplingParams` can ask for the sampled token's log-prob alone.
    """

    def zeros(logprobs: Tensor, values: Tensor) -> Tensor:
        return logprobs.new_zeros(len(logprobs), dtype=torch.int64)

    return _replaced("vllm.v1.sample.sampler.batched_count_greater_than", zeros)


def without_lists() -> contextlib.AbstractContextManager[None]:
    """Of the six flat lists of log-probs that a completion carries, only that of the log-probs is filled.

    Seen with vLLM 0.32: the others cost a twelfth of the time of a tiny model. May go when vLLM has a short way for
    `logprobs=0` (its pull request 57442 measures the same cost).
    """

    def append(self: Any, sampled: Any) -> None:
        self.logprobs.logprobs.extend(sampled.logprobs[:, 0].tolist())

    return _replaced("vllm.v1.engine.logprobs.LogprobsProcessor._update_sample_logprobs", append)


@contextlib.contextmanager
def _replaced(name: str, value: Any) -> Iterator[None]:
    """A value under a dotted name, for as long as the block runs."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(mock.patch(name, value))
        except (ImportError, AttributeError):
            if name not in _said:
                log.warning("this vLLM has no %s: sampling goes on without the patch, and slower", name)
            _said.add(name)
        yield
