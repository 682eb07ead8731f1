"""What is random in a run, and yet the same whenever a round is computed: its draws and its contexts."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def derived_seed(seed: int, purpose: str, round_index: int) -> int:
    """A seed for one use of random numbers in a run of this seed: uses do not share theirs."""
    text = f"{seed}/{purpose}/{round_index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def schedule(num_contexts: int, per_round: int, round_index: int, seed: int) -> list[int]:
    """The contexts of a round: every epoch is a fresh permutation, and any round can be recomputed alone."""
    chosen: list[int] = []
    for position in range(round_index * per_round, (round_index + 1) * per_round):
        epoch, place = divmod(position, num_contexts)
        if place == 0 or not chosen:
            permutation = list(range(num_contexts))
            random.Random(f"{seed}/{epoch}").shuffle(permutation)
        chosen.append(permutation[place])
    return sorted(chosen)


@contextlib.contextmanager
def own_generators(device: torch.device, seed: int = 0) -> Iterator[None]:
    """The global generators start from a seed in this block, and are left as they were."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield
