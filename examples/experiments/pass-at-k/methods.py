"""f-DPG, and on as many samples of as many problems what people use instead: GRPO and rejection fine-tuning, by TRL.

Whatever the method, it ends in a model's folder, which fdpg-fast measures: a policy beside the same base, on the same
held-out problems, with the same random numbers.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from fdpg_fast import Trainer
from fdpg_fast.clock import Clock
from fdpg_fast.config.load import parse_config
from fdpg_fast.config.schema import BaseConfig, TrainConfig
from fdpg_fast.experiments.compare import frozen_base_sample
from fdpg_fast.experiments.rows import Row
from fdpg_fast.features import Completions
from fdpg_fast.imports import import_object
from fdpg_fast.measure.estimators import Estimate, log_partition, mean
from fdpg_fast.measure.evaluate import evaluate
from fdpg_fast.session import Session


def run_case(settings: dict[str, Any], seed: int, folder: Path) -> Row:
    """Train by `method`, and measure what comes out.

    Args:
        settings: a `TrainConfig` without run_dir, and
            method: f-DPG, GRPO, rejection, or base, which trains nothing;
            forms: import path of a function that names the derivation of each completion, None where it is wrong;
            base_samples: completions of the base a problem, for Z.
        seed: trainer.seed.
    """
    settings = copy.deepcopy(settings)
    method, forms, base_samples = (settings.pop(key) for key in ("method", "forms", "base_samples"))
    settings["trainer"] = {**settings["trainer"], "seed": seed}
    config, model = parse_config({**settings, "run_dir": str(folder / "run")}), folder / "model"
    if method == "f-DPG":
        Trainer(config, resume=(folder / "run" / "config.yaml").exists()).train(evaluate=False)
    elif method != "base":
        trainer = {"GRPO": grpo, "rejection": rejection}[method](config)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.save_model(str(model))
        AutoTokenizer.from_pretrained(config.model).save_pretrained(model)  # TRL has changed its own
        config = config.model_copy(update={"model": str(model), "base": BaseConfig(model=config.model)})
    metrics = measure(config, import_object(forms), base_samples, folder.parent)
    shutil.rmtree(folder, ignore_errors=True)  # a sweep of a hundred would fill the disk; the row is what is kept
    return Row({}, seed, metrics)


def measure(config: TrainConfig, forms: Any, base_samples: int, folder: Path) -> dict[str, Estimate]:
    """An evaluation by the Z of the base's sample in `folder`, and how many ways to solve a problem are found."""
    session, clock = Session(config, resume=True), Clock()
    with contextlib.closing(session):
        if session.checkpoint is not None:
            session.restore()
        target, samples = session.scorer.target, config.evaluation.samples_per_context
        base = frozen_base_sample(session, base_samples, 1, folder)
        log_phi = target.log_phi(session.scorer.read(base, clock, is_of_base=True).values)
        log_z = log_partition(torch.zeros_like(log_phi), log_phi, base.context_index)
        rollouts = session.sample(session.eval_contexts, samples, session.seed("fresh evaluation", 1))
        scores = session.scorer(rollouts, clock)
    metrics = evaluate(rollouts, scores, target, session.divergence, log_z).metrics
    named = forms(**scores.texts.arguments(forms))
    found = set(zip(rollouts.context_index.tolist(), named, strict=True))
    owners = torch.tensor([context for context, form in found if form is not None], dtype=torch.long)
    different = owners.bincount(minlength=len(session.eval_contexts)).double()
    return metrics | {"different correct derivations": mean(different, torch.arange(len(different)))}


def options(config: TrainConfig) -> dict[str, Any]:
    """What both trainers of TRL are told; all else is their default."""
    return {
        "output_dir": f"{config.run_dir}-trl",
        "seed": config.trainer.seed,
        "max_steps": config.trainer.rounds,
        "learning_rate": config.optimizer.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": config.optimizer.warmup_rounds,
        **{"save_strategy": "no", "logging_strategy": "no", "report_to": [], "disable_tqdm": True},
        **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False},
    }


def grpo(config: TrainConfig) -> GRPOTrainer:
    """GRPO with the feature as its reward: as many problems and samples a step as a round has."""
    feature, tokenizer = config.target[0].feature.build("cpu"), AutoTokenizer.from_pretrained(config.model)
    data = Dataset.from_json(config.contexts.train)

    def reward(
        prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any
    ) -> list[float]:
        finished = [ids[-1:] == [tokenizer.eos_token_id] for ids in completion_ids]
        own = {name: columns[name] for name in data.column_names if name != "prompt"}
        ids = [tokens[:-1] if done else tokens for tokens, done in zip(completion_ids, finished, strict=True)]
        return feature(Completions(completions, prompts, ids, finished, own)).tolist()

    settings = config.trainer
    arguments = GRPOConfig(
        **options(config),
        per_device_train_batch_size=settings.contexts_per_round * settings.samples_per_context,
        num_generations=settings.samples_per_context,
        max_completion_length=config.engine.max_new_tokens,
    )
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype="float32")
    return GRPOTrainer(model, reward, arguments, data, processing_class=tokenizer)


def rejection(config: TrainConfig) -> SFTTrainer:
    """Fine-tuning on the correct ones among as many samples of the base as all rounds have; each is seen once."""
    rows: list[dict[str, str]] = []
    with contextlib.closing(Session(config)) as session:
        for index in range(config.trainer.rounds):
            rollouts = session.sample(
                session.round_contexts(index), config.trainer.samples_per_context, session.seed("rollouts", index)
            )
            reading = session.scorer.read(rollouts, Clock(), is_of_base=True)
            pairs = zip(reading.texts.prompts, reading.texts.completions, reading.values[:, 0].tolist(), strict=True)
            rows += [{"prompt": prompt, "completion": text} for prompt, text, value in pairs if value == 1]
    arguments = SFTConfig(**options(config), per_device_train_batch_size=-(-len(rows) // config.trainer.rounds))
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    return SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
