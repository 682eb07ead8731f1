"""Attention of a packed row on a CPU: two flash parts and blocks beside padded SDPA with a mask, in turns.

PYTHONPATH=kernels:tests python benchmarks/attention_turns.py --output FILE.json [--tokens 512 2048] [--threads 1]

B completions of T tokens with one prompt of P, 9 query and 3 key heads of 64, float32. Padded SDPA copies keys of the
prompt for every completion and adds a [B, 1, T, P+T] mask, as the library did before; it has turns up to T = 4,096.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fdpg_fast.models import blockwise, flash_parts
from fdpg_fast.models.attention import Kind
from fdpg_fast.models.rows import Row
from op_turns import run
from run import machine

HEADS, KEY_HEADS, WIDTH = 9, 3, 64
PLAIN = Kind(WIDTH**-0.5)
WINDOW = PLAIN._replace(window=1024)
ALL = WINDOW._replace(softcap=50.0, sinks=torch.zeros(HEADS))
MASKED = "padded SDPA with a mask"


class Shape(NamedTuple):
    completions: int
    prompt: int
    tokens: int  # of each completion

    def row(self) -> Row:
        lengths = [self.prompt, *[self.tokens] * self.completions]
        return Row(lengths, [None, *[0] * self.completions])


def masked(shape: Shape, mask: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[H, M, d] and [K, M, d] twice → [H, M, d]."""

    def by_text(packed: Tensor) -> Tensor:
        return packed[:, shape.prompt :].unflatten(1, (shape.completions, shape.tokens)).transpose(0, 1)

    prompts = [x[None, :, : shape.prompt] for x in (query, key, value)]
    keys, values = (
        torch.cat([prompt.expand(shape.completions, -1, -1, -1), by_text(x)], dim=2)
        for prompt, x in zip(prompts[1:], (key, value), strict=True)
    )
    own = F.scaled_dot_product_attention(by_text(query), keys, values, attn_mask=mask, enable_gqa=True)
    first = F.scaled_dot_product_attention(*prompts, is_causal=True, enable_gqa=True)
    return torch.cat([first[0], own.transpose(0, 1).flatten(1, 2)], dim=1)


def make_mask(shape: Shape) -> Tensor:
    own = torch.ones(shape.tokens, shape.tokens, dtype=torch.bool).tril()
    sees = torch.cat([torch.ones(shape.tokens, shape.prompt, dtype=torch.bool), own], dim=1)
    mask = torch.zeros(sees.shape).masked_fill_(~sees, float("-inf"))
    return mask.expand(shape.completions, 1, -1, -1).contiguous()  # each text had a row of its own


def contenders(shape: Shape) -> dict[str, Callable[..., Tensor]]:
    row = shape.row()
    found: dict[str, Callable[..., Tensor]] = {
        "two flash parts": lambda *x: flash_parts.attend(row, *x, PLAIN),
        "blocks, no window": lambda *x: blockwise.attend(row, *x, PLAIN),
        "blocks, window 1,024": lambda *x: blockwise.attend(row, *x, WINDOW),
        "blocks, window 1,024, cap, sinks": lambda *x: blockwise.attend(row, *x, ALL),
    }
    if shape.tokens <= 4096:
        mask = make_mask(shape)
        found[MASKED] = lambda *x: masked(shape, mask, *x)
    return found


def measure(shape: Shape, turns: int) -> dict[str, dict[str, Any]]:
    """Of each contender processor seconds of each turn, forward and with the backward pass, and resident bytes."""
    generator = torch.Generator().manual_seed(0)
    tokens = shape.prompt + shape.completions * shape.tokens
    sizes = (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    *leaves, upstream = (torch.randn(heads, tokens, WIDTH, generator=generator) for heads in sizes)
    leaves = [x.requires_grad_() for x in leaves]
    found = {}
    for turn in range(turns + 1):
        for name, attend in contenders(shape).items():

            def forward(attend=attend):
                with torch.no_grad():
                    return (attend(*leaves),)

            def whole(attend=attend):
                return torch.autograd.grad(attend(*leaves), leaves, upstream)

            _, forward_seconds, _ = run(forward)
            _, seconds, resident = run(whole)
            if turn > 0:  # the first warms up
                of = found.setdefault(name, {"forward": [], "forward_and_backward": [], "resident_bytes": []})
                of["forward"].append(forward_seconds)
                of["forward_and_backward"].append(seconds)
                of["resident_bytes"].append(resident)
    if MASKED in found:
        found[MASKED]["mask_bytes"] = make_mask(shape).nbytes
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file, written after every length")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--completions", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    record: dict[str, Any] = {"machine": machine(), "threads": given.threads, "results": []}
    for tokens in given.tokens:
        shape = Shape(given.completions, given.prompt, tokens)
        found = measure(shape, given.turns)
        record["results"].append({**shape._asdict(), "load_average": os.getloadavg()[0], "contenders": found})
        given.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"\n{shape}; load average {os.getloadavg()[0]:.1f}; processor seconds")
        for name, of in found.items():
            forward, both, resident = (statistics.median(x) for x in [*of.values()][:3])
            print(f"  {name:34} {forward:7.2f} + {both - forward:7.2f} s, {resident / 2**20:7.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
