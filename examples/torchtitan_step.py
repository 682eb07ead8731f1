"""Training steps as torchtitan takes them, on the fused ops: needs torch and fdpg_kernels, runs on a CPU in seconds.

    python examples/torchtitan_step.py

Two processes train a small decoder: FSDP2 shards all of it, or tensor parallelism splits its head's vocabulary. The
loss is SFT on labels, or distillation on a teacher's top-k. Each is compared with one process that forms the logits.

Written against torchtitan 0.3.0, whose trainer leaves the head to the loss if that is a `ChunkedLossWrapper`. There:

    class FusedLoss(ChunkedLossWrapper):
        def __call__(self, pred, labels, global_valid_tokens=None, **_):
            give_logprobs(self.lm_head)
            return sft_loss(self.lm_head, pred, labels, global_valid_tokens), {}
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from types import MethodType

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fdpg_kernels import linear_logprob

RANKS, BATCH, LENGTH, WIDTH, VOCABULARY, TOP, STEPS = 2, 4, 32, 32, 1001, 8, 3


class Decoder(nn.Module):
    """tokens [B, T] → hidden states [B, T, D]: torchtitan's with `_skip_lm_head`."""

    def __init__(self):
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        options = dict(nhead=2, dim_feedforward=2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, **options) for _ in range(2))
        self.norm = nn.RMSNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, mask = self.tok_embeddings(tokens), nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask, is_causal=True)
        return self.norm(hidden)


def give_logprobs(lm_head: nn.Module) -> None:
    """lm_head(hidden, target_ids) gives log-probs of ids [B, T] or [B, T, K].

    Called so, FSDP's hooks surround the op: the weight is whole inside, and its gradient is reduced afterwards.
    """

    def forward(self, hidden, target_ids):
        if isinstance(self.weight, DTensor):  # tensor parallelism, where all ranks hold the same hidden states
            hidden = DTensor.from_local(hidden, self.weight.device_mesh, [Replicate()])
        return linear_logprob(hidden, self.weight, target_ids)

    lm_head.forward = MethodType(forward, lm_head)


def sft_loss(lm_head: nn.Module, hidden: Tensor, labels: Tensor, global_valid_tokens: float) -> Tensor:
    """−log π summed over this rank's labels [B, T], by the number of them on all ranks; −100 is no label."""
    return -lm_head(hidden, labels).sum() / global_valid_tokens


def distillation_loss(lm_head: nn.Module, hidden: Tensor, ids: Tensor, logprob: Tensor, tokens: float) -> Tensor:
    """Σ p·log(p/π) over a teacher's K likeliest tokens: their ids and log-probs, both [B, T, K]."""
    return (logprob.exp() * (logprob - lm_head(hidden, ids))).sum() / tokens


def form_logits(lm_head: nn.Module) -> None:
    """What the ops stand for, to compare with."""

    def forward(self, hidden, target_ids):
        ids = target_ids if target_ids.ndim == hidden.ndim else target_ids.unsqueeze(-1)
        logprob = F.linear(hidden, self.weight).log_softmax(-1).gather(-1, ids.clamp(min=0))
        return logprob.masked_fill(ids < 0, 0).view_as(target_ids)

    lm_head.forward = MethodType(forward, lm_head)


def shard_all(model: Decoder) -> None:
    for module in (model.tok_embeddings, *model.layers, [model.norm, model.lm_head], model):
        fully_shard(module)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the loss is divided by the tokens of all ranks already
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply while it adds


def split_vocabulary(model: Decoder) -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight, mesh, [Shard(0)]))


def train(loss_of: Callable, data: list[Tensor], head: Callable, shard: Callable) -> tuple[Tensor, list[Tensor]]:
    """This process's loss at each step, and the gradients of the first step, whole."""
    torch.manual_seed(0)
    model = Decoder()
    head(model.lm_head)
    shard(model)
    optimizer, losses, gradients = torch.optim.AdamW(model.parameters(), lr=1e-2), [], []
    tokens, *targets = data
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model.lm_head, model(tokens), *targets, BATCH * LENGTH)
        loss.backward()
        gradients = gradients or [getattr(p.grad, "full_tensor", p.grad.clone)() for p in model.parameters()]
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), gradients


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    rng = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=rng)
    likeliest = torch.randn(BATCH, LENGTH, VOCABULARY, generator=rng).log_softmax(-1).topk(TOP)
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    for name, loss_of, data in (
        ("SFT", sft_loss, [tokens, labels]),
        ("distillation", distillation_loss, [tokens, likeliest.indices, likeliest.values]),
    ):
        wanted, wanted_gradients = train(loss_of, data, form_logits, shard=lambda model: None)
        for how, shard in (("FSDP2", shard_all), ("split head", split_vocabulary)):
            if shard is shard_all:  # each rank its own sequences, and its part of the loss
                losses, gradients = train(loss_of, [x.chunk(RANKS)[rank] for x in data], give_logprobs, shard)
                dist.all_reduce(losses)
            else:
                losses, gradients = train(loss_of, data, give_logprobs, shard)
            apart = max(
                float((a - b).abs().max() / b.abs().max()) for a, b in zip(gradients, wanted_gradients, strict=True)
            )
            if rank == 0:
                steps = " ".join(f"{a:.5f} ({b:.5f})" for a, b in zip(losses, wanted, strict=True))
                print(f"{name}, {how}: losses {steps}; gradients {apart:.0e} apart", flush=True)
    dist.destroy_process_group()


def main() -> None:
    print(
        "losses of two processes (and of one that forms the logits), and their gradients' largest relative difference"
    )
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (folder,), nprocs=RANKS)


if __name__ == "__main__":
    main()
