"""Time the shipped tiles on the GPU at hand and write down the fastest, which are then taken instead of the rule's.

    python -m fdpg_kernels.triton.tune 4096x128256 576x49152    # D×V of the heads that you use

The file is `tiles.TUNED`; delete it to go back to the rule.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace

import torch
import triton.testing

from . import tiles
from .head import Head


def tune(width: int, vocabulary: int, num_tokens: int = 4096, device: str = "cuda") -> tiles.Config:
    """The tile with which an online and an anchored product of a bfloat16 head [V, D] take the least time together."""
    hidden = torch.randn(num_tokens, width, device=device).bfloat16()
    weight = torch.randn(vocabulary, width, device=device).bfloat16() * width**-0.5
    target_ids = torch.randint(vocabulary, (num_tokens,), device=device)
    behavior = torch.full((num_tokens,), -5.0, device=device)

    def milliseconds(config: tiles.Config) -> float:
        head = Head(hidden, weight, target_ids, None, 1.0, None, tile=config)
        target, anchor, top = head.target_logits(behavior)
        rows = slice(0, min(num_tokens, head.chunk_rows))

        def both() -> None:
            head.anchored(target, anchor, top, rows, guard=False)
            head.statistics(target, anchor.clone(), top.clone(), rows)

        return triton.testing.do_bench(both)

    rule = Head(hidden, weight, target_ids, None, 1.0, None)
    times = {}
    for config in tiles.candidates(rule.capability, aligned=rule.aligned):
        config = replace(config, group_rows=rule.config.group_rows)
        times[config] = milliseconds(config)
        loads = "TMA" if config.tma else "pointers"
        print(f"{width}x{vocabulary} {config.BM}×{config.BV}×{config.BD} {loads}: {times[config]:.3f} ms")
    return min(times, key=lambda config: times[config])


def main(heads: list[str], device: str = "cuda") -> None:
    chip = torch.cuda.get_device_name() if device == "cuda" else "interpreter"
    found = json.loads(tiles.TUNED.read_text()) if tiles.TUNED.exists() else {}
    for head in heads:
        width, vocabulary = (int(size) for size in head.split("x"))
        found.setdefault(chip, {})[str(width)] = asdict(tune(width, vocabulary, device=device))
    tiles.TUNED.parent.mkdir(parents=True, exist_ok=True)
    tiles.TUNED.write_text(json.dumps(found, indent=1))
    print(f"wrote {tiles.TUNED}")


if __name__ == "__main__":
    main(sys.argv[1:])
