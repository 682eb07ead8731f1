"""Language models small enough to enumerate every text: log π, Z, p, D_f and ∇D_f exactly, in float64.

Tokens are 0 … vocab−1; 0 is EOS. A text ends with its EOS, or is cut off at max_length tokens. Every policy is
hidden states of all prefixes times a head, so that the same numbers go through fdpg_loss. Nothing here uses
fdpg_kernels except `packed_loss`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fdpg_kernels import Divergence, FDPGLoss, fdpg_loss

EOS = 0
Measure = Callable[[Tensor, Tensor], Tensor]  # (π, p), each [B] → D(π, p), []


@dataclass(frozen=True)
class Bed:
    """Every text over a vocabulary, packed: B texts of T tokens in all, following P different prefixes."""

    vocab: int
    tokens: Tensor  # [T]
    prefix: Tensor  # [T], which prefix each token follows
    length: Tensor  # [B]
    prefixes: Tensor  # [P, max_length], left-aligned, first column a beginning-of-text id (= vocab)
    prefix_length: Tensor  # [P], the beginning included

    @property
    def text_index(self) -> Tensor:
        """Which text each token belongs to, [T]."""
        return torch.repeat_interleave(torch.arange(len(self.length)), self.length)

    def sum_tokens(self, values: Tensor) -> Tensor:
        """Token values [T] → their sum per text [B]."""
        return values.new_zeros(len(self.length)).index_add(0, self.text_index, values)

    def contains(self, token: int) -> Tensor:
        return self.sum_tokens((self.tokens == token).double()) > 0


def make_bed(vocab: int = 4, max_length: int = 4) -> Bed:
    index: dict[tuple[int, ...], int] = {}
    texts: list[tuple[int, ...]] = []
    frontier: list[tuple[int, ...]] = [()]
    for _ in range(max_length):
        for prefix in frontier:
            index[prefix] = len(index)
            texts.append((*prefix, EOS))
        frontier = [(*prefix, token) for prefix in frontier for token in range(1, vocab)]
    texts += frontier  # cut off: no EOS
    prefixes = torch.zeros(len(index), max_length, dtype=torch.long)
    for prefix, row in index.items():
        prefixes[row, : len(prefix) + 1] = torch.tensor([vocab, *prefix])
    return Bed(
        vocab,
        tokens=torch.tensor([token for text in texts for token in text]),
        prefix=torch.tensor([index[text[:i]] for text in texts for i in range(len(text))]),
        length=torch.tensor([len(text) for text in texts]),
        prefixes=prefixes,
        prefix_length=torch.tensor([len(prefix) + 1 for prefix in index]),
    )


def _normal(seed: int) -> Callable[..., Tensor]:
    """A source of normal numbers in float64, of any shape."""
    return functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Policy(nn.Module):
    """`hidden()` [P, D] of every prefix, `head` [V, D], and a fixed `bias` [V] that makes some tokens rare."""

    head: nn.Parameter
    bias: Tensor | None = None

    def hidden(self) -> Tensor:
        raise NotImplementedError

    def logprob(self, bed: Bed) -> tuple[Tensor, Tensor]:
        """log π of every token [T] and of every text [B]."""
        logits = self.hidden() @ self.head.T
        table = (logits if self.bias is None else logits + self.bias).log_softmax(-1)
        tokens = table[bed.prefix, bed.tokens]
        return tokens, bed.sum_tokens(tokens)

    def flat_grad(self, value: Tensor, **options: Any) -> Tensor:
        """∇value in all parameters, [parameters], or [n, parameters] of n values with is_grads_batched."""
        gradients = torch.autograd.grad(value, list(self.parameters()), **options)
        return torch.cat([g.reshape(*value.shape, -1) for g in gradients], -1)

    def scores(self, bed: Bed) -> Tensor:
        """∇log π of every text, [B, parameters]."""
        log_pi = self.logprob(bed)[1]
        unit = torch.eye(len(log_pi), dtype=log_pi.dtype)
        return self.flat_grad(log_pi, grad_outputs=unit, is_grads_batched=True)


class Tabular(Policy):
    """One hidden vector a prefix: for width ≥ vocab − 1 any distribution over texts is representable."""

    def __init__(self, bed: Bed, seed: int, *, width: int = 6, spread: float = 0.3):
        super().__init__()
        normal = _normal(seed)
        self.table = nn.Parameter(normal(len(bed.prefixes), width) * spread)
        self.head = nn.Parameter(normal(bed.vocab, width))

    def hidden(self) -> Tensor:
        return self.table


class Transformer(Policy):
    """Embedding, one causal attention and one MLP; it reads the prefix and shares its weights between them."""

    def __init__(self, bed: Bed, seed: int, *, width: int = 8):
        super().__init__()
        self.bed = bed
        normal = _normal(seed)
        self.tokens = nn.Parameter(normal(bed.vocab + 1, width))
        self.positions = nn.Parameter(normal(bed.prefixes.shape[1], width))
        self.query_key_value, self.out = nn.Parameter(normal(3 * width, width)), nn.Parameter(normal(width, width))
        self.up, self.down = nn.Parameter(normal(2 * width, width)), nn.Parameter(normal(width, 2 * width))
        self.head = nn.Parameter(normal(bed.vocab, width))

    def hidden(self) -> Tensor:
        x = self.tokens[self.bed.prefixes] + self.positions  # [P, L, D]
        scale = x.shape[-1] ** -0.5
        query, key, value = (x @ self.query_key_value.T * scale).chunk(3, -1)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + attended @ self.out.T * scale
        x = x + torch.tanh(x @ self.up.T * scale) @ self.down.T * scale
        last = x[torch.arange(len(x)), self.bed.prefix_length - 1]  # after the prefix's last token
        return nn.functional.layer_norm(last, last.shape[-1:]) * 0.3


@dataclass(frozen=True)
class ExactTarget:
    """P = a·φ over every text."""

    log_score: Tensor  # [B] log P

    @property
    def log_z(self) -> Tensor:
        return self.log_score.logsumexp(0)

    @property
    def p(self) -> Tensor:
        return (self.log_score - self.log_z).exp()


def soft_target(bed: Bed, base: Policy, beta: float = 0.7) -> ExactTarget:
    """a·exp(r/β), r = how often token 2 appears: positive on every text, Z ≈ 3."""
    reward = bed.sum_tokens((bed.tokens == 2).double())
    return ExactTarget(base.logprob(bed)[1].detach() + reward / beta)


def hard_target(bed: Bed, base: Policy) -> ExactTarget:
    """a·1[token 2 appears]: zero on about half of the texts."""
    return ExactTarget(base.logprob(bed)[1].detach().masked_fill(~bed.contains(2), -torch.inf))


def _xlogy(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a > 0, a * torch.where(a > 0, b, 1.0).log(), 0.0)


def alpha(a: float) -> Measure:
    """Amari's α-divergence, 0 < a < 1."""
    return lambda pi, p: (1 - (pi**a * p ** (1 - a)).sum()) / (a * (1 - a))


# D(π, p) as the literature writes it, not from an f; p may hold zeros
D_F: dict[str, Measure] = {
    "forward_kl": lambda pi, p: (_xlogy(p, p) - _xlogy(p, pi)).sum(),
    "reverse_kl": lambda pi, p: (pi * (pi / p).log()).sum(),
    "total_variation": lambda pi, p: (pi - p).abs().sum() / 2,
    "jensen_shannon": lambda pi, p: (_xlogy(pi, 2 * pi / (pi + p)) + _xlogy(p, 2 * p / (pi + p))).sum(),
    "pearson_chi2": lambda pi, p: ((p - pi) ** 2 / pi).sum(),
    "neyman_chi2": lambda pi, p: ((pi - p) ** 2 / p).sum(),
    "squared_hellinger": lambda pi, p: (pi + p - 2 * pi**0.5 * p**0.5).sum(),
    "alpha:0.25": alpha(0.25),
    "alpha:0.5": alpha(0.5),
    "alpha:0.75": alpha(0.75),
}


def packed_loss(
    bed: Bed,
    policy: Policy,
    picks: Tensor,
    behavior: Tensor,
    target: ExactTarget,
    divergence: str | Divergence,
    **options: Any,
) -> FDPGLoss:
    """fdpg_loss of the texts `picks` [S] (with repetitions), from a q whose token log-probs are `behavior` [T]."""
    starts = bed.length.cumsum(0) - bed.length
    length = bed.length[picks]
    cu_seqlens = nn.functional.pad(length.cumsum(0), (1, 0))
    within = torch.arange(int(cu_seqlens[-1])) - torch.repeat_interleave(cu_seqlens[:-1], length)
    rows = torch.repeat_interleave(starts[picks], length) + within  # [N] into the enumerated tokens
    options = {"divergence": divergence, "log_z": target.log_z, "bias": policy.bias} | options
    return fdpg_loss(
        policy.hidden()[bed.prefix[rows]],
        policy.head,
        bed.tokens[rows],
        cu_seqlens.int(),
        behavior[rows],
        target.log_score[picks],
        **options,
    )


def exact_gradient(bed: Bed, policy: Policy, target: ExactTarget, measure: Measure) -> Tensor:
    """∇D(π, p) by automatic differentiation of the closed form over every text, flat [parameters]."""
    return policy.flat_grad(measure(policy.logprob(bed)[1].exp(), target.p))


def uniform_sampler(bed: Bed) -> Tensor:
    """Token log-probs [T] of q = 1/B: the mean of a loss over every text once is then its expectation."""
    return (-torch.tensor(float(len(bed.length)), dtype=torch.float64).log() / bed.length)[bed.text_index]


def constant_baseline_variance(scores: Tensor, pi: Tensor, advantage: Tensor, samples: int) -> float:
    """Trace of the covariance of (1/n)·Σ (r_i − B)·∇log π(x_i) over texts drawn from π.

    Args:
        scores: ∇log π of every text, [B, parameters].
        pi, advantage: π and r − B of every text, [B].
        samples: n.
    """
    weighted = advantage[:, None] * scores
    return float(pi @ (weighted - pi @ weighted).square().sum(1)) / samples


def leave_one_out_variance(scores: Tensor, pi: Tensor, rewards: Tensor, samples: int) -> float:
    """The same with B_i the mean reward of the other n − 1 texts.

    The estimate is then the U-statistic of h(x, y) = (r_x − r_y)·(∇log π(x) − ∇log π(y))/2, whose variance is
    (4(n − 2)·Var E[h|x] + 2·Var h)/(n(n − 1)) (Hoeffding 1948).
    """
    mean_reward, mean = pi @ rewards, pi @ (rewards[:, None] * scores)
    first = ((rewards - mean_reward)[:, None] * scores + mean) / 2  # E[h|x], as E[∇log π] = 0
    var_first = pi @ (first - mean).square().sum(1)
    lengths = scores.square().sum(1)  # [B]
    distances = lengths[:, None] + lengths - 2 * scores @ scores.T  # [B, B]
    second_moment = pi @ ((rewards[:, None] - rewards).square() * distances) @ pi / 4
    var_pair = second_moment - mean.square().sum()
    return float((4 * (samples - 2) * var_first + 2 * var_pair) / (samples * (samples - 1)))
