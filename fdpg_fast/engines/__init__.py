"""Samplers: contexts in, `Rollouts` with exact log-probs out."""

from .transformers import TransformersEngine as TransformersEngine
