"""Whole runs with a server whose answers go wrong beside a good one: they leave what the good one alone gives."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from support import fake_server, runs
from support.fake_server import DAMAGES, GENERATE, FakeServer

from . import Tally, tried
from .kills import differences

SLOW = "a byte now and then"


# of answers to requests for completions all that there are, of every other call a few: not the same few of each
CHOSEN = [key for number, key in enumerate(DAMAGES) if key[0] == GENERATE or number % 7 == 0]


def misbehaviours(model: Path, share: float) -> Tally:
    """What is CHOSEN, or a share of it."""
    with tempfile.TemporaryDirectory() as name:
        ended, expected = _run(Path(name), model, FakeServer(model))
        assert ended.status == 0, ended.stderr
        attempt = partial(_try, Path(name), model, expected)
        return tried("a bad server beside a good one", CHOSEN[:: max(1, round(1 / share))], attempt)


def _try(folder: Path, model: Path, expected: dict[str, Any], key: tuple[str, str]) -> list[str]:
    """The first answer is good, that to the probe: then the damage begins."""
    path, name = key
    bad = FakeServer(model, path, DAMAGES[key], spared=1)
    ended, record = _run(folder, model, bad, FakeServer(model), timeout=2.0 if name == SLOW else 60.0)
    if ended.status:
        return [f"status {ended.status}: {ended.stderr.strip()[-300:]}"]
    faults = [] if f"{bad.url} is left out" in ended.stderr else ["nothing was said"]
    return faults + differences(record, expected)


def _run(parent: Path, model: Path, *fakes: FakeServer, timeout: float = 60.0) -> tuple[runs.Ended, dict[str, Any]]:
    folder = Path(tempfile.mkdtemp(dir=parent))
    engine = {"kind": "vllm_server", "urls": [fake.url for fake in fakes], "weight_transfer": "disk"}
    engine |= {"weights_dir": "weights", "request_timeout": timeout}
    trainer = {"contexts_per_round": 3}  # a request each: some for both servers
    contexts = {"train": runs.write_contexts(folder, *runs.PROMPTS).name}
    settings = runs.settings(model, "run", engine=engine, trainer=trainer, contexts=contexts)
    with fake_server.servers(*fakes):
        ended = runs.start(folder, "train", runs.write_config(folder, settings)).wait(120)
    if ended.status:
        return ended, {}
    record = runs.record(folder / "run")
    return ended, {name: part for name, part in record.items() if not name.endswith("config.yaml")}
