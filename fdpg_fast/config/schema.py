"""What a run is made of, as frozen models; every key is documented here and nowhere else.

Paths are relative to the working directory.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from ..chats import ContextsConfig
from ..divergence import last_divergence
from .engine import EngineConfig
from .section import Count, Section, UserPath
from .terms import DistributionalTerm, ImportedTarget, PointwiseTerm, TermConfig

MAX_SAMPLES = 10**5  # of a context: more of them, and a round would not end


class PartitionConfig(Section):
    kind: Literal["running", "batch", "oracle"] = "running"
    """Z from all samples so far, from the round's own, or from one frozen sample of the base model, 64 a context."""
    per_context: bool = True
    """One Z for each context; false: one for all."""


class LossConfig(Section):
    baseline: Literal["leave_one_out", "running", "none"] = "leave_one_out"
    """Subtracted from the pseudo-reward: the mean of the context's other samples, of all earlier ones, or nothing."""
    ratio: Literal["sequence", "none"] = "sequence"
    """Importance ratio policy/sampler of the whole sequence, which makes off-policy samples exact, or 1."""
    ratio_cap: float | None = Field(default=None, gt=0)
    """Upper limit of the ratio; how often it bites is reported."""
    ratio_drop: float | None = Field(default=None, gt=1)
    """Sequences of larger ratio get weight 0; how many is reported. Above ratio_cap, which still limits the others."""
    reward_cap: float | None = Field(default=None, gt=0)
    """Limit of |pseudo-reward|; how often it bites is reported."""


class OptimizerConfig(Section):
    kind: Literal["adamw", "adamw_per_tensor"] = "adamw"
    """adamw_per_tensor: one second moment a tensor, its gradient's mean square, where AdamW has one a coordinate."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up: stay, or fall to 0 at the last round."""
    warmup_rounds: int = Field(default=0, ge=0, le=10**9)
    """Rounds over which the learning rate rises linearly from 0."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients of larger norm are scaled down to it."""


class ProposalConfig(Section):
    kind: Literal["policy", "adaptive"] = "policy"
    """What is sampled from: the policy, or older weights of it until the policy is nearer to the target."""
    every: Count = 10
    """adaptive: rounds from one estimate of KL(p‖q) − KL(p‖π) to the next; the policy is taken where it is positive."""


class LoRAConfig(Section):
    rank: Count
    """Of the trained matrices B·A that are added to each adapted layer; everything else stays frozen."""
    alpha: float | None = Field(default=None, gt=0)
    """B·A counts alpha/rank times, as in peft; left out, once."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Names of the linear layers to adapt, such as [q_proj, v_proj]; all-linear: all but the head."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if value != "all-linear" and not (isinstance(value, list) and value and all(isinstance(n, str) for n in value)):
            raise ValueError("write all-linear, or a list of names such as [q_proj, v_proj]")
        return value


class BaseConfig(Section):
    model: UserPath | None = None
    """Folder or hub name of the target's base, also as `base: NAME`, of the same tokenizer; left out: as `model`."""
    refresh_every: Count | None = None
    """k: after every k rounds the base becomes the policy as it is then, and Z begins anew; left out: never."""


class RoundsConfig(Section):
    rounds: Count = 100
    """How many times to sample, score, update and sync."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of everything random; equal seeds give equal runs on the CPU."""
    contexts_per_round: Count = 16
    """Contexts sampled from in a round (fewer where the data set is smaller)."""
    samples_per_context: int = Field(default=16, ge=1, le=MAX_SAMPLES)
    """Completions of each."""
    updates_per_round: Count = 1
    """n: steps a round, each on an n-th of contexts or samples, until the ratios of one have an ESS below half."""
    pipeline_depth: int = Field(default=0, ge=0, le=1000)
    """n: sample n rounds ahead, while the learner trains, with weights n rounds old (the ratio keeps it exact)."""
    micro_batch_tokens: Count | None = None
    """Tokens in a forward and backward pass: bounds memory, changes nothing else; by the model if left out: 448 up."""
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    """on: blocks keep only their input and run again for gradients; auto: where the rest would outweigh the weights."""
    reshard_after_forward: bool = True
    """torchrun: false: a block stays whole until its backward pass, so that less is sent; takes memory of a model."""
    checkpoint_every: Count = 50
    """Rounds between checkpoints; the last round always writes one."""

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:  # which YAML takes for true or false
        return ("off", "on")[value] if isinstance(value, bool) else value


def _directed(metric: str) -> str:
    if re.fullmatch(r"(max|min) \S.*", metric) is None:
        raise ValueError("write max NAME or min NAME: a metric of evaluations, and which way is better")
    return metric


Metric = Annotated[str, AfterValidator(_directed)]


class CheckpointConfig(Section):
    best: Metric | None = None
    """max NAME or min NAME, such as max feature/safe: the checkpoint that evaluates best stays beside the newest."""
    keep_best: Count = 1
    """How many of the best stay."""


class EarlyStopConfig(Section):
    metric: Metric
    """max NAME or min NAME: the run ends once this metric of its evaluations has stopped getting better."""
    patience: Count
    """After so many evaluations in a row that are no better than the best one before."""


class EvaluationConfig(Section):
    every: Count | None = None
    """k: evaluate after every k rounds; left out: before the first round and after the last one only."""
    contexts: Count = 64
    """Contexts to evaluate on, the first ones of the file."""
    samples_per_context: int = Field(default=32, ge=2, le=MAX_SAMPLES)
    """Completions of each; Z and divergences come from this one sample: few a context bias them to 0, which ? marks."""
    base_samples: int = Field(default=64, ge=0, le=MAX_SAMPLES)
    """Completions of the base for each, drawn once, of which a hard constraint leaves exact samples of p; 0: none."""


class TrainConfig(Section):
    """A run."""

    model: UserPath
    """Folder or hub name of the causal LM to align; its frozen copy is the target's base, unless base has another."""
    base: BaseConfig = BaseConfig()
    divergence: UserPath = "jensen_shannon"
    """D_f to minimise: forward_kl, …, alpha:0.5, a path alpha:0.2..0.9 over the rounds, or your own, file.py:name."""
    run_dir: UserPath
    """Folder of this run; made new, or continued with --resume."""
    target: list[TermConfig] = Field(min_length=1)
    """φ as a product of terms; the target is base·φ."""
    target_fit_samples: int = Field(default=2048, ge=50, le=10 * MAX_SAMPLES)
    """Samples of the base from which λ of distributional terms is fitted; half as many more check it."""
    keep_special_tokens: bool = False
    """Leave special tokens in the texts that features and samples.jsonl get, all but BOS, EOS and padding."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of policy and base model."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU where there is one."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model's repository."""
    contexts: ContextsConfig = ContextsConfig()
    engine: EngineConfig = EngineConfig()
    partition: PartitionConfig = PartitionConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    proposal: ProposalConfig = ProposalConfig()
    lora: LoRAConfig | None = None
    trainer: RoundsConfig = RoundsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    early_stop: EarlyStopConfig | None = None
    tracking: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Where metrics go besides metrics.jsonl."""

    @property
    def starts_from_base(self) -> bool:
        """Whether training starts from the target's base, so that the first samples of the policy are samples of it."""
        return self.base.model in (None, self.model)

    @field_validator("base", mode="before")
    @classmethod
    def _short_form(cls, base: Any) -> Any:
        return {"model": base} if base is None or isinstance(base, str) else base

    @field_validator("divergence")
    @classmethod
    def _known_divergence(cls, name: str) -> str:
        last_divergence(name)
        return name

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.loss.baseline == "leave_one_out" and self.trainer.samples_per_context == 1:
            raise ValueError("loss.baseline leave_one_out needs trainer.samples_per_context ≥ 2; use running or none")
        if self.partition == PartitionConfig(kind="batch") and self.trainer.samples_per_context == 1:
            raise ValueError(
                "partition.kind batch needs trainer.samples_per_context ≥ 2, or nothing is learned: by a Z of its own, "
                "every sample is as likely as the target has it; use running, oracle or per_context: false"
            )
        if self.base.refresh_every and self.partition.kind == "oracle":
            raise ValueError("partition.kind: oracle has Z of the first base; with base.refresh_every use running")
        if self.base.refresh_every and self.proposal.kind == "adaptive":
            raise ValueError("proposal.kind: adaptive waits for one target; leave base.refresh_every out")
        cap, drop = self.loss.ratio_cap, self.loss.ratio_drop
        if cap is not None and drop is not None and drop <= cap:
            raise ValueError(f"loss.ratio_drop: {drop:g} leaves loss.ratio_cap: {cap:g} nothing to cap; make it larger")
        if self.proposal.kind == "adaptive" and self.trainer.pipeline_depth:
            raise ValueError(
                "proposal.kind: adaptive decides itself how old its weights are; set trainer.pipeline_depth: 0"
            )
        engine, is_served = self.engine, self.engine.kind == "vllm_server"
        is_fitted = any(isinstance(term, (DistributionalTerm, ImportedTarget)) for term in self.target)
        has_exact_samples = all(isinstance(term, (PointwiseTerm, ImportedTarget)) for term in self.target)
        has_exact_samples &= self.starts_from_base and not self.base.refresh_every
        for section, keys, has_effect, beside in (
            ("engine", ("urls", "weight_transfer", "request_timeout"), is_served, "engine.kind: vllm_server"),
            ("engine", ("tensor_parallel",), engine.kind in ("auto", "vllm"), "engine.kind: vllm"),
            ("engine", ("weights_dir",), engine.weight_transfer == "disk", "engine.weight_transfer: disk"),
            ("engine", ("max_sequences",), not is_served, "an engine.kind that is not a server with limits of its own"),
            ("proposal", ("every",), self.proposal.kind == "adaptive", "proposal.kind: adaptive"),
            ("loss", ("ratio_cap", "ratio_drop"), self.loss.ratio == "sequence", "loss.ratio: sequence"),
            ("evaluation", ("base_samples",), has_exact_samples, "pointwise terms alone, and a base that is model"),
            ("", ("target_fit_samples",), is_fitted, "a distributional target"),
            ("checkpoint", ("keep_best",), self.checkpoint.best is not None, "checkpoint.best"),
            ("checkpoint", ("best",), self.evaluation.every is not None, "evaluation.every"),
        ):
            settings = getattr(self, section) if section else self
            for key in keys:
                if not has_effect and getattr(settings, key) != type(settings).model_fields[key].default:
                    name = f"{section}.{key}".lstrip(".")
                    raise ValueError(f"{name}: {getattr(settings, key)} has an effect only with {beside}; leave it out")
        if self.early_stop is not None and self.evaluation.every is None:
            raise ValueError("early_stop needs evaluation.every: evaluations between the rounds are what it goes by")
        if is_served and (not engine.urls or (engine.weight_transfer == "disk" and engine.weights_dir is None)):
            raise ValueError("engine.kind: vllm_server needs engine.urls, and weight_transfer: disk engine.weights_dir")
        return self


# what a resumed run may change without becoming another run
RESUMABLE = (
    *("trainer.rounds", "trainer.checkpoint_every", "trainer.activation_checkpointing", "tracking", "device"),
    *("evaluation.every", "checkpoint.best", "checkpoint.keep_best"),
    *("early_stop", "early_stop.metric", "early_stop.patience"),
    "trainer.reshard_after_forward",
    *(f"engine.{key}" for key in EngineConfig.model_fields if key != "max_new_tokens"),
)
