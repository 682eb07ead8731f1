"""One model with one engine in a process of its own: gpu_round_runs.py's child.

Each thing measured is saved at once, so that what a process had found when it died is not lost.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import engine_turns
from benchmarks.gpu_round_cases import Case, Variant, make_config
from fdpg_fast.engines import VLLMEngine
from fdpg_fast.trainer import Trainer

Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    case: Case
    variant: Variant
    model: str  # folder
    folder: Path  # empty, of this job alone
    device: str
    repeats: int

    @property
    def result(self) -> Path:
        return self.folder / "result.json"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"


def run(job: Job) -> None:
    """What the child process does: everything found goes to job.result."""
    record: Record = {"variant": job.variant.name, "status": "failed", "reason": "it did not get to its end"}

    def save(**found: Any) -> None:
        record.update(found)
        unfinished = job.result.with_suffix(".part")
        unfinished.write_text(json.dumps(record))
        unfinished.replace(job.result)

    save()
    try:
        measure(job, save)
        save(status="ok", reason=None)
    except Exception as error:  # whatever an engine raises is a result of this benchmark
        traceback.print_exc()
        status = "wrong" if isinstance(error, engine_turns.WrongError) else "failed"
        save(status=status, reason=f"{type(error).__name__}: {' '.join(str(error).split())}"[:500])


def measure(job: Job, save: Callable[..., None]) -> None:
    """Correctness first; then tokens/s, syncs and rounds."""
    config = make_config(job.case, job.variant, job.model, job.folder, job.device)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    trainer = Trainer(config)
    session = trainer.session
    parameters = list(session.state.learner.policy.model.parameters())
    save(
        parameters=sum(p.numel() for p in parameters),
        parameter_bytes=sum(p.numel() * p.element_size() for p in parameters),
    )
    start = time.perf_counter()
    engine = session.engine
    save(start_seconds=time.perf_counter() - start)
    if isinstance(engine, VLLMEngine):
        import vllm

        save(vllm=vllm.__version__)
    save(gaps=engine_turns.check(session))

    turns = engine_turns.take_turns(
        engine_turns.samplers_of(engine),
        session,
        job.repeats,
        lambda: engine_turns.forget_prefixes(engine),
    )
    save(sampling={"seconds": turns.seconds, "tokens": turns.tokens})
    moved, syncs = engine_turns.bytes_moved(session), engine_turns.time_syncs(session, job.repeats + 1)[1:]
    save(sync={"bytes": moved, "seconds": syncs})
    if job.variant.pipeline_depth == 0:  # engines that do not sleep show the same numbers again
        save(sleep_and_sync={"seconds": engine_turns.time_syncs(session, job.repeats + 1, asleep=True)[1:]})

    rounds = []
    for index in range(job.repeats + 1):
        metrics = engine_turns.run_round(trainer, index)
        if index > 0:  # the first warms up, and one round ahead samples twice
            gaps = {key.removeprefix("engine/"): value for key, value in metrics.items() if key.startswith("engine/")}
            if not math.isfinite(sum(gaps.values())):
                raise engine_turns.WrongError("some log-prob is not a number")
            seconds, tokens = engine_turns.phases(metrics), engine_turns.tokens_of(metrics)
            rounds.append({"seconds": seconds, "tokens": tokens, "gaps": gaps})
            save(rounds=rounds)
    save(peak_bytes=metrics["memory/peak_bytes"])
    if "memory/peak_device_bytes" in metrics:
        save(peak_allocated_bytes=metrics["memory/peak_device_bytes"])
