"""The checks of tests/support/kernel_checks.py as steps of the benchmark."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from benchmarks.gpu_process import Record, finite
from support import kernel_checks, kernel_inputs

TOGETHER = 4  # checks that a process takes one after the other


def groups() -> list[list[str]]:
    names = list(kernel_checks.CHECKS)
    return [names[i : i + TOGETHER] for i in range(0, len(names), TOGETHER)]


def check(name: str, device: str) -> Iterator[Record]:
    """One check: every error that it finds, with its bound."""
    place = kernel_inputs.GPU if device == "cuda" else kernel_inputs.INTERPRETER
    errors, limits, beyond = {}, {}, []
    with contextlib.nullcontext() if device == "cuda" else kernel_checks.rounds_as_a_gpu():
        for what, error, bound in kernel_checks.CHECKS[name](place):
            errors[what], limits[what] = error, bound
            if not error <= bound:
                beyond.append(f"{what} off by {error:.2g} > {bound:.2g}")
            wrong = {"status": "wrong", "reason": "; ".join(beyond)} if beyond else {}
            yield {"errors": finite(errors), "limits": finite(limits), **wrong}
