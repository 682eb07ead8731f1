"""The ops beside plain PyTorch and torch's own chunked cross-entropy: time, largest tensor made, error to float64."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fdpg_kernels import fdpg_loss, linear_logprob

SHAPES = {"smollm2": (1536, 576, 49152), "tiny": (8192, 256, 2048)}  # N tokens, D hidden, V vocabulary
SEQUENCE = 24  # tokens of each sequence, for the loss


def plain_logprob(hidden, weight, target_ids):
    """Full logits, log_softmax, gather: what everybody writes first."""
    return (hidden @ weight.T).log_softmax(-1).gather(1, target_ids[:, None])[:, 0]


def torch_logprob(hidden, weight, target_ids):
    """torch's linear_cross_entropy in its chunked form."""
    from torch.nn import LinearCrossEntropyOptions

    options = LinearCrossEntropyOptions()
    return -torch.nn.functional.linear_cross_entropy(hidden, weight, target_ids, reduction="none", options=options)


LOGPROB = {"ours": linear_logprob, "plain": plain_logprob, "torch chunked": torch_logprob}


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns: a [N, V] matrix cannot hide."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() * x.element_size() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.bytes = max([self.bytes, *sizes])
        return result


@pytest.fixture(scope="session", params=SHAPES)
def inputs(request):
    num_tokens, width, vocabulary = SHAPES[request.param]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) * width**-0.5
    target_ids = torch.randint(vocabulary, (num_tokens,), generator=generator)
    return request.param, hidden.requires_grad_(), weight.requires_grad_(), target_ids


@pytest.fixture(scope="session")
def exact(inputs):
    """log-probs in float64, a part at a time."""
    _, hidden, weight, target_ids = inputs
    with torch.no_grad():
        rows = range(0, len(hidden), 512)
        parts = [plain_logprob(hidden[i : i + 512].double(), weight.double(), target_ids[i : i + 512]) for i in rows]
    return torch.cat(parts)


@pytest.mark.parametrize("name", LOGPROB)
def test_logprob_forward(benchmark, inputs, exact, name):
    shape, *arguments = inputs
    with torch.no_grad(), LargestTensor() as largest:
        error = float((LOGPROB[name](*arguments) - exact).abs().max())
    benchmark.group = f"log-prob forward, {shape}"
    benchmark.extra_info.update(largest_tensor_bytes=largest.bytes, max_error=error)
    with torch.no_grad():
        benchmark.pedantic(LOGPROB[name], arguments, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("name", LOGPROB)
def test_logprob_forward_backward(benchmark, inputs, name):
    shape, hidden, weight, target_ids = inputs
    gradient = torch.linspace(-1, 1, len(hidden))  # of each token its own, as sequence weights are

    def step():
        logprob = LOGPROB[name](hidden, weight, target_ids)
        torch.autograd.grad(logprob, (hidden, weight), gradient)

    with LargestTensor() as largest:
        step()
    benchmark.group = f"log-prob forward+backward, {shape}"
    benchmark.extra_info["largest_tensor_bytes"] = largest.bytes
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)


def plain_loss(hidden, weight, target_ids, behavior, score, log_z):
    token_logprob = plain_logprob(hidden, weight, target_ids)
    log_pi = token_logprob.view(-1, SEQUENCE).sum(1)
    log_t = log_pi.detach() - score + log_z
    reward = torch.nn.functional.softplus(-log_t) - torch.log(torch.tensor(2.0))
    ratio = (log_pi.detach() - behavior.view(-1, SEQUENCE).sum(1)).exp()
    return -(ratio * reward * log_pi).mean()


def our_loss(hidden, weight, target_ids, behavior, score, log_z):
    cu_seqlens = torch.arange(0, len(hidden) + 1, SEQUENCE, dtype=torch.int32)
    return fdpg_loss(hidden, weight, target_ids, cu_seqlens, behavior, score, log_z).loss


@pytest.mark.parametrize(("name", "loss"), [("ours", our_loss), ("plain", plain_loss)], ids=["ours", "plain"])
def test_loss_forward_backward(benchmark, inputs, exact, name, loss):
    shape, *arguments = inputs
    whole = len(exact) - len(exact) % SEQUENCE
    hidden, weight, target_ids = arguments[0][:whole], arguments[1], arguments[2][:whole]
    behavior = exact[:whole].float()
    score = behavior.view(-1, SEQUENCE).sum(1) + torch.linspace(-1, 1, whole // SEQUENCE)

    def step():
        value = loss(hidden, weight, target_ids, behavior, score, torch.tensor(-0.5))
        return torch.autograd.grad(value, (arguments[0], weight))

    with LargestTensor() as largest:
        ours = step()
    benchmark.group = f"f-DPG loss forward+backward, {shape}"
    benchmark.extra_info["largest_tensor_bytes"] = largest.bytes
    if name == "ours":  # like with like
        theirs = torch.autograd.grad(
            plain_loss(hidden, weight, target_ids, behavior, score, torch.tensor(-0.5)), (arguments[0], weight)
        )
        for mine, plain in zip(ours, theirs, strict=True):
            assert float(torch.nn.functional.cosine_similarity(mine.flatten(), plain.flatten(), dim=0)) > 0.9999
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
