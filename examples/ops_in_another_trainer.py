"""The fused ops inside a training loop of your own: needs torch and fdpg_kernels, runs on a CPU in half a minute.

    python examples/ops_in_another_trainer.py

A tiny language model writes texts of 8 tokens out of 16. We want token 3 in every text, and train that twice from the
same start: by reinforcement learning (GRPO), and by f-DPG. Both take the log-probs of sampled tokens from hidden states
and LM head: a [tokens, vocabulary] matrix of logits, 5 GB for 8,192 tokens of 150,000, is never whole in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from fdpg_kernels import fdpg_loss, linear_logprob

VOCABULARY, LENGTH, WANTED = 16, 8, 3
START = VOCABULARY  # a token that opens every text and is never written
BATCH, STEPS = 256, 150


class TinyLM(nn.Module):
    def __init__(self, width: int = 64):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY + 1, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def hidden(self, texts: Tensor) -> Tensor:
        """What the head sees before it predicts each token of texts [B, T]; flat, as the ops want it: [B·T, D]."""
        before = nn.functional.pad(texts[:, :-1], (1, 0), value=START)
        return self.gru(self.embedding(before))[0].flatten(0, 1)

    def logprob(self, texts: Tensor) -> Tensor:
        """log-prob of each token, [B·T]. In place of log_softmax(hidden @ head.T).gather(...)."""
        return linear_logprob(self.hidden(texts), self.head.weight, texts.flatten())

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        token, state, texts = torch.full((count, 1), START), None, []
        for _ in range(LENGTH):
            output, state = self.gru(self.embedding(token), state)
            token = torch.multinomial(self.head(output[:, 0]).softmax(-1), 1)
            texts.append(token)
        return torch.cat(texts, dim=1)  # [B, T]


def satisfies(texts: Tensor) -> Tensor:
    """Whether the wanted token occurs, [B] bool. Any check of a text could stand here."""
    return (texts == WANTED).any(1)


def grpo_loss(model: TinyLM, texts: Tensor, sampled_logprob: Tensor) -> Tensor:
    """As in TRL: the reward of a text beside its group's mean, and token ratios that may not run far from 1."""
    reward = satisfies(texts).float()
    advantage = ((reward - reward.mean()) / (reward.std() + 1e-4)).repeat_interleave(LENGTH)  # [B·T]
    ratio = (model.logprob(texts) - sampled_logprob).exp()
    return -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()


def f_dpg_loss(model: TinyLM, texts: Tensor, sampled_logprob: Tensor, *, base: TinyLM, log_z: Tensor) -> Tensor:
    """f-DPG says what the trained model should be, not only what it should score: the target distribution

        p(x) = base(x) · [x satisfies] / Z,

    what the start model writes if texts without token 3 are thrown away. The gradient is that of a distance of model
    and target (here Jensen-Shannon; any f-divergence will do), so training ends there and goes no further.
    """
    with torch.no_grad():
        base_logprob = base.logprob(texts).view(-1, LENGTH).sum(1)  # [B], of whole texts
    score = base_logprob.masked_fill(~satisfies(texts), -torch.inf)  # log of base(x)·[x satisfies]
    return fdpg_loss(
        model.hidden(texts),
        model.head.weight,
        texts.flatten(),
        cu_seqlens=torch.arange(0, texts.numel() + 1, LENGTH, dtype=torch.int32),  # where each text begins and ends
        behavior_logprob=sampled_logprob,  # who sampled may be older than the model: the loss corrects for that
        target_log_score=score,
        log_z=log_z,
        divergence="jensen_shannon",
    ).loss


def train(model: TinyLM, loss_of: Callable[..., Tensor]) -> TinyLM:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        texts = model.sample(BATCH)
        with torch.no_grad():
            sampled_logprob = model.logprob(texts)  # a sampler such as vLLM reports these
        for _ in range(2):  # two updates a batch, the second off-policy
            optimizer.zero_grad()
            loss_of(model, texts, sampled_logprob).backward()
            optimizer.step()
    return model


def describe(name: str, model: TinyLM) -> float:
    texts = model.sample(4096)
    good = satisfies(texts)
    fraction, copies = float(good.float().mean()), (texts[good] == WANTED).sum(1).float().mean()
    print(f"{name:8}{100 * fraction:5.1f} % satisfy; in those that do, token {WANTED} occurs {copies:.2f} times")
    return fraction


def main() -> None:
    torch.manual_seed(0)
    base = TinyLM()
    fraction = describe("before", base)
    log_z = torch.tensor(fraction).log()  # Z, the total of base(x)·[x satisfies], is that very fraction
    describe("GRPO", train(copy.deepcopy(base), grpo_loss))
    describe("f-DPG", train(copy.deepcopy(base), partial(f_dpg_loss, base=base, log_z=log_z)))


if __name__ == "__main__":
    main()
