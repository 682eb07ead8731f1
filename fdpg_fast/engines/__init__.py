"""Samplers: contexts in, `Rollouts` with exact log-probs out. None imports vLLM before it is made."""

from .engine import Engine as Engine
from .transformers import TransformersEngine as TransformersEngine
from .vllm import VLLMEngine as VLLMEngine
from .vllm_server import VLLMServerEngine as VLLMServerEngine
