"""What a run would do, said and not done."""

from __future__ import annotations

from .config.load import dump_config
from .runs.checkpoint import round_of
from .session import describe_engine
from .trainer import Trainer


def describe(trainer: Trainer) -> str:
    """The whole config, and what follows from it."""
    config, settings = trainer.config, trainer.config.trainer
    parameters = list(trainer.state.learner.policy.model.parameters())
    size = f"{sum(p.numel() for p in parameters) / 1e6:.1f} M parameters"
    if config.lora is not None:
        size += f", of which {sum(p.numel() for p in parameters if p.requires_grad) / 1e6:.3g} M are trained"
    per_round = min(settings.contexts_per_round, len(trainer.contexts))
    samples = per_round * settings.samples_per_context
    left = settings.rounds - (0 if trainer.checkpoint is None else round_of(trainer.checkpoint))
    return (
        f"{dump_config(config)}\n"
        f"{config.model}: {size}, {config.dtype}, on {trainer.base.device}\n"
        f"{len(trainer.contexts)} contexts to train on, {len(trainer.eval_contexts)} to evaluate on; "
        f"features: {', '.join(trainer.scorer.feature_names)}\n"
        f"{left} rounds of {per_round} contexts × {settings.samples_per_context} samples = {samples} completions "
        f"of at most {config.engine.max_new_tokens} tokens, minimising {trainer.divergence.name} to the target; "
        f"{trainer.micro_batch_tokens} tokens a forward and backward pass\n"
        f"{describe_engine(config, trainer.base)}\n"
        f"writes to {config.run_dir}; nothing was done yet"
    )
