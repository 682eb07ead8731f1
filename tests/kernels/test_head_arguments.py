"""What users hand over as a head: temperatures as tensors, DTensors, settings of TF32 and of default dtypes."""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fdpg_kernels import Divergence, fdpg_loss, linear_logprob, sequence_weights
from support.kernel_cases import batch, head_batch

IMPLEMENTATIONS = ("reference", "chunked", "triton")
LEAVES = ("hidden", "weight", "bias")


def single(lengths=(3, 0, 9, 4)):
    arguments = head_batch(list(lengths))
    return {k: x.detach().float() if x.is_floating_point() else x for k, x in arguments.items()}


def gradients(arguments, **options):
    leaves = {k: arguments[k].clone().requires_grad_() for k in LEAVES}
    fdpg_loss(**arguments | leaves, ratio="none", **options).loss.backward()
    head = {k: leaves.get(k, arguments[k]) for k in (*LEAVES, "target_ids")}
    linear_logprob(**head, **options).sum().backward()
    return [x.grad for x in leaves.values()]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_temperature_for_each_row(impl, softcap):
    """Rows of one temperature get what they get by themselves with that number."""
    arguments = single()
    temperature = torch.tensor([0.5, 1.0, 3.0, 0.7]).repeat(4)
    head = {k: arguments[k] for k in (*LEAVES, "target_ids")}
    found = linear_logprob(**head, temperature=temperature, softcap=softcap, impl=impl)
    for number in (0.5, 1.0, 3.0, 0.7):
        alone = linear_logprob(**head, temperature=number, softcap=softcap, impl=impl)
        same = temperature == torch.tensor(number)
        torch.testing.assert_close(found[same], alone[same])
    definition = gradients(arguments, temperature=temperature, softcap=softcap, impl="reference")
    torch.testing.assert_close(
        gradients(arguments, temperature=temperature, softcap=softcap, impl=impl), definition, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_a_scalar_tensor_is_a_number(kind, impl):
    arguments = single()
    expected = gradients(arguments, temperature=2.0, impl=impl)
    torch.testing.assert_close(gradients(arguments, temperature=torch.tensor(2.0).to(kind), impl=impl), expected)


@pytest.mark.parametrize(
    ("temperature", "message"),
    [
        (torch.ones(3), r"temperature must be a number or a tensor .* \[N\]=\[16\]; got \(3,\)"),
        (torch.ones(16, 1), r"got \(16, 1\)"),
        (torch.ones(16, requires_grad=True), r"got \(16,\) with requires_grad"),
        (torch.tensor(1.0, requires_grad=True), r"got \(\) with requires_grad"),
        (torch.tensor(0.0), "temperature=0.0; it must be a positive number"),
        (torch.tensor([1.0] * 15 + [0.0]), "temperature holds 0.0; each must be a positive number"),
        (torch.tensor([-1.0] + [1.0] * 15), "temperature holds -1.0"),
        (torch.tensor([float("nan")] + [1.0] * 15), "temperature holds nan"),
        (float("inf"), "temperature=inf; it must be a positive number"),
    ],
)
def test_temperatures_that_are_refused(temperature, message):
    for impl in IMPLEMENTATIONS:
        with pytest.raises(ValueError, match=message):
            fdpg_loss(**single(), temperature=temperature, impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_where_nobody_may_look_a_wrong_temperature_is_nan(monkeypatch, impl):
    monkeypatch.setattr("fdpg_kernels.checks._may_look", lambda tensor: False)
    temperature = torch.ones(16)
    temperature[[2, 5, 7]] = torch.tensor([0.0, -1.0, torch.inf])
    arguments = {k: x for k, x in single().items() if k in (*LEAVES, "target_ids")}
    found = linear_logprob(**arguments, temperature=temperature, impl=impl)
    assert found.isnan().nonzero().flatten().tolist() == [2, 5, 7]


def test_compiled_temperatures():
    arguments = {k: x for k, x in single().items() if k in (*LEAVES, "target_ids")}
    temperature = torch.linspace(0.5, 2.0, 16)
    compiled = torch.compile(lambda t: linear_logprob(**arguments, temperature=t), backend="aot_eager", fullgraph=True)
    for given in (temperature, torch.tensor(0.7)):
        torch.testing.assert_close(compiled(given), linear_logprob(**arguments, temperature=given))


def test_numbers_that_are_tensors_are_refused_by_name():
    for name in ("softcap", "ratio_cap", "ratio_drop", "reward_cap"):
        with pytest.raises(ValueError, match=re.escape(f"{name}=tensor(2.); ")):
            fdpg_loss(**single(), **{name: torch.tensor(2.0)})
    with pytest.raises(ValueError, match=r"target_ids must be .* torch.bool"):
        linear_logprob(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([True, False]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(log_z=torch.tensor(float("nan"))), "log_z holds nan; it must be a number, or −inf where it is not known"),
        (dict(log_z=torch.tensor([0.0, torch.inf])), "log_z holds inf"),
        (dict(log_z=float("nan")), "log_z holds nan"),
        (dict(baseline=float("nan")), "baseline holds nan; it must be a number$"),
        (dict(baseline=torch.tensor([0.0, -torch.inf])), "baseline holds -inf"),
        (dict(target_log_score=torch.tensor([0.0, torch.nan])), "target_log_score holds nan; .* where the target is"),
    ],
)
def test_what_is_no_number_is_refused(change, message):
    for op, arguments in ((sequence_weights, batch([2, 4])), (fdpg_loss, head_batch([2, 4]))):
        for impl in ("reference", "chunked"):
            with pytest.raises(ValueError, match=message):
                op(**arguments | change, impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_defaults_of_dtype_change_nothing(impl):
    """A model is loaded under set_default_dtype(bfloat16): a log Z given as a float keeps its digits."""
    arguments = batch([3, 0, 17]) | dict(log_z=-13.37, baseline=0.123)
    exact = sequence_weights(**arguments, impl="reference")
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = sequence_weights(**arguments, impl=impl)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_products_are_float32_whatever_is_allowed(monkeypatch, impl):
    """TF32 and bfloat16 products of float32 matrices are off inside an op, and afterwards as they were."""
    seen = []
    matmul = torch.backends.mkldnn.matmul
    monkeypatch.setattr(
        f"fdpg_kernels.{'triton.launch' if impl == 'triton' else impl}.linear_logprob",
        lambda *_: seen.append(matmul.fp32_precision) or (torch.zeros(16, 1), torch.zeros(16).double(), None),
    )
    arguments = {k: x for k, x in single().items() if k in (*LEAVES, "target_ids")}
    matmul.fp32_precision = "bf16"
    try:
        linear_logprob(**arguments, impl=impl)
        assert (seen, matmul.fp32_precision) == (["ieee"], "bf16")
    finally:
        matmul.fp32_precision = "none"


def test_capturing_a_cuda_graph_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    fdpg_loss(**single())  # on a CPU nobody captures
    with FakeTensorMode():
        tokens, scores = torch.zeros(6, device="cuda"), torch.zeros(2, device="cuda")
        with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph.*call them outside it"):
            sequence_weights(tokens, tokens, torch.tensor([0, 2, 6]), scores, 0.0)


def test_a_derivative_is_found_under_a_dispatch_mode():
    """A FLOP counter switches autograd off inside an operator, where f' of a user's f comes from."""
    from torch.utils.flop_counter import FlopCounterMode

    mine = Divergence("mine", lambda t: (t - 1) ** 2 / (t + 1), f_prime_at_infinity=1.0)
    arguments = batch([3, 2], zeros=True)
    with FlopCounterMode(display=False):
        found = sequence_weights(**arguments, divergence=mine)
    torch.testing.assert_close(found, sequence_weights(**arguments, divergence=mine))


PROGRAM = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from fdpg_kernels import fdpg_loss, linear_logprob
from support.kernel_cases import head_batch
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
arguments = {k: x.detach().float() if x.is_floating_point() else x for k, x in head_batch([3, 0, 4]).items()}
def place(*how):
    return torch.nn.Parameter(distribute_tensor(arguments["weight"], mesh, how))
for impl in ("reference", "chunked", "triton"):
    weight, plain = place(Replicate()), arguments["weight"].clone().requires_grad_()
    for head in (weight, plain):
        fdpg_loss(**arguments | {"weight": head}, impl=impl).loss.backward()
        linear_logprob(arguments["hidden"], head, arguments["target_ids"], impl=impl).sum().backward()
    torch.testing.assert_close(weight.grad.to_local(), plain.grad)
    for op in (fdpg_loss, linear_logprob):
        few = arguments if op is fdpg_loss else {k: arguments[k] for k in ("hidden", "target_ids")}
        try:
            op(**few | {"weight": place(Shard(0))}, impl=impl)
        except ValueError as error:
            print(error)
"""


def test_a_head_that_is_a_dtensor():
    """A replicated one is its local tensor; a sharded one is refused with the ways out."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "1"}
    ran = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    lines = ran.stdout.splitlines()
    assert len(lines) == 6
    for line in lines:
        assert re.match(r"weight is a DTensor placed as \(Shard\(dim=0\),\): .* weight.full_tensor\(\).*sharded_", line)
