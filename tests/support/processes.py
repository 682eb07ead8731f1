"""Runs of several processes: torchrun starts them once, and they train one config after another.

torchrun … -m support.processes CONFIG.yaml …
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from .loaded_parts import save_weights

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start(*commands: list[object], count: int = 2, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """fdpg-fast's commands, each as a list of arguments, under torchrun."""
    worker = [*TORCHRUN, "--nproc-per-node", str(count), *options, "-m", "support.processes"]
    arguments = [json.dumps([str(argument) for argument in command]) for command in commands]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*worker, *arguments], env=environment(), **pipes)


def run(*commands: list[object], count: int = 2) -> subprocess.CompletedProcess[str]:
    """The same, when all processes have ended."""
    return _ended(start(*commands, count=count))


def run_on_two_machines(*commands: list[object]) -> list[subprocess.CompletedProcess[str]]:
    """The same by two torchruns, each with one process, that meet on the loopback as two machines do."""
    with socket.create_server(("localhost", 0)) as free:
        endpoint = f"localhost:{free.getsockname()[1]}"
    options = ("--nnodes", "2", "--rdzv-endpoint", endpoint, "--rdzv-id", "run", "--local-addr", "localhost")
    return [_ended(process) for process in [start(*commands, count=1, options=options) for _ in range(2)]]


def _ended(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    stdout, stderr = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def save_gradients(config: str, path: str) -> None:
    """Of a run's first round, by name, whole and on the first process; and the loss. Beside it: gathers of weights."""
    import torch

    from fdpg_fast import ranks
    from fdpg_fast.clock import Clock
    from fdpg_fast.config.load import load_config
    from fdpg_fast.models import parallel
    from fdpg_fast.session import Session

    with contextlib.closing(Session(load_config(config))) as session:
        assert session.engine is not None
        rollouts = session.sampling.take(0, session.round_contexts, Clock())
        # whatever goes into the loss comes from equal passes, and so is equal to the last bit
        tokens = session.scorer.micro_batch_tokens = session.micro_batch_tokens
        rollouts = dataclasses.replace(rollouts, behavior_logprob=session.base.token_logprobs(rollouts, tokens))
        scores = session.scorer(rollouts, Clock())
        log_z, baseline = session.state.estimates.update(rollouts, scores, session.divergence)
        learner = session.state.learner
        with torch.profiler.profile() as profile:
            loss, _ = learner.backward(rollouts, scores.log_score, log_z, baseline, session.divergence)
        gathers = sum(event.name.startswith("FSDP::all_gather (") for event in profile.events())
        parameters = learner.policy.model.named_parameters()
        gradients = {name: x.grad for name, x in parameters if x.grad is not None}
        gradients = {name: x.to_dense() if x.layout == torch.sparse_coo else x for name, x in gradients.items()}
        found = {name: parallel.full(x) for name, x in gradients.items()} | {"loss": loss}
        if ranks.is_first():
            torch.save(found, path)
            Path(path).with_suffix(".gathers").write_text(str(gathers))


def by_nccl(config: str, path: str) -> None:
    """Give servers weights by vLLM's NCCL, of which the communicators are stand-ins; the first server's hangs.

    What arrived at the last one, and what each process knows then, by the first process.
    """
    from unittest import mock

    import torch
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

    from fdpg_fast import ranks
    from fdpg_fast.config.load import load_config
    from fdpg_fast.engines import VLLMServerEngine, vllm_replica
    from fdpg_fast.session import Session

    arrived: list[torch.Tensor] = []
    asked_for: list[torch.Tensor] = []
    destroyed = threading.Event()
    urls = load_config(config).engine.urls

    def take(tensor: torch.Tensor, **_: object) -> None:
        arrived.append(tensor.clone())

    def hang(tensor: torch.Tensor, **_: object) -> None:
        if len(asked_for) < 3:
            asked_for.append(tensor)
        if len(asked_for) == 3:
            destroyed.wait()

    def open_transfer(replica: vllm_replica.Replica, source: Any) -> Any:
        engine = NCCLTrainerWeightTransferEngine(client=mock.Mock(), source=source, packed=False)
        group: Any = mock.Mock(broadcast=hang if replica.url == urls[0] else take, destroy=destroyed.set)
        engine.model_update_group = group
        return engine

    session = Session(load_config(config))
    policy = session.state.learner.policy
    on_gpu: Any = mock.Mock(wraps=policy, head=policy.head, device=mock.Mock(type="cuda", index=None))
    servers = VLLMServerEngine(urls, session.eos_token_ids, max_new_tokens=6, request_timeout=5.0)
    with mock.patch.object(vllm_replica, "open_transfer", open_transfer), mock.patch("torch.cuda.current_stream"):
        servers.sync_weights(on_gpu, 0)
    samples = servers.sample(session.contexts, 4, seed=1).token_ids
    servers.close()
    names = [name for name, _ in policy.weights(repeat_tied=False)]
    found: dict[str, Any] = {"asked for": ranks.by_first(lambda: len(asked_for))}
    found |= {"lost": ranks.gathered(servers.lost), "samples": ranks.gathered(samples)}
    if ranks.is_first():
        torch.save(found | {"sent": dict(zip(names, arrived, strict=True))}, path)


def remove(folder: str) -> None:
    """As somebody does between two commands."""
    from fdpg_fast import ranks

    if ranks.is_first():
        shutil.rmtree(folder)
    ranks.gathered(None)


def do(command: list[str]) -> int:
    """A command of fdpg-fast, or one of those above; its exit status."""
    from fdpg_fast.cli import main, prepare_environment

    prepare_environment()
    name, *arguments = command
    if name not in (
        others := {"gradients": save_gradients, "by_nccl": by_nccl, "weights": save_weights, "remove": remove}
    ):
        return main(command)
    others[name](*arguments)
    return 0


if __name__ == "__main__":
    for command in sys.argv[1:]:
        if status := do(json.loads(command)):
            sys.exit(status)
