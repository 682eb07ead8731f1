"""The processes of a run, which torchrun starts: each knows all of a round, and only what takes long is divided.

What a process finds for its part goes into a vector of zeros that is summed over all of them: exactly, for x + 0 is x.
From there on each does the same arithmetic on the same numbers. Without torchrun there is one, and nothing is sent.
"""

from __future__ import annotations

import atexit
import bisect
import collections
import itertools
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import RunError, UserError, one_line

PATIENCE = timedelta(hours=6)  # the others wait meanwhile, as where one samples from servers, or draws plots
Made = TypeVar("Made")
Sent = TypeVar("Sent")
_beside: Any = None  # a group for what a thread exchanges while the main thread uses the first
_writers: Any = None  # another, for threads that write a checkpoint


def joined() -> bool:
    """Whether torchrun has started this process, as one of several or as the only one."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def join(device: str) -> str:
    """Meet the other processes, if there are any; the device that is this process's, where `device:` asks for one.

    Raises:
        UserError: there is none of this name here.
    """
    device = _choose(device)
    if not joined():
        return device
    if torch.device(device).type == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    global _beside, _writers
    if not dist.is_initialized():
        if os.environ["RANK"] != "0":
            logging.getLogger("fdpg_fast").setLevel(logging.ERROR)  # the first one speaks
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE)
        _beside, _writers = (dist.new_group(backend="gloo", timeout=PATIENCE) for _ in range(2))
        atexit.register(leave)
    return device


def _choose(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"device: {name!r} is not usable here: {one_line(error)[:200]}") from None
    if torch.device(name).type == "meta":
        raise UserError("device: 'meta' holds no numbers")
    return name


def leave() -> None:
    """Part from the others as the process ends: without it gloo aborts now and then. After an error they may wait."""
    if hasattr(sys, "last_value"):  # of an exception that nobody caught
        return
    global _beside, _writers
    _beside = _writers = None  # groups end with the last who knows them
    dist.destroy_process_group()


def is_lonely(error: BaseException) -> bool:
    """Whether this is what a process raises when another one that it waits for is gone."""
    return count() > 1 and (isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error)))


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def writers() -> Any:
    """The group of all processes for what the threads that write a checkpoint exchange."""
    return _writers


def share(total: int, width: int = 1) -> range:
    """Which of so many things, in a row, are the part of this process, or of the `width` that it belongs to."""
    place, parts = rank() // width, count() // width
    return range(total * place // parts, total * (place + 1) // parts)


def share_out(parts: Sequence[slice], costs: Sequence[int], world: int) -> list[list[slice]]:
    """Ranges of sequences, equally many for each process and about equally long; every process finds the same.

    parts, costs: ranges that fit into memory, and tokens of each sequence. A pass is of all processes at once, so where
    the ranges are no multiple of the processes, all are cut anew: evenly, into as many more as are missing, if there
    are as many sequences. And a pass takes as long as its longest range: those of one pass are about equally long too.
    """
    if world == 1:
        return [list(parts)]

    def cost(rows: slice) -> int:
        return sum(costs[rows])

    if missing := -len(parts) % world:
        parts = _cut_evenly(costs, min(len(parts) + missing, len(costs)))
    longest_first = sorted(parts, key=cost, reverse=True)
    shares: list[list[slice]] = [[] for _ in range(world)]
    for i in range(0, len(parts), world):  # of each pass the longest range to the process with the fewest tokens so far
        fewest_first = sorted(shares, key=lambda own: sum(map(cost, own)))
        for own, rows in zip(fewest_first, longest_first[i : i + world], strict=False):
            own.append(rows)
    return shares


def _cut_evenly(costs: Sequence[int], count: int) -> list[slice]:
    """So many ranges of sequences, none empty, each about as long as the others."""
    ends = list(itertools.accumulate(costs))
    cuts = [0]
    for i in range(1, count):
        wanted = ends[-1] * i / count
        after = bisect.bisect_left(ends, wanted)  # the sequence in which the cut would lie
        before = ends[after - 1] if after else 0
        nearest = after + (ends[after] - wanted < wanted - before)
        cuts.append(min(max(nearest, cuts[-1] + 1), len(costs) - count + i))
    return [slice(a, b) for a, b in itertools.pairwise([*cuts, len(costs)])]


def passes(parts: Iterable[slice], costs: Sequence[int]) -> list[tuple[slice, bool]]:
    """The ranges that this process passes through a model, as many as every other; and whether they are its own.

    One that has fewer repeats a range for company's sake: a pass is of all processes at once.
    """
    shares = share_out(list(parts), costs, count())
    own, most = shares[rank()], max(map(len, shares))
    company = (own or shares[0])[-1]
    return [(rows, True) for rows in own] + [(company, False)] * (most - len(own))


def whole(found: Iterable[tuple[slice, Tensor]], like: Tensor) -> Tensor:
    """What each process found for some places of a vector [..., n], as all of it on every one; the shape of `like`."""
    vector = torch.zeros_like(like)
    for places, values in found:
        vector[..., places] = values
    return total(vector)


def total(own: Tensor) -> Tensor:
    """The sum over all processes of what each one has; replaces it."""
    if count() > 1:
        dist.all_reduce(own)
    return own


def gathered(own: Sent, beside: bool = False, group: Any = None) -> list[Sent]:
    """What each process has, in their order; anything that can be pickled. beside: perhaps in a thread."""
    if count() == 1:
        return [own]
    everybodys: list[Sent] = [own] * count()
    dist.all_gather_object(everybodys, own, group=_beside if beside else group)
    return everybodys


def by_first(function: Callable[[], Sent]) -> Sent:
    """What a function gives in the first process, on all of them; perhaps in a thread.

    Raises:
        UserError, RunError: it does so there; everywhere.
    """
    if count() == 1:
        return function()
    found: list[Any] = [None, None]
    if is_first():
        try:
            found = [function(), None]
        except (UserError, RunError) as error:
            found = [None, (UserError if isinstance(error, UserError) else RunError)(str(error))]
    dist.broadcast_object_list(found, 0, group=_beside)
    if found[1] is not None:
        raise found[1]
    return found[0]


def for_first(things: Iterable[Made], take: Callable[[Iterator[Made]], Sent]) -> Sent:
    """What the first process gives for things that all make together, as what is divided is gathered; on all of them.

    All make every one of them, even where `take` fails or gives up amid them: the others wait for company in there.
    Raises as `by_first`.
    """
    made = _InTurns(things)

    def taken() -> Sent:
        try:
            return take(made)
        finally:
            made.finish()

    if not is_first():
        made.finish()
    return by_first(taken)


class _InTurns(Iterator[Made]):
    """An iterator for several threads: one that was given up may still be inside."""

    def __init__(self, things: Iterable[Made]):
        self._things, self._lock = iter(things), threading.Lock()

    def __next__(self) -> Made:
        with self._lock:
            return next(self._things)

    def finish(self) -> None:
        collections.deque(self, maxlen=0)
