"""REINFORCE with a KL penalty, in plain PyTorch: what minimising the reverse KL to a·exp(r/β) is compared with.

RLHF maximises E[r] − β·KL(π‖a), whose gradient is E[(R − b)·∇ log π] with R = r − β·log(π/a). That is −β times the
gradient of KL(π‖p) for p ∝ a·exp(r/β). Here R, b, the loss and the step are written down without any of fdpg-fast's
losses, weights or learner; sampler, reward and evaluation are shared, so that equal seeds draw equal texts.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fdpg_fast import Trainer
from fdpg_fast.config.load import parse_config
from fdpg_fast.config.schema import TrainConfig
from fdpg_fast.config.terms import RLHFTerm
from fdpg_fast.contexts import Prompting, load_contexts
from fdpg_fast.engines import TransformersEngine
from fdpg_fast.errors import UserError
from fdpg_fast.experiments.rows import Row
from fdpg_fast.features import Completions
from fdpg_fast.learner import BETAS
from fdpg_fast.measure.estimators import Estimate, mean
from fdpg_fast.measure.evaluate import evaluate
from fdpg_fast.models.generation import eos_token_ids
from fdpg_fast.models.load import load_model, load_tokenizer
from fdpg_fast.rollouts import Rollouts
from fdpg_fast.runs.folder import read_run
from fdpg_fast.scoring import Scores
from fdpg_fast.seeds import derived_seed, schedule
from fdpg_fast.targets import rlhf

ROWS = 16  # sequences a forward pass


def run_case(settings: dict[str, Any], seed: int, folder: Path) -> Row:
    """A run of `settings`, those of Trainer and `algorithm`: reinforce, or reverse_kl as fdpg-fast minimises it."""
    settings = copy.deepcopy(settings)
    algorithm = settings.pop("algorithm", None)
    settings.pop("base_samples", None)  # a budget's, for the other study: no Z is needed here
    settings |= {"run_dir": str(folder / "run"), "divergence": "reverse_kl"}
    settings["trainer"] = {**settings.get("trainer", {}), "seed": seed}
    config = parse_config(settings)
    if algorithm == "reinforce":
        curve, metrics = reinforce(config)
    elif algorithm == "reverse_kl":
        metrics = Trainer(config).train().after.metrics
        rows = read_run(config.run_dir).metrics
        curve = [{key: row[key] for key in ("round", *curve_keys(rows[0]))} for row in rows]
    else:
        raise UserError(f"algorithm: {algorithm!r}: choose reinforce or reverse_kl")
    return Row({}, seed, metrics, curve)


def curve_keys(row: dict[str, Any]) -> list[str]:
    """The metrics of a round that both algorithms have: E[r] and KL(π‖a)."""
    own = ("target/in_support", "target/ess", "target/pareto_k")
    rewards = [key for key in row if key.startswith("target/") and not key.endswith("_se") and key not in own]
    return [*rewards, "policy/kl_to_base"]


def reinforce(config: TrainConfig) -> tuple[list[dict[str, float]], dict[str, Estimate]]:
    """Train; E[r] and KL(π‖a) of every round before its step, and the evaluation of what comes out."""
    (term,) = config.target
    if not isinstance(term, RLHFTerm) or config.optimizer.schedule != "constant" or config.loss.reward_cap:
        raise UserError("reinforce: wants one target of kind rlhf, a constant schedule and no reward_cap")
    reward, beta = term.feature.build("cpu"), term.beta
    tokenizer = load_tokenizer(config.model, trust_remote_code=False)
    policy, base = (load_model(config.model, "float32", "cpu", trust_remote_code=False) for _ in range(2))
    room = policy.max_length - config.engine.max_new_tokens
    prompting = Prompting(tokenizer, room, len(tokenizer))
    contexts = load_contexts(config.contexts.train, prompting)
    engine = TransformersEngine(
        policy,
        eos_token_ids(policy.model, tokenizer),
        max_new_tokens=config.engine.max_new_tokens,
        max_sequences=config.engine.max_sequences,
    )
    adam = config.optimizer
    optimizer = torch.optim.AdamW(
        policy.model.parameters(), lr=adam.learning_rate, betas=BETAS, weight_decay=adam.weight_decay
    )
    each, curve = config.trainer.samples_per_context, []
    for round_index in range(config.trainer.rounds):
        chosen = schedule(
            len(contexts), min(config.trainer.contexts_per_round, len(contexts)), round_index, config.trainer.seed
        )
        rollouts = engine.sample(
            [contexts[i] for i in chosen], each, derived_seed(config.trainer.seed, "rollouts", round_index)
        )
        context_index = rollouts.context_index
        r = reward(Completions.decode(rollouts, tokenizer))
        log_a, log_pi = (sequence_logprobs(model.model, rollouts) for model in (base, policy))
        penalised = (r - beta * (log_pi - log_a)).view(-1, each)  # [C, n]
        others = (penalised.sum(1, keepdim=True) - penalised) / (each - 1)
        advantage = (penalised - others).flatten()
        optimizer.zero_grad()
        for rows in batches(rollouts):
            log_pi_part = sequence_logprob(policy.model, rollouts, rows)
            # over β: AdamW does not see the scale of a loss, but clipping does
            (-(advantage[rows] / beta * log_pi_part).sum() / len(rollouts)).backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), adam.max_grad_norm)
        rate = min(1.0, (round_index + 1) / (adam.warmup_rounds + 1)) * adam.learning_rate
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        reached, kl = (mean(values, context_index).value for values in (r, log_pi - log_a))
        curve.append({"round": float(round_index), f"target/{reward.name}": reached, "policy/kl_to_base": kl})

    tested = contexts if config.contexts.eval is None else load_contexts(config.contexts.eval, prompting)
    settings = config.evaluation
    rollouts = engine.sample(
        tested[: settings.contexts], settings.samples_per_context, derived_seed(config.trainer.seed, "evaluation", 0)
    )
    texts = Completions.decode(rollouts, tokenizer)
    r = reward(texts)
    log_a, log_pi = (sequence_logprobs(model.model, rollouts) for model in (base, policy))
    scores = Scores(texts, r[:, None], log_pi, log_a, log_a + r / beta)
    return curve, evaluate(rollouts, scores, rlhf(reward, beta), "reverse_kl").metrics


def batches(rollouts: Rollouts) -> list[slice]:
    return [slice(first, min(first + ROWS, len(rollouts))) for first in range(0, len(rollouts), ROWS)]


@torch.no_grad()
def sequence_logprobs(model: torch.nn.Module, rollouts: Rollouts) -> Tensor:
    """log π of all completions, [B] float64."""
    return torch.cat([sequence_logprob(model, rollouts, rows) for rows in batches(rollouts)])


def sequence_logprob(model: torch.nn.Module, rollouts: Rollouts, rows: slice) -> Tensor:
    """log π of some completions, [b] float64: padded to the right, all logits at once."""
    part = rollouts.part(rows)
    prompts = [torch.tensor(part.contexts[i].token_ids) for i in part.context_index.tolist()]
    completions = part.token_ids.split(part.lengths.tolist())
    ids = pad_sequence([torch.cat(pair) for pair in zip(prompts, completions, strict=True)], batch_first=True)
    first = torch.tensor([len(prompt) for prompt in prompts])[:, None]
    place = torch.arange(ids.shape[1])
    end = first + part.lengths[:, None]
    logits = model(input_ids=ids, attention_mask=(place < end).long(), use_cache=False).logits[:, :-1]
    logprob = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0].double()
    return logprob.where((place[1:] >= first) & (place[1:] < end), 0.0).sum(1)
