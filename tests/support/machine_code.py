"""What a compiled kernel costs, read off its machine code: registers, stack, instructions."""

from __future__ import annotations

import heapq
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from triton import knobs

PRODUCTS = ("HMMA", "HGMMA", "UTCHMMA")  # tensor-core instructions of the three generations
INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z0-9_]+)([^;]*);")


class Code(NamedTuple):
    registers: int
    stack: int
    local: int
    instructions: Counter
    epilogue: int  # instructions from the end of the K loop to the end of a tile, on the shortest way


def read(cubin: bytes) -> Code:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, text = _run("cuobjdump", "-res-usage", path), _run("nvdisasm", "-c", path)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    opcodes, targets, conditional = [], [], []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        elif made := INSTRUCTION.search(line):
            to = re.search(r"\.L_x_\d+", made[3]) if made[2] == "BRA" else None
            opcodes.append(made[2])
            targets.append(to and to[0])
            conditional.append(made[1] is not None or (to is not None and "P" in made[3].split("`")[0]))
    jumps = [None if to is None else labels[to] for to in targets]
    return Code(*map(int, found.groups()), Counter(opcodes), _epilogue(opcodes, jumps, conditional))


def _epilogue(opcodes: list[str], jumps: list[int | None], conditional: list[bool]) -> int:
    """Length of the shortest way from the innermost loop with products to the end of the program or a tile."""
    products = [i for i, name in enumerate(opcodes) if name in PRODUCTS]
    if not products:
        return 0
    loops = [(i - to, to, i) for i, to in enumerate(jumps) if to is not None and any(to <= p < i for p in products)]
    _, first, last = min(loops)
    queue, seen = [(0, max(last, products[-1]) + 1)], set()
    while queue:
        length, at = heapq.heappop(queue)
        if at >= len(opcodes) or opcodes[at] == "EXIT" or at < first:
            return length
        if at in seen:
            continue
        seen.add(at)
        jump = jumps[at]
        if jump is not None:
            heapq.heappush(queue, (length + 1, jump))
        if jump is None or conditional[at]:
            heapq.heappush(queue, (length + 1, at + 1))
    raise ValueError("the code after the products has no end")


def _run(tool: str, option: str, cubin: Path) -> str:
    command = [getattr(knobs.nvidia, tool).path, option, str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
