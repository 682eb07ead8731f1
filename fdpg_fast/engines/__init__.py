"""Samplers: contexts in, `Rollouts` with exact log-probs out. None imports vLLM before it is made."""

from .embedded import TransformersEngine as TransformersEngine
from .engine import Engine as Engine
from .replicas import VLLMServerEngine as VLLMServerEngine
from .vllm import VLLMEngine as VLLMEngine
