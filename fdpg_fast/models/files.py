"""Weights that come block by block, written as `from_pretrained` reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

FILE_BYTES = 2**31  # of a file, about: what is held before it is written


def write_weights(folder: Path, blocks: Iterator[dict[str, Tensor]]) -> None:
    """One model.safetensors in a folder, or several files and an index, of no more than FILE_BYTES and a block each."""
    files: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = 0

    def write() -> None:
        nonlocal total
        files.append(list(held))
        total += sum(x.nbytes for x in held.values())
        save_file(held, folder / f"{len(files)}.part", metadata={"format": "pt"})
        held.clear()

    for block in blocks:
        held |= {name: tensor.detach().cpu().contiguous() for name, tensor in block.items()}
        block.clear()  # before the next is made
        if sum(x.nbytes for x in held.values()) >= FILE_BYTES:
            write()
    if held:
        write()
    if len(files) == 1:
        (folder / "1.part").rename(folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
