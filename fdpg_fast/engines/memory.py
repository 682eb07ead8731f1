"""Memory: how much there was, how much a micro-batch may take, letting go of what can be had again at no cost."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

_LIBC = ctypes.CDLL(None)
_MADV_DONTNEED, _PAGE = 4, resource.getpagesize()


def machine_memory() -> int:
    """Of the whole machine, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux: ru_maxrss would count what the parent held when it started this process
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def plan_micro_batch_tokens(model: PreTrainedModel) -> int:
    """Tokens whose activations take half of what the parameters take, or 256 MiB (8 GiB on a GPU) if that is more.

    A layer keeps about 20 numbers for each hidden unit and token until its backward pass (19.4 measured on a Llama).
    """
    config = model.config.get_text_config()
    parameter_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    smallest = 2**28 if model.device.type == "cpu" else 2**33
    token_bytes = 20 * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize
    return max(1, max(smallest, parameter_bytes // 2) // token_bytes)


def trim() -> None:
    """Give memory that was freed back to the system (glibc keeps it otherwise)."""
    if sys.platform == "linux" and hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


class FrozenPages:
    """The weights of a model that never changes and whose file is mapped into memory (safetensors on a CPU).

    `release` unmaps their pages; the next read finds them in the kernel's page cache. So the base model is not
    resident while the policy trains. Weights that were copied or converted on loading stay as they are, and
    systems other than Linux release nothing.
    """

    def __init__(self, model: nn.Module):
        model.requires_grad_(False)
        mapped = _clean_file_mappings()
        weights = [p.data for p in model.parameters() if p.device.type == "cpu"]
        self._ranges = [
            pages
            for pages in map(_whole_pages, weights)
            if pages[0] < pages[1] and any(first <= pages[0] and pages[1] <= last for first, last in mapped)
        ]

    def release(self) -> None:
        """Unmap; changes no value."""
        for first, last in self._ranges:
            _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED)


def _whole_pages(weight: Tensor) -> tuple[int, int]:
    """Addresses of the pages that hold nothing but this tensor."""
    storage = weight.untyped_storage()
    first, last = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    return -(-first // _PAGE) * _PAGE, last // _PAGE * _PAGE


def _clean_file_mappings() -> list[tuple[int, int]]:
    """Addresses of mapped safetensors files of which no page was written: one that was would lose what it holds."""
    smaps = Path("/proc/self/smaps")
    found: list[tuple[int, int]] = []
    if sys.platform != "linux" or not smaps.exists():
        return found
    for line in smaps.read_text().splitlines():
        key = line.split(maxsplit=1)[0]
        if not key.endswith(":"):  # the first line of a mapping: its addresses … its file
            first, last = (int(address, 16) for address in key.split("-"))
            is_weights = line.endswith(".safetensors")
        elif key == "Anonymous:" and is_weights and line.split()[1] == "0":
            found.append((first, last))
    return found
