"""What is replaced inside vLLM while it samples for us: one function a patch, each of which may go by itself.

A name that another vLLM no longer has is said once in a warning, and the engine works without the patch.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from types import SimpleNamespace
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


def own_classes() -> contextlib.AbstractContextManager[None]:
    """A model that vLLM runs by transformers' own class (OLMo 2, Phi 2, SmolLM3) leaves the class as it is.

    Seen with vLLM 0.32: it gives the class that it compiles another `__call__`, which fails for the learner's module.
    May go when it compiles a subclass; such models are run uncompiled here.
    """
    name = "vllm.model_executor.models.transformers.base.Base._decorate_cls_for_torch_compile"
    return _replaced(name, lambda *_, **__: None)


def repack_experts(model: torch.nn.Module) -> None:
    """The experts of a mixture are packed by the load that comes next, as they were by the first.

    Seen with vLLM 0.32 on a CPU: where a kernel is there already, a load copies plain weights over packed ones, and
    log-probs are nats off. May go when `UnquantizedFusedMoEMethod._setup_kernel` packs at every load.
    """
    for module in model.modules():
        if getattr(getattr(module, "quant_method", None), "moe_kernel", None) is not None:
            module.quant_method.moe_kernel = None  # type: ignore[union-attr]


def without_global_draws() -> contextlib.AbstractContextManager[None]:
    """The sampler's draws for rows whose request has a seed, which it throws away, are not the global generator's.

    Seen with vLLM 0.32 on CPUs: features that draw in another thread meanwhile drew other numbers in each run. May go
    when vLLM draws for the rows alone that have no generator of their own.
    """
    thrown_away = torch.Generator()

    def randint(*arguments: Any, generator: torch.Generator | None = None, **settings: Any) -> Tensor:
        return torch.randint(*arguments, generator=generator or thrown_away, **settings)

    return _replaced(
        "vllm.v1.sample.ops.topk_topp_sampler.torch", SimpleNamespace(**vars(torch) | {"randint": randint})
    )


def keeping_groups() -> contextlib.AbstractContextManager[None]:
    """An engine that ends leaves the process groups alone, which the learner goes on with.

    Seen with vLLM 0.32: it destroys the default group, whoever has made it. May go when it destroys only its own.
    """
    return _replaced("vllm.v1.engine.core.cleanup_dist_env_and_memory", lambda *_, **__: None)


@contextlib.contextmanager
def _replaced(name: str, value: Any) -> Iterator[None]:
    """A value under a dotted name, for as long as the block runs."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(mock.patch(name, value))
        except (ImportError, AttributeError):
            if name not in _said:
                log.warning("this vLLM has no %s: it goes on without the patch", name)
            _said.add(name)
        yield
