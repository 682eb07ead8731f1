"""What is timed on the GPU: shapes, their inputs and float64 answers, and one step of a method.

A case is a packed batch with realistic logits (standard deviation 4, tokens sampled from the softmax itself). Every
method maps (hidden, weight, target_ids) to token log-probs [N]; its objective is Σ g·log π with the g of each
sequence's f-DPG weight, so that the log-prob ops and the fused loss have one and the same exact gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

LOGIT_STD = 4.0
SEQUENCE_TOKENS = (128, 384)  # lengths are drawn between these
CHECKED = 256  # rows of the hidden gradient, and of the weight gradient, compared with float64
BLOCK_ROWS = 256  # of [rows, V] in float64 at a time
MODES = {"forward": 2, "trained": 6, "frozen": 4, "loss trained": 6, "loss frozen": 4}  # useful FLOPs / (N·D·V)
# bfloat16 logits of ±20 cost 0.06 nats and a bfloat16 result as much again; a wrong kernel is off by far more
LIMITS = {"logprob": 0.2, "hidden_grad": 0.05, "weight_grad": 0.05}
OURS_OVER_EAGER = 2.0  # nor may our errors exceed this many times those of PyTorch's bfloat16 path


@dataclass(frozen=True)
class Shape:
    name: str
    tokens: int
    width: int
    vocabulary: int

    @property
    def ndv(self) -> float:
        return float(self.tokens) * self.width * self.vocabulary


SHAPES = (  # the most telling first: the time budget cuts from the end
    Shape("SmolLM2-135M", 16384, 576, 49152),
    Shape("Llama-3-8B", 8192, 4096, 128256),
    Shape("Qwen3-0.6B", 16384, 1024, 151936),
    Shape("Gemma-class", 4096, 3584, 262144),
    Shape("odd", 8200, 1000, 50257),
    Shape("Qwen3-8B", 8192, 4096, 151936),
    Shape("SmolLM2-135M", 32768, 576, 49152),
    Shape("Qwen3-0.6B", 32768, 1024, 151936),
)
SMOKE_SHAPES = (Shape("tiny", 512, 64, 1024), Shape("tiny odd", 392, 40, 509))


class Gradients(NamedTuple):
    """Of the objective in float64: the checked rows of the hidden gradient and of the weight gradient, [R, D]."""

    hidden: Tensor
    weight: Tensor


class Outputs(NamedTuple):
    logprob: Tensor | None = None  # [N], or [] where an API only gives the sum
    hidden_grad: Tensor | None = None  # [N, D]
    weight_grad: Tensor | None = None  # [V, D]


@dataclass(frozen=True)
class Case:
    """Inputs of one shape with their exact log-probs and gradients; B sequences packed into N rows."""

    shape: Shape
    hidden: Tensor  # [N, D] bfloat16
    weight: Tensor  # [V, D] bfloat16
    target_ids: Tensor  # [N]
    cu_seqlens: Tensor  # [B+1] int32, on the CPU: on the GPU `fdpg_loss` would wait for it
    owner: Tensor  # sequence of each row, [N]
    behavior: Tensor  # log q of each token, [N] float32
    score: Tensor  # log P of each sequence, [B] float32
    logprob: Tensor  # exact, [N] float64
    row_gradient: Tensor  # g: d loss / d log π of each token, [N] float32
    rows: Tensor  # the checked ones of the hidden gradient
    columns: Tensor  # the checked rows of the weight gradient
    exact: Gradients  # of Σ g·log π
    exact_sum: Gradients  # of Σ log π, for APIs without per-token weights


@dataclass(frozen=True)
class Method:
    """One way to log-probs, and to the f-DPG loss: its own fused one, or plain PyTorch on top of the log-probs."""

    name: str
    logprob: Callable[[Tensor, Tensor, Tensor], Tensor]
    loss: Callable[[Tensor, Tensor, Case], Tensor] | None = None
    per_token: bool = True
    ours: bool = False


def jensen_shannon_loss(token_logprob: Tensor, owner: Tensor, behavior: Tensor, score: Tensor) -> Tensor:
    """−mean of (π/q)·(−f'(π/p))·log π in plain PyTorch, with log Z = 0."""
    sums = token_logprob.new_zeros(len(score))
    log_pi = sums.index_add(0, owner, token_logprob)
    ratio = (log_pi.detach() - sums.index_add(0, owner, behavior)).exp()
    reward = torch.nn.functional.softplus(score - log_pi.detach()) - math.log(2)
    return -(ratio * reward * log_pi).mean()


def make_case(shape: Shape, device: torch.device) -> Case:
    rng = torch.Generator(device).manual_seed(0)
    randn = partial(torch.randn, generator=rng, device=device)
    hidden = randn(shape.tokens, shape.width, dtype=torch.bfloat16)
    weight = (randn(shape.vocabulary, shape.width) * (LOGIT_STD * shape.width**-0.5)).bfloat16()
    ends = [0]
    lengths = torch.randint(*SEQUENCE_TOKENS, (shape.tokens,), generator=torch.Generator().manual_seed(0))
    while ends[-1] < shape.tokens:
        ends.append(min(ends[-1] + int(lengths[len(ends)]), shape.tokens))
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    owner = torch.repeat_interleave(torch.arange(len(ends) - 1), cu_seqlens.diff().long()).to(device)

    exact_weight = weight.double()
    target_ids, logprob, total = [], [], []
    for block in hidden.split(BLOCK_ROWS):
        logits = block.double() @ exact_weight.T
        noise = torch.empty_like(logits).exponential_(generator=rng)
        target_ids.append((logits - noise.log_()).argmax(1))
        total.append(logits.logsumexp(1))
        logprob.append(logits.gather(1, target_ids[-1][:, None])[:, 0] - total[-1])
    target_ids, logprob, total = torch.cat(target_ids), torch.cat(logprob), torch.cat(total)

    behavior = logprob + 0.02 * randn(shape.tokens, dtype=torch.float64)
    log_pi = logprob.new_zeros(len(ends) - 1).index_add(0, owner, logprob)
    score = log_pi + randn(len(log_pi), dtype=torch.float64)
    leaf = logprob.clone().requires_grad_()
    (row_gradient,) = torch.autograd.grad(jensen_shannon_loss(leaf, owner, behavior, score), leaf)
    rows = torch.linspace(0, shape.tokens - 1, min(CHECKED, shape.tokens), device=device).long()
    spread = torch.linspace(0, shape.vocabulary - 1, CHECKED // 2, device=device).long()
    columns = torch.cat([spread, target_ids[rows][::2]]).unique()  # half of them are targets, the ends are in

    def exact(gradient: Tensor) -> Gradients:
        softmax = (hidden[rows].double() @ exact_weight.T - total[rows, None]).exp_()
        hidden_grad = gradient[rows, None] * (exact_weight[target_ids[rows]] - softmax @ exact_weight)
        picked = (hidden.double() @ exact_weight[columns].T - total[:, None]).exp_()  # [N, R]
        logit_grad = gradient[:, None] * ((target_ids[:, None] == columns).double() - picked)
        return Gradients(hidden_grad, logit_grad.T @ hidden.double())

    return Case(
        shape, hidden, weight, target_ids, cu_seqlens, owner, behavior.float(), score.float(), logprob,
        row_gradient.float(), rows, columns, exact(row_gradient), exact(torch.ones_like(row_gradient)),
    )  # fmt: skip


def run(case: Case, method: Method, mode: str) -> Outputs:
    """One step of a method: what a training step would do with the head trained or frozen."""
    if mode == "forward":
        with torch.no_grad():
            return Outputs(method.logprob(case.hidden, case.weight, case.target_ids))
    hidden, weight = case.hidden.detach().requires_grad_(), case.weight.detach()
    leaves = (hidden, weight.requires_grad_()) if mode.endswith("trained") else (hidden,)
    logprob = None
    if mode.startswith("loss") and method.loss is not None:
        objective = method.loss(hidden, weight, case)
    else:
        logprob = method.logprob(hidden, weight, case.target_ids)
        if mode.startswith("loss"):
            objective = jensen_shannon_loss(logprob.float(), case.owner, case.behavior, case.score)
        else:
            objective = (case.row_gradient * logprob).sum() if method.per_token else logprob
    gradients = torch.autograd.grad(objective, leaves)
    return Outputs(None if logprob is None else logprob.detach(), *gradients)


def bare_gemms(case: Case, mode: str) -> None:
    """The matrix products that no method can do without, and nothing else."""
    logits = torch.mm(case.hidden, case.weight.T)
    if mode != "forward":
        torch.mm(logits, case.weight)
    if mode.endswith("trained"):
        torch.mm(logits.T, case.hidden)


def errors(case: Case, method: Method, outputs: Outputs) -> dict[str, float]:
    """Against float64: largest |error| of a log-prob (of the mean for sums), relative errors of both gradients."""
    exact, found = case.exact if method.per_token else case.exact_sum, {}
    if outputs.logprob is not None and method.per_token:
        if outputs.logprob.shape != case.logprob.shape:
            raise ValueError(f"log-probs of shape {tuple(outputs.logprob.shape)}, not {tuple(case.logprob.shape)}")
        found["logprob"] = float((outputs.logprob - case.logprob).abs().max())
    elif outputs.logprob is not None:
        found["logprob"] = abs(float(outputs.logprob) - float(case.logprob.sum())) / len(case.logprob)
    if outputs.hidden_grad is not None:
        found["hidden_grad"] = _relative(outputs.hidden_grad[case.rows], exact.hidden)
    if outputs.weight_grad is not None:
        found["weight_grad"] = _relative(outputs.weight_grad[case.columns], exact.weight)
    return found


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def limits(method: Method, mode: str, eager: dict[str, float | None]) -> dict[str, float]:
    if method.ours:
        return {key: min(limit, OURS_OVER_EAGER * (eager.get(key) or math.inf)) for key, limit in LIMITS.items()}
    # a loss in plain PyTorch sits on log-probs checked already; what their rounding does to exp(Σ) is only shown
    return {} if mode.startswith("loss") else LIMITS
