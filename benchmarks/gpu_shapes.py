"""Whole shapes: every method, checked and timed beside the bare products, turn by turn."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial

import torch

from benchmarks import gpu_cases
from benchmarks.gpu_cases import Method, Outputs, Shape
from benchmarks.gpu_methods import EAGER, METHODS, implementation
from benchmarks.gpu_process import Record, finite
from benchmarks.gpu_timer import timer

BARE = ("bare products of probabilities", "bare products of logits")


@lru_cache
def method_of(name: str) -> Method:
    return METHODS[name]()


def describe(shape: Shape, device: str) -> Record:
    lengths = gpu_cases.make_case(shape, device).cu_seqlens.diff().float()
    return {"shape": shape.title, "tokens": shape.tokens, "mean_length": float(lengths.mean())}


def warm(shape: Shape, name: str, device: str) -> Iterator[Record]:
    """Every mode once on few rows, so that what Triton compiles is compiled."""
    case, method = gpu_cases.make_case(shape.warm, device), method_of(name)
    for mode in gpu_cases.MODES:
        if method.per_token or not mode.startswith("loss"):
            gpu_cases.run(case, method, mode)
            yield {"compiled": mode}


@lru_cache
def eager_errors(shape: Shape, mode: str, device: str) -> dict[str, float]:
    """Of PyTorch's bfloat16 path; none where it does not fit into memory."""
    case = gpu_cases.make_case(shape, device)
    try:
        return gpu_cases.errors(case, EAGER, gpu_cases.run(case, EAGER, mode))
    except torch.OutOfMemoryError:
        return {}


def verdict(case: gpu_cases.Case, method: Method, mode: str, outputs: Outputs, device: str) -> Record:
    """Errors against float64, and whether they are within the limits: a wrong method is timed all the same."""
    found = gpu_cases.errors(case, method, outputs)
    eager = eager_errors(case.shape, mode, device) if method.ours else {}
    bounds = {key: bound for key, bound in gpu_cases.limits(method, mode, eager).items() if key in found}
    beyond = [f"{key} error {found[key]:.2g} > {bound:.2g}" for key, bound in bounds.items() if not found[key] <= bound]
    wrong = {"status": "wrong", "reason": ", ".join(beyond)} if beyond else {}
    return {"errors": finite(found), "limits": finite(bounds), **wrong}


def measure(shape: Shape, mode: str, name: str, device: str, repeats: int) -> Iterator[Record]:
    """One method in one mode."""
    about = {"method": name, "mode": mode, "flops": gpu_cases.MODES[mode] * shape.ndv, **describe(shape, device)}
    yield about
    case, timing = gpu_cases.make_case(shape, device), timer(device)
    values = gpu_cases.probabilities(shape, device)
    bare = partial(gpu_cases.bare_gemms, case, mode, values)
    if name in BARE:
        call = partial(gpu_cases.bare_gemms, case, mode, values if name == BARE[0] else None)
    else:
        method = method_of(name)
        call = partial(gpu_cases.run, case, method, mode)
        yield verdict(case, method, mode, call(), device)
        if mode == "trained":
            leaves = case.hidden.detach().requires_grad_(), case.weight.detach().requires_grad_()
            yield {"implementation": implementation(method.logprob(*leaves, case.target_ids))}
        yield {"extra_bytes": timing.extra_bytes(call)}
    taken = timing.turns({"bare": bare, "method": call}, repeats)
    yield {**taken["method"], "bare_seconds": taken["bare"]["seconds"]}
    if name not in BARE and (mode == "trained" or method.ours):
        yield kernels_of(call, device)


def kernels_of(call: partial, device: str) -> Record:
    try:
        return {"kernels": timer(device).kernels(call)}
    except Exception as error:  # a profiler that does not work here makes no method wrong
        return {"no_kernels": f"{type(error).__name__}: {error}"[:200]}
