"""Memory of freed tensors on a CPU, and when the system has it back, where the C library is glibc.

It keeps tensors of less than 32 MiB in one heap, in which inputs of blocks and gradients, which stay, lie between what
comes and goes: holes that the next tensors do not fit into, and together several times what is in use.
"""

from __future__ import annotations

import contextlib
import ctypes

MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD


def give_back() -> None:
    """Return the pages of freed tensors now."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def give_back_from(size: int) -> None:
    """Return those of tensors of so many bytes or more as soon as they are freed, from now on."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, size)
