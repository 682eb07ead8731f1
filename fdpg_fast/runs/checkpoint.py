"""Checkpoints: a Hugging Face model folder plus what the trainer needs to go on with the same numbers.

    checkpoints/round-000050/   model and tokenizer as transformers saves them (from_pretrained opens the folder), or
                                a LoRA adapter as peft saves it (peft.AutoPeftModelForCausalLM.from_pretrained does)
                                trainer/state.tensors, trainer/parts/: optimizer, Z, baseline, rollouts sampled ahead,
                                an adaptive proposal, a base that moves; see `tensors`
                                trainer/state.json: round, λ, the generators of each process
                                SHA256SUMS: of every file, as `sha256sum --check` reads it

A checkpoint is written under a temporary name, flushed and renamed: a killed process leaves the older one whole. Many
processes write what moves with the weights while the next rounds go on; the model's folder is complete before.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ranks
from ..contexts import Context
from ..errors import UserError, disk_errors
from ..learner import Learner
from ..models.older import OlderPolicy
from ..partition import Estimates
from ..rollouts import Rollouts
from ..sampling import Sampling
from .tensors import TENSORS, read_tensors, write_tensors

STATE, SUMS = "trainer/state.json", "SHA256SUMS"
NEWEST = 2  # checkpoints that stay; older ones are deleted once a newer one is complete


@dataclass(frozen=True)
class Settled:
    """What was between two rounds and is no longer as soon as the next one begins; weights move only at its end."""

    round: int
    tensors: dict[str, Tensor]
    trainer: dict[str, Any]  # what JSON holds
    generators: dict[str, Any]  # of this process; features may draw from them


@dataclass
class TrainerState:
    """Everything that changes from round to round besides the policy's weights."""

    learner: Learner
    estimates: Estimates
    sampling: Sampling  # what it has sampled ahead, and an adaptive proposal
    base: OlderPolicy | None = None  # of the target, where it moves
    round: int = 0  # counted up just before the weights move
    exponents: tuple[tuple[float, ...], ...] | None = None  # λ of the target, and the standard errors
    settled: Settled | None = None  # of the last round that was finished; None before the first one begins
    writing: Future[None] | None = None  # the latest checkpoint, while it is written

    @property
    def older(self) -> dict[str, OlderPolicy]:
        """Models that hold weights of earlier rounds, by what their tensors are called in a checkpoint."""
        kept = {"proposal.": self.sampling.proposal, "base.": self.base}
        return {prefix: model for prefix, model in kept.items() if model is not None}

    @property
    def at_rest(self) -> bool:
        """Whether the weights are those that `settled` belongs to, even if a round has begun."""
        return self.settled is None or self.settled.round == self.round

    def settle(self) -> Settled:
        """What a checkpoint of this moment holds; by reference, for tensors of a state are replaced, never changed."""
        groups = {f"ahead.{i}.": rollouts.tensors() for i, rollouts in enumerate(self.sampling.ahead)}
        groups["estimates."] = self.estimates.state()
        trainer: dict[str, Any] = {"round": self.round, "exponents": self.exponents}
        generators = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
        return Settled(self.round, _named(groups), trainer, generators)


def save_checkpoint(
    run_dir: Path, state: TrainerState, settled: Settled, tokenizer: Any, best: Collection[int] = ()
) -> Path:
    """Write the checkpoint of `settled.round` rounds and delete old ones; a RunError leaves what was there.

    best: rounds whose checkpoints stay, however old.

    It is there when `finish_checkpoint` has come back.
    """
    finish_checkpoint(state)
    folder = run_dir / "checkpoints"
    final = folder / f"round-{settled.round:06d}"
    temporary = folder / f".writing-{final.name}"

    def begin() -> Callable[[], None]:
        if ranks.is_first():
            for unfinished in folder.glob(".writing-*"):  # of a process that was killed
                shutil.rmtree(unfinished)
            (temporary / STATE).parent.mkdir(parents=True)
        state.learner.policy.save(temporary)  # gathers, and leaves the writing to the first
        if ranks.is_first():
            tokenizer.save_pretrained(temporary)
            (temporary / STATE).write_text(json.dumps(trainer, default=lambda array: array.tolist()))
        return write_tensors(temporary, settled.tensors, _moving(state))

    def complete() -> None:
        write_parts()
        files = sorted(path for path in temporary.rglob("*") if path.is_file())  # of a tokenizer in folders too
        own = {path: _sha256(path) for path in files[ranks.rank() :: ranks.count()]}
        sums = {path: found for part in ranks.gathered(own, group=ranks.writers()) for path, found in part.items()}
        failure = None
        try:
            if ranks.is_first():
                publish(files, sums)
        except OSError as error:
            failure = error
        for found in filter(None, ranks.gathered(failure, group=ranks.writers())):  # all know how it ended
            raise found

    def publish(files: list[Path], sums: dict[Path, str]) -> None:
        lines = [f"{sums.get(path) or _sha256(path)}  {path.relative_to(temporary)}\n" for path in files]
        (temporary / SUMS).write_text("".join(lines))
        for path in files:  # safetensors shuts out whom the umask lets read
            path.chmod(temporary.stat().st_mode & 0o666)
        for path in [*temporary.rglob("*"), temporary]:
            _fsync(path)
        temporary.rename(final)
        _fsync(folder)  # or the rename does not survive a power cut
        prune(run_dir, settled.round, best)

    def attempt(step: Callable[[], Any]) -> Any:
        done = False
        try:
            with disk_errors(f"writing checkpoint {final}"):
                result = step()
            done = True
            return result
        finally:
            if not done and ranks.is_first():
                shutil.rmtree(temporary, ignore_errors=True)

    trainer = settled.trainer | {"generators": ranks.gathered(settled.generators)}
    write_parts = attempt(begin)
    if ranks.joined():
        state.writing = ThreadPoolExecutor(1).submit(attempt, complete)
    else:
        attempt(complete)
    return final


def finish_checkpoint(state: TrainerState) -> None:
    """Wait for what is still written of the latest checkpoint; raises as `save_checkpoint`."""
    writing, state.writing = state.writing, None
    if writing is not None:
        writing.result()


def prune(run_dir: Path, newest: int, best: Collection[int]) -> None:
    """Delete all checkpoints but the NEWEST ones, of which one is that of `newest` rounds, and those of `best`."""
    older = [path for path in checkpoints(run_dir) if round_of(path) < newest]
    for old in older[: 1 - NEWEST]:
        if round_of(old) not in best:
            shutil.rmtree(old, ignore_errors=True)


def checkpoints(run_dir: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; folders of other names, such as a copy, are none of ours."""
    found = [path for path in Path(run_dir).glob("checkpoints/round-*") if re.fullmatch(r"round-\d{6,}", path.name)]
    return sorted(found, key=round_of)


def round_of(path: Path) -> int:
    """How many rounds precede a checkpoint."""
    return int(path.name.split("-")[1])


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest checkpoint, or None; raises UserError that names the one before if it is damaged."""
    *older, newest = [None, *checkpoints(run_dir)]
    if newest is not None:
        refuse_damaged(newest, f"continue from {older[-1].name}" if older[-1] else "start again from round 0")
    return newest


def refuse_damaged(path: Path, remedy: str) -> None:
    """Raises UserError that names what is wrong with a checkpoint's files, and what deleting it would lead to."""
    if fault := _fault(path):
        raise UserError(f"checkpoint {path} is damaged ({fault}); delete that folder to {remedy}")


def load_checkpoint(path: Path, state: TrainerState, contexts: Callable[[int], list[Context]]) -> None:
    """Restore everything but the policy's weights, which are read where it is made; contexts: of a round."""
    tensors, trainer = read_tensors(path, _divided(state)), json.loads((path / STATE).read_text())

    def of(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    optimizer, estimates, sampling = state.learner.optimizer, state.estimates, state.sampling
    groups = optimizer.state_dict()["param_groups"]
    moments = {index: of(f"optimizer.{index}.") for index in range(len(groups[0]["params"]))}
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    for index, master in enumerate(state.learner.masters):
        master.detach().copy_(tensors[f"master.{index}"])
    estimates.load_state(of("estimates."))
    for prefix, model in state.older.items():
        model.load_state(of(prefix))
    state.round, sampling.ahead = trainer["round"], []
    while fields := of(f"ahead.{len(sampling.ahead)}."):
        sampling.ahead.append(Rollouts(contexts=tuple(contexts(state.round + len(sampling.ahead))), **fields))
    state.exponents = None if trainer["exponents"] is None else tuple(map(tuple, trainer["exponents"]))
    generators = trainer["generators"]
    own = generators[ranks.rank() % len(generators)]  # of more processes than before some begin alike, as in a new run
    version, internal, gauss = own["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(own["numpy"])
    torch.set_rng_state(torch.tensor(own["torch"], dtype=torch.uint8))


def _moving(state: TrainerState) -> dict[str, Tensor]:
    """What moves with the weights, at the end of a round; parts of what is divided."""
    groups = {f"optimizer.{i}.": moments for i, moments in state.learner.optimizer.state_dict()["state"].items()}
    groups["master."] = {str(i): master.detach() for i, master in enumerate(state.learner.masters)}
    return _named(groups | {prefix: model.state() for prefix, model in state.older.items()})


def _divided(state: TrainerState) -> dict[str, Tensor]:
    """What tensors of `_moving` are parts as."""
    parameters = state.learner.optimizer.param_groups[0]["params"]
    found = {f"optimizer.{i}.{name}": x for i, x in enumerate(parameters) for name in ("exp_avg", "exp_avg_sq")}
    found |= {f"master.{i}": master for i, master in enumerate(state.learner.masters)}
    return found | _named({prefix: model.state() for prefix, model in state.older.items()})


def _named(groups: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {prefix + name: x.contiguous() for prefix, tensors in groups.items() for name, x in tensors.items()}


def _fault(path: Path) -> str | None:
    try:
        expected = dict(line.split("  ", 1)[::-1] for line in (path / SUMS).read_text().splitlines())
    except (OSError, ValueError):
        return f"{SUMS} is not readable"
    found = None
    for name in (STATE, TENSORS, *expected)[ranks.rank() :: ranks.count()]:
        if not (path / name).is_file():
            found = f"{name} is not there"
        elif _sha256(path / name) != expected.get(name):
            found = f"{name} has changed"
        if found is not None:
            break
    return next(filter(None, ranks.gathered(found)), None)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
