"""weight_grad_out: it gets what autograd would have left in the head's own gradient, whatever is done."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fdpg_kernels import fdpg_loss
from support.kernel_cases import head_batch

IMPLEMENTATIONS = ["reference", "chunked", "triton"]


def arguments_of(lengths=(3, 0, 9, 4)):
    arguments = head_batch(list(lengths))
    return {k: x.detach().float() if x.is_floating_point() else x for k, x in arguments.items()}


def plainly(loss):
    loss.backward()


def halved(loss):
    (loss * 0.5).backward()


def accumulated(loss):
    (loss / 4 + 3 * loss).backward()


def scaled(loss):
    torch.amp.GradScaler("cpu", init_scale=1024.0).scale(loss).backward()


def dropped(loss):
    assert loss.requires_grad


def of_the_hidden_states_alone(loss):
    loss.backward(torch.tensor(-2.0, dtype=loss.dtype))


def repeated(loss):
    loss.backward(retain_graph=True)
    if loss.grad_fn.name() == "_FDPGLossBackward":
        with pytest.raises(RuntimeError, match="handed out already; call it again"):
            loss.backward()


USES = [plainly, halved, accumulated, scaled, dropped, of_the_hidden_states_alone, repeated]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_it_gets_what_the_weight_would_have_got(use, impl):
    arguments, found = arguments_of(), []
    for into in (None, torch.full((11, 5), 2.0)):
        leaves = {k: arguments[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")}
        use(fdpg_loss(**arguments | leaves, impl=impl, weight_grad_out=into).loss)
        of_weight = leaves["weight"].grad if into is None else into - 2.0
        assert into is None or leaves["weight"].grad is None
        found.append(
            [torch.zeros(11, 5) if of_weight is None else of_weight, leaves["hidden"].grad, leaves["bias"].grad]
        )
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_adds_nothing(impl, reentrant):
    arguments = arguments_of()

    def run(hidden, into):
        # something after the loss is saved: a recomputation runs the loss again
        return fdpg_loss(
            **arguments | {"hidden": hidden.sin()}, ratio="none", impl=impl, weight_grad_out=into
        ).loss.exp()

    once, twice = torch.zeros(11, 5), torch.zeros(11, 5)
    hidden = arguments["hidden"].clone().requires_grad_()
    run(hidden, once).backward()
    checkpoint(lambda hidden: run(hidden, twice), hidden, use_reentrant=reentrant).backward()
    assert bool(once.any())
    torch.testing.assert_close(twice, once)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_frozen_head_whose_master_learns(dtype, impl):
    """Neither hidden nor weight wants a gradient: the loss has one all the same, for weight_grad_out."""
    arguments = arguments_of()
    arguments |= {k: arguments[k].to(dtype) for k in ("hidden", "weight", "bias")}
    into, quiet = torch.zeros(11, 5), torch.zeros(11, 5)
    fdpg_loss(**arguments, impl=impl, weight_grad_out=into).loss.backward()
    weight = arguments["weight"].double().requires_grad_()
    wide = {k: x.double() if x.is_floating_point() else x for k, x in arguments.items()}
    fdpg_loss(**wide | {"weight": weight}, impl="reference").loss.backward()
    limit = 1e-4 if dtype == torch.float32 or impl != "triton" else 2**-7
    assert float((into - weight.grad).norm() / weight.grad.norm()) < limit  # not rounded to the head's dtype
    with torch.no_grad():
        assert not fdpg_loss(**arguments, impl=impl, weight_grad_out=quiet).loss.requires_grad
    assert not bool(quiet.any())
