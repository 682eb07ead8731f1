"""examples/torchtitan_step.py: its two processes agree with one, and its loss with torchtitan's own.

torchtitan pins an older datasets than stands here, but what this needs of it runs beside a newer one:
pip install --no-deps torchtitan==0.3.0 spmd_types==0.2.3 tyro typeguard torch_checkpointing
"""

import re
import subprocess
import sys

import pytest
import torch

from support.examples import EXAMPLES, load_example

BATCH, LENGTH = 2, 64


def test_two_processes_train_as_one():
    command = [sys.executable, str(EXAMPLES / "torchtitan_step.py")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    rows = re.findall(r"^(.+), (.+): losses (.+); gradients (\S+) apart$", ran.stdout, re.MULTILINE)
    assert {row[:2] for row in rows} == {
        (loss, how) for loss in ("SFT", "distillation") for how in ("FSDP2", "split head")
    }
    for *_, losses, apart in rows:
        steps = [(float(a), float(b)) for a, b in re.findall(r"([\d.]+) \(([\d.]+)\)", losses)]
        assert len(steps) == 3 and steps[2][0] < steps[0][0]
        assert all(a == pytest.approx(b, rel=1e-5, abs=1e-5) for a, b in steps)
        assert float(apart) < 1e-5


def test_torchtitans_model_and_chunked_loss():
    """Its debug Llama, its chunked cross-entropy with a head of its own, and ours: loss and gradients."""
    pytest.importorskip("torchtitan")
    from torchtitan.components.loss import ChunkedLossWrapper
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.llama3 import model_registry

    example = load_example("torchtitan_step")

    class FusedLoss(ChunkedLossWrapper):  # as the example's docstring has it
        def __call__(self, pred, labels, global_valid_tokens=None, **_):
            example.give_logprobs(self.lm_head)
            return example.sft_loss(self.lm_head, pred, labels, global_valid_tokens), {}

    torch.manual_seed(0)
    config = model_registry("debugmodel").model
    for layer in config.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()  # flex attention has no backward on a CPU
    model = config.build()
    model.init_states()
    model._skip_lm_head = True
    rng = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(model.config.vocab_size, (2, BATCH, LENGTH), generator=rng)
    labels[:, :5] = -100
    losses, gradients = [], []
    for kind in (ChunkedLossWrapper, FusedLoss):
        loss_fn = kind(ChunkedLossWrapper.Config(num_chunks=4))
        loss_fn.set_lm_head(model.lm_head)
        model.zero_grad()
        loss, _ = loss_fn(model(tokens), labels, torch.tensor(float((labels >= 0).sum())))
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(*gradients[::-1], strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
