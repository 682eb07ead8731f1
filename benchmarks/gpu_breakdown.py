"""Where the time goes at one shape: single products, every tile, and the kernels of whole calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import gpu_cases, gpu_shapes
from benchmarks.gpu_cases import Shape
from benchmarks.gpu_process import Record
from benchmarks.gpu_timer import timer
from fdpg_kernels.triton import tiles

CHUNK = 4096  # rows of the products: a chunk of the ops; the whole shape is a chunk, too, if memory allows it
CHECKED = 64  # rows of each product
TILE_MODES = ("forward", "loss frozen")  # the online softmax; the anchored product and one gradient's


class Product(NamedTuple):
    call: Callable[[], Tensor]
    a: Tensor
    b: Tensor


def products(shape: Shape, rows: int, device: str) -> dict[str, Product]:
    """The matrix products of so many rows in every form that an implementation may choose."""
    case = gpu_cases.make_case(shape, device)
    x, w, p = case.hidden[:rows], case.weight, gpu_cases.probabilities(shape, device)[:rows]
    logits = torch.mm(x, w.T)
    pairs = {"logits": (x, w.T), "hidden gradient": (p, w), "head gradient": (p.T, x)}
    pairs["head gradient of logits, not probabilities"] = (logits.T, x)
    found = {f"{name}: mm": Product(partial(torch.mm, a, b), a, b) for name, (a, b) in pairs.items()}
    if device == "cpu":  # which has no out_dtype
        return found
    wide = dict(out_dtype=torch.float32)
    for name in ("hidden gradient", "head gradient"):
        a, b = pairs[name]
        found[f"{name}: mm(out_dtype=float32)"] = Product(partial(torch.mm, a, b, **wide), a, b)
    into = torch.zeros(w.shape, dtype=torch.float32, device=device)
    found["head gradient: addmm(out_dtype=float32, out=)"] = Product(
        lambda: torch.addmm(into, p.T, x, **wide, out=into), p.T, x
    )
    return found


PRODUCTS = (
    *(f"{name}: mm" for name in ("logits", "hidden gradient", "head gradient")),
    "hidden gradient: mm(out_dtype=float32)",
    "head gradient: mm(out_dtype=float32)",
    "head gradient: addmm(out_dtype=float32, out=)",
    "head gradient of logits, not probabilities: mm",
)


def product(shape: Shape, rows: int, name: str, device: str, repeats: int) -> Iterator[Record]:
    """One product, a sample of it compared with float32."""
    made = products(shape, rows, device)[name]
    yield {"shape": shape.title, "flops": 2.0 * len(made.a) * made.a.shape[1] * made.b.shape[1]}
    found, exact = made.call()[:CHECKED].float(), made.a[:CHECKED].float() @ made.b.float()
    error = float((found - exact).norm() / exact.norm())
    yield {"errors": {"relative": error}}
    if not error < 0.01:
        yield {"status": "wrong", "reason": f"relative error {error:.2g} > 0.01"}
    yield timer(device).turns({"product": made.call}, repeats)["product"]


def cast(shape: Shape, device: str, repeats: int) -> Iterator[Record]:
    """A head's gradient from float32 to bfloat16."""
    gradient = torch.randn(shape.vocabulary, shape.width, device=device)
    yield {"shape": shape.title, "bytes": 6 * gradient.numel()}
    yield timer(device).turns({"cast": gradient.bfloat16}, repeats)["cast"]


@contextlib.contextmanager
def chosen(config: tiles.Config) -> Iterator[None]:
    """Every product by this tile; row tiles share the head as the shipped rule has it."""
    choose = tiles.choose

    def always(*arguments, **options):
        return replace(config, group_rows=choose(*arguments, **options).group_rows)

    tiles.choose = always
    try:
        yield
    finally:
        tiles.choose = choose


def warm_tile(shape: Shape, config: tiles.Config, device: str) -> Iterator[Record]:
    case, ours = gpu_cases.make_case(shape.warm, device), gpu_shapes.method_of("ours (triton)")
    for mode in TILE_MODES:
        with chosen(config):
            gpu_cases.run(case, ours, mode)
        yield {"compiled": mode}


def tile(shape: Shape, config: tiles.Config, mode: str, device: str, repeats: int) -> Iterator[Record]:
    """A call of ours by one tile, checked, timed beside the bare products and taken apart."""
    yield {"shape": shape.title, "mode": mode, "tile": repr(config)}
    case, timing = gpu_cases.make_case(shape, device), timer(device)
    ours = gpu_shapes.method_of("ours (triton)")
    bare = partial(gpu_cases.bare_gemms, case, mode, gpu_cases.probabilities(shape, device))
    call = partial(gpu_cases.run, case, ours, mode)
    with chosen(config):
        yield gpu_shapes.verdict(case, ours, mode, call(), device)
        taken = timing.turns({"bare": bare, "call": call}, repeats)
        yield {**taken["call"], "bare_seconds": taken["bare"]["seconds"]}
        yield gpu_shapes.kernels_of(call, device)
