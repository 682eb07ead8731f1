"""What is timed on the GPU: shapes, their inputs and float64 answers, and one step of a method.

A case is a packed batch with realistic logits (standard deviation 4, tokens sampled from the softmax itself). Every
method maps (hidden, weight, target_ids) to token log-probs [N]; its objective is Σ g·log π with the g of each
sequence's f-DPG weight, so that the log-prob ops and the fused loss have one and the same exact gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

LOGIT_STD = 4.0
CHECKED = 256  # rows of the hidden gradient, and of the weight gradient, compared with float64
BLOCK_ROWS = 256  # of [rows, V] in float64 at a time
MODES = {"loss trained": 6, "trained": 6, "forward": 2, "loss frozen": 4, "frozen": 4}  # useful FLOPs / (N·D·V)
# bfloat16 logits of ±20 cost 0.06 nats and a bfloat16 result as much again; a wrong kernel is off by far more
LIMITS = {"logprob": 0.2, "hidden_grad": 0.05, "weight_grad": 0.05}
OURS_OVER_EAGER = 2.0  # nor may our errors exceed this many times those of PyTorch's bfloat16 path


@dataclass(frozen=True)
class Shape:
    name: str
    tokens: int
    width: int
    vocabulary: int
    lengths: tuple[int, int] = (128, 384)  # of sequences, drawn between these

    @property
    def ndv(self) -> float:
        return float(self.tokens) * self.width * self.vocabulary

    @property
    def warm(self) -> Shape:
        """A small one that Triton compiles the same kernels for: rows and vocabulary leave the same remainders."""
        rows, columns = WARM_ROWS + self.tokens % 16, WARM_COLUMNS + self.vocabulary % 512
        return replace(self, tokens=rows, vocabulary=columns, lengths=(8, 24))

    @property
    def title(self) -> str:
        return f"{self.name}: N={self.tokens:,} D={self.width:,} V={self.vocabulary:,}"


SHAPES = (  # the most telling first: the time budget cuts from the end
    Shape("Llama-3.2-1B", 8192, 2048, 128256),
    Shape("SmolLM2-135M", 16384, 576, 49152),
    Shape("Llama-3-8B", 8192, 4096, 128256),
    Shape("Qwen3-0.6B", 16384, 1024, 151936),
    Shape("Qwen3-1.7B, long", 8192, 2048, 151936, (8192, 8193)),
    Shape("Gemma-class", 4096, 3584, 262144),
    Shape("odd", 8200, 1000, 50257),
)
BREAKDOWN = (SHAPES[1], SHAPES[0], SHAPES[2])
WARM_ROWS, WARM_COLUMNS = 48, 256  # enough to compile with
SMOKE_SHAPES = (Shape("tiny", 512, 64, 1024), Shape("tiny odd", 392, 40, 509))
SMOKE_BREAKDOWN = (Shape("tiny", 32, 32, 64, (8, 24)),)  # small enough for Triton's interpreter


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


@lru_cache(maxsize=1)
def make_case(shape: Shape, device: str) -> Case:
    rng = torch.Generator(device).manual_seed(0)
    randn = partial(torch.randn, generator=rng, device=device)
    hidden = randn(shape.tokens, shape.width, dtype=torch.bfloat16)
    weight = (randn(shape.vocabulary, shape.width) * (LOGIT_STD * shape.width**-0.5)).bfloat16()
    ends = [0]
    lengths = torch.randint(*shape.lengths, (shape.tokens,), generator=torch.Generator().manual_seed(0))
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


@lru_cache(maxsize=1)
def probabilities(shape: Shape, device: str) -> Tensor:
    """The softmax in bfloat16, [N, V]: what the second and third product of every method multiply by."""
    case = make_case(shape, device)
    values = torch.empty(shape.tokens, shape.vocabulary, dtype=torch.bfloat16, device=device)
    for rows, into in zip(case.hidden.split(BLOCK_ROWS), values.split(BLOCK_ROWS), strict=True):
        into.copy_(torch.mm(rows, case.weight.T).float().softmax(1))
    return values


def bare_gemms(case: Case, mode: str, values: Tensor | None = None) -> None:
    """The matrix products that no method can do without, and nothing else; without values logits are multiplied."""
    logits = torch.mm(case.hidden, case.weight.T)
    values = logits if values is None else values
    if mode != "forward":
        torch.mm(values, case.weight)
    if mode.endswith("trained"):
        torch.mm(values.T, case.hidden)


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
    # a loss in plain PyTorch sits on log-probs that are checked; what their rounding does to exp(Σ) is only shown
    return {"logprob": LIMITS["logprob"]} if mode.startswith("loss") else LIMITS
