"""Runs the cases of an experiment that are not done yet, and writes what the done ones show."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import multiprocessing
import os
import platform
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from ..errors import RunError, UserError
from ..imports import import_object
from ..runs.folder import RunFolder
from .experiment import Case, cases, find_folder, load_experiment
from .page import write_page
from .rows import Row, append_row, forget_torn_line, read_rows

log = logging.getLogger(__name__)


def run_experiment(
    name: str,
    *,
    budget: str,
    seeds: int | None,
    divergences: list[str] | None,
    output: str | None,
    jobs: int,
) -> Path:
    """Run what is left of an experiment and write results.md with its pictures; returns that page.

    Args:
        name: of one of ours, or a folder with an experiment.yaml.
        budget: one of the experiment's.
        seeds, divergences: as `experiment.cases`.
        output: folder of results.jsonl, the runs and the page; left out, runs/experiments/NAME/BUDGET.
        jobs: runs side by side, each with its share of the CPU's cores.

    Raises:
        UserError: the experiment is not one, or results of other settings lie in `output`.
        RunError: a run failed; those before it are kept.
    """
    folder = find_folder(name)
    experiment = load_experiment(folder)
    wanted = cases(experiment, budget, seeds, divergences)
    place = Path(output or Path("runs/experiments") / folder.resolve().name / budget)
    with contextlib.closing(RunFolder(place)):  # one process at a time
        done = _done(place / "results.jsonl", wanted)
        left = [case for case in wanted if case.name not in done]
        log.info("%s", experiment.claim)
        log.info("%d runs, %d of them left, in %s", len(wanted), len(left), place)
        started = time.perf_counter()
        for number, (case, row) in enumerate(_run_all(left, place, jobs), start=1):
            append_row(place / "results.jsonl", row)
            done[case.name] = row
            seconds = (time.perf_counter() - started) / number * (len(left) - number)
            place_of = f"{len(wanted) - len(left) + number}/{len(wanted)}"
            log.info("%s  %s  %.0f s  %s left", place_of, case.name, row.seconds, _time(seconds))
        rows = [done[case.name] for case in wanted]
        return write_page(place, folder.resolve().name, budget, experiment, rows)


def _done(path: Path, wanted: list[Case]) -> dict[str, Row]:
    """Rows of earlier runs by the names of their cases."""
    forget_torn_line(path)
    by_name = {case.name: case for case in wanted}
    done = {}
    for row in read_rows(path):
        case = Case(row.labels, row.seed, {}, "")
        expected = by_name.get(case.name)
        if expected is not None and expected.fingerprint != row.fingerprint:
            raise UserError(f"{path}: {case.name} ran with other settings than now; choose another --output")
        done[case.name] = row
    return done


def _run_all(left: list[Case], place: Path, jobs: int) -> Iterator[tuple[Case, Row]]:
    if jobs == 1:
        for case in left:
            yield case, _run(case, place)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # spawned: a forked torch may hang
    context, start = multiprocessing.get_context("spawn"), functools.partial(_limit_threads, threads)
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=start) as pool:
        running = {pool.submit(_run, case, place): case for case in left}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _limit_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _run(case: Case, place: Path) -> Row:
    started = time.perf_counter()
    runner = import_object(case.runner)
    runs_log = logging.getLogger("fdpg_fast")
    level = runs_log.level
    runs_log.setLevel(logging.CRITICAL)  # the lines of its rounds would drown those of the sweep
    try:
        row = runner(copy.deepcopy(case.settings), case.seed, place / case.name)
    except UserError as error:
        raise UserError(f"{case.name}: {error}") from None
    except RunError as error:
        raise RunError(f"{case.name}: {error}") from None
    finally:
        runs_log.setLevel(level)
    seconds = time.perf_counter() - started
    return replace(
        row, labels=case.labels, seed=case.seed, seconds=seconds, fingerprint=case.fingerprint, machine=machine()
    )


def machine() -> str:
    """Processor, cores and versions that a result depends on."""
    import torch
    import transformers

    name = platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), name)
    if torch.cuda.is_available():
        name += f", {torch.cuda.get_device_name()}"
    return f"{name}, {os.cpu_count()} CPU cores, torch {torch.__version__}, transformers {transformers.__version__}"


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d} h"
