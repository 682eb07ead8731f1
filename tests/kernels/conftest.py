"""What tests that run Triton's kernels under its interpreter ask for."""

from __future__ import annotations

import math

import pytest
import torch

from fdpg_kernels.triton import head, launch, tiles
from support.kernel_checks import rounds_as_a_gpu


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory holds NaN, as it may on a GPU; chunks are small, so that there are several."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def poison(*args, make=make, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(math.nan) if made.is_floating_point() else made

        monkeypatch.setattr(launch.torch, name, poison)
    monkeypatch.setattr(head, "CHUNK_ROWS", 32)
    monkeypatch.setattr(head, "STATISTICS_BYTES", 2048)


@pytest.fixture(params=["TMA", "pointers"])
def loads(request, monkeypatch):
    choose = tiles.choose
    if request.param == "pointers":
        monkeypatch.setattr(tiles, "choose", lambda *a, **k: choose(*a, **k | {"aligned": False}))
    return request.param


@pytest.fixture
def rounding():
    with rounds_as_a_gpu():
        yield
