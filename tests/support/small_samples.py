"""How well estimates do with few samples, measured: the tables of docs/method.md, which `python -m` this writes there.

λ from simulated features; log Z, divergences and gradients on language models that can be enumerated.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fdpg_fast import by_context
from fdpg_fast.errors import UserError
from fdpg_fast.experiments.enumerable import D_F, Policy, Tabular, exact_gradient, hard_target, make_bed, soft_target
from fdpg_fast.features import Feature
from fdpg_fast.measure import quasi_rejection
from fdpg_fast.measure.estimators import divergence_matrix, log_partition, mean_under_target
from fdpg_fast.partition import Baseline, pseudo_rewards
from fdpg_fast.preparation import fit_moments
from fdpg_fast.runs.tables import doubtful
from fdpg_fast.targets import Target, distributional, pointwise
from fdpg_kernels import divergences

F64 = torch.float64
DOCUMENT = Path(__file__).parents[2] / "docs" / "method.md"
FIT_SAMPLES = 2048  # the default of target_fit_samples


def named(name: str) -> Feature:
    return Feature(name, lambda completions: [0.0] * len(completions))


def rates(prompts: int, mean: float, spread: float = 0.0, seed: int = 1) -> Tensor:
    """How often something occurs for each prompt: logits of this spread around that of `mean`, [prompts]."""
    normal = torch.randn(prompts, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return torch.sigmoid(math.log(mean / (1 - mean)) + spread * normal)


class Prompts:
    """A 0/1 feature, and with `hard` a constraint, that occur independently, at rates of each prompt's own."""

    def __init__(self, rates: Tensor, hard: Tensor | None = None, seed: int = 0):
        self.rates, self.hard, self.drawn = rates, hard, 0
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, indices, each: int, purpose: str) -> tuple[Tensor, Tensor]:
        self.drawn += each * len(indices)
        terms = [x[torch.tensor(indices)].repeat_interleave(each) for x in (self.hard, self.rates) if x is not None]
        occurs = [(torch.rand(len(x), generator=self.generator, dtype=F64) < x).double() for x in terms]
        return torch.stack(occurs, dim=1), torch.arange(len(indices)).repeat_interleave(each)

    def fit(self, moment: float, budget: int = FIT_SAMPLES, seed: int = 0) -> Target:
        target = distributional([named("f")], [moment])
        if self.hard is not None:
            target = pointwise(named("h")) * target
        order = random.Random(seed).sample(range(len(self.rates)), len(self.rates))
        return fit_moments(target, self.draw, order, budget)

    def true_exponent(self, moment: float) -> float:
        low, high = -20.0, 20.0
        for _ in range(60):
            middle = (low + high) / 2
            below = float(torch.sigmoid(self.rates.logit() + middle).mean()) < moment
            low, high = (middle, high) if below else (low, middle)
        return low


def fits(simulated: Prompts, moment: float, count: int) -> Tensor:
    """λ − true λ and its stated standard error of each fit that is not refused, [2, fits]."""
    true, found = simulated.true_exponent(moment), []
    for seed in range(count):
        try:
            fitted = simulated.fit(moment, seed=seed)
        except UserError:
            continue
        found.append((fitted.exponents[0] - true, fitted.exponent_errors[0]))
    return torch.tensor(found, dtype=F64).reshape(-1, 2).T


def lambda_table(count: int = 200) -> str:
    head = ["feature", "prompts", "true λ", "found − true", "spread", "stated error", "within 1.96 errors", "refused"]
    body = []
    for label, mean, spread, sizes in (
        ("rate 0.3", 0.3, 0.0, (1, 3, 32, 512, 1024, 10_000)),
        ("rates 0.3, logits ± 1.5", 0.3, 1.5, (3, 32, 512, 1024, 10_000)),
        ("rate 0.03", 0.03, 0.0, (1, 1024)),
        ("rate 0.001", 0.001, 0.0, (1, 1024)),
    ):
        for prompts in sizes:
            simulated = Prompts(rates(prompts, mean, spread))
            found = fits(simulated, 0.5, count)
            row = [label, f"{prompts:,}", f"{simulated.true_exponent(0.5):.2f}"]
            if found.numel():
                errors, stated = found
                row += [_signed(float(errors.mean())), f"{errors.std():.2f}", f"{stated.mean():.2f}"]
                row += [f"{(errors.abs() < 1.96 * stated).double().mean():.0%}"]
            else:
                row += ["–"] * 4
            body.append([*row, f"{1 - found.shape[-1] / count if found.numel() else 1:.0%}"])
    return _table(head, body)


@dataclass(frozen=True)
class Situation:
    """A target and a policy on texts that can be enumerated."""

    name: str
    policy: Policy
    target: object

    @property
    def log_pi(self) -> Tensor:
        return self.policy.logprob(BED)[1].detach()


BED = make_bed()
BASE = Tabular(BED, 0)
SITUATIONS = (
    Situation("exp(r/β), π the base", BASE, soft_target(BED, BASE)),
    Situation("a constraint, π the base", BASE, hard_target(BED, BASE)),
    Situation("a constraint, π elsewhere", Tabular(BED, 1), hard_target(BED, BASE)),
)
MEASURED = ("log_z", "feature_of_target/length", "jensen_shannon", "total_variation", "forward_kl")


def biases(situation: Situation, each: int, contexts: int) -> tuple[dict[str, float], float, bool]:
    """Estimate minus exact value by name, effective samples a context, and whether the numbers are marked as doubtful.

    Every context is the same one, sampled anew: what an average over contexts does not average out is the bias.
    """
    log_pi, target = situation.log_pi, situation.target
    picks = torch.multinomial(log_pi.exp(), contexts * each, True, generator=torch.Generator().manual_seed(each))
    owner = torch.arange(contexts).repeat_interleave(each)
    sample = (log_pi[picks], target.log_score[picks], owner)
    partition, matrix = log_partition(*sample), divergence_matrix(*sample).estimates
    seen = partition.log_z.isfinite()
    longest = (BED.length == 4).double()
    feature = mean_under_target(longest[picks], *sample)
    accepted = quasi_rejection.estimate(sample[1] - sample[0], owner, (1.0,))[0].acceptance
    found = {
        "log_z": float(partition.log_z[seen].mean() - target.log_z),
        "feature_of_target/length": feature.value - float(target.p @ longest),
        "acceptance": accepted.value - float(torch.minimum(target.p, log_pi.exp()).sum()),
    }
    for name in ("jensen_shannon", "total_variation", "forward_kl"):
        found[name] = matrix[name].value - float(D_F[name](log_pi.exp(), target.p))
    marks = [doubtful(feature), doubtful(accepted), doubtful(matrix["jensen_shannon"], "divergence/jensen_shannon")]
    assert len(set(marks)) == 1
    return found, partition.per_context, marks[0]


def gradient(situation: Situation, name: str, each: int, rounds: int) -> tuple[float, float]:
    """The expected gradient with Z from the round's own samples: its length and cosine to the exact one."""
    log_pi, target = situation.log_pi, situation.target
    generator = torch.Generator().manual_seed(each)
    picks = torch.multinomial(log_pi.exp(), rounds * each, True, generator=generator)
    owner = torch.arange(rounds).repeat_interleave(each)
    log_q, log_score = log_pi[picks], target.log_score[picks]
    log_z = (by_context.log_sum_exp(log_score - log_q, owner, rounds) - math.log(each))[owner]
    rewards = pseudo_rewards(log_q, log_score, log_z, divergences.get(name), None)
    advantage = (rewards - Baseline()(rewards, owner)).masked_fill(log_z.isneginf(), 0.0)
    weights = torch.zeros_like(log_pi).index_add(0, picks, advantage) / len(picks)
    found = -(weights @ situation.policy.scores(BED).detach())
    exact = exact_gradient(BED, situation.policy, target, D_F[name])
    return float(found.norm() / exact.norm()), float(found @ exact / found.norm() / exact.norm())


def bias_table(samples: int = 400_000) -> str:
    head = ["target, policy", "samples", "effective", "", "log Z", "E_p[f]", "JS", "TV", "KL(p‖π)", "acceptance, β = 1"]
    head += ["gradient of JS"]
    body = []
    for situation in SITUATIONS:
        for each in (2, 4, 8, 16, 32, 64, 128):
            found, effective, marked = biases(situation, each, samples // each)
            length, cosine = gradient(situation, "jensen_shannon", each, samples // each)
            values = [_signed(found[key]) for key in (*MEASURED, "acceptance")]
            mark = "?" if marked else ""
            body.append([situation.name, str(each), f"{effective:.1f}", mark, *values, f"{length:.2f}, {cosine:.2f}"])
    return _table(head, body)


def _signed(number: float) -> str:
    return f"{round(number, 2) + 0.0:+.2f}"


def _table(head: list[str], body: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body])


def documented(name: str) -> re.Match[str]:
    """The place of a table in the document."""
    found = re.search(rf"(?<=<!-- {name} -->\n).*?(?=\n<!-- -->)", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found


if __name__ == "__main__":
    for name, table in (("few samples: λ", lambda_table()), ("few samples: bias", bias_table())):
        place = documented(name)
        DOCUMENT.write_text(place.string[: place.start()] + table + place.string[place.end() :], encoding="utf-8")
