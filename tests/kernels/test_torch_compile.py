"""Under torch.compile an op is one node, with the values and gradients that it has without; autocast is obeyed."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule

from fdpg_kernels import Divergence, fdpg_loss, linear_logprob, sequence_weights
from support.kernel_cases import head_batch

LEAVES = ("hidden", "weight", "bias")


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    return []


def backend(graphs):
    def keep(graph: GraphModule, _inputs):
        calls = [node for node in graph.graph.nodes if node.op == "call_function"]
        # an op that may write to an argument is wrapped in a node that says so
        graphs.append([str(n.args[0] if "functionalized" in str(n.target) else n.target) for n in calls])
        return graph

    return aot_autograd(fw_compiler=keep, bw_compiler=keep)


def ours(graph):
    return [name for name in graph if name.startswith("fdpg_kernels.")]


@pytest.mark.parametrize("everything", [False, True], ids=["one id", "entropy, lse, [B, T, D], K ids"])
@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_linear_logprob(graphs, impl, everything):
    arguments = {k: x.float() if x.is_floating_point() else x for k, x in head_batch([3, 0, 9, 4]).items()}
    arguments = {k: arguments[k].detach() for k in (*LEAVES, "target_ids")}
    arguments["target_ids"][3] = -100
    flags = dict(temperature=0.8, impl=impl)
    if everything:
        arguments["hidden"] = arguments["hidden"].reshape(2, 8, 5)
        ids = arguments["target_ids"]
        arguments["target_ids"] = torch.stack([ids, ids.flip(0)], 1).view(2, 8, 2)
        flags |= dict(return_entropy=True, return_lse=True)

    def loss(leaves):
        made = linear_logprob(**arguments | leaves, **flags)
        results = made if everything else (made,)
        return sum((x * torch.arange(x.numel()).view(x.shape)).sum() for x in results)

    found = []
    for run in (loss, torch.compile(loss, backend=backend(graphs), fullgraph=True)):
        leaves = {k: arguments[k].clone().requires_grad_() for k in LEAVES}
        value = run(leaves)
        found.append([value.detach(), *torch.autograd.grad(value, leaves.values())])
    for mine, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, mine)
    forward, backward = graphs
    assert ours(forward) == ["fdpg_kernels.linear_logprob.default"]
    assert ours(backward) == ["fdpg_kernels.linear_logprob_backward.default"]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("divergence", ["jensen_shannon", "alpha:0.3"])
def test_fdpg_loss(graphs, divergence, in_place):
    arguments = head_batch([3, 0, 9, 4], zeros=True)

    def loss(leaves, into):
        out = fdpg_loss(**arguments | leaves, divergence=divergence, baseline=0.1, ratio_cap=2.0, weight_grad_out=into)
        return out.loss, out.weights.weight

    found = []
    for run in (loss, torch.compile(loss, backend=backend(graphs), fullgraph=True)):
        leaves = {k: arguments[k].detach().clone().requires_grad_() for k in LEAVES}
        into = torch.zeros_like(leaves["weight"]) if in_place else None
        value, weight = run(leaves, into)
        wanted = [leaves[k] for k in LEAVES if not (in_place and k == "weight")]
        found.append([value.detach(), weight, *torch.autograd.grad(value, wanted), *([into] if in_place else [])])
    for mine, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, mine)
    assert ours(graphs[0]) == ["fdpg_kernels.fdpg_loss.default"]
    assert not ours(graphs[1])  # the gradients were made in the forward pass


@pytest.mark.parametrize("impl", ["chunked", "triton", "reference"])
def test_sequence_weights(graphs, impl):
    arguments = head_batch([3, 0, 9, 4], zeros=True)
    names = ("behavior_logprob", "cu_seqlens", "target_log_score", "log_z")
    policy = arguments["behavior_logprob"].detach() - 0.1

    def weights(policy):
        return sequence_weights(policy, *(arguments[k] for k in names), baseline=0.1, ratio_cap=2.0, impl=impl)

    compiled = torch.compile(weights, backend=backend(graphs), fullgraph=True)(policy)
    for mine, theirs in zip(compiled, weights(policy), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert ours(graphs[0]) == ["fdpg_kernels.sequence_weights.default"]


def test_a_divergence_of_ones_own_is_found_by_its_key():
    mine = Divergence("jensen_shannon", lambda t: (t - 1) ** 2 / (t + 1), 1.0)  # not the one that the name says
    arguments = head_batch([3, 0, 9, 4], zeros=True)

    def loss(hidden):
        return fdpg_loss(**arguments | {"hidden": hidden}, divergence=mine).loss

    hidden = arguments["hidden"].detach()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden), loss(hidden))
    torch.testing.assert_close(loss(hidden), fdpg_loss(**arguments, divergence=mine, impl="reference").loss)


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT if x.ndim == 2 else x,
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "repeated": lambda x: x[:1].expand(x.shape) if x.is_floating_point() else x,
}


@pytest.mark.parametrize("lengths", [[3, 0, 9, 4], [0, 0]], ids=str)
@pytest.mark.parametrize(
    ("layout", "dtype"), zip(LAYOUTS, (torch.float64, torch.bfloat16, torch.float32, torch.bfloat16), strict=True)
)
@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_operators_are_what_they_say(impl, layout, lengths, dtype):
    """Schemas, and shapes, dtypes and strides that torch.compile is told, however inputs lie in memory."""
    if impl == "triton" and dtype == torch.float64:
        dtype = torch.float32  # it multiplies no float64
    place = LAYOUTS[layout]
    arguments = {k: place(x.detach()) for k, x in head_batch(lengths).items() if x.ndim}
    arguments |= {k: arguments[k].to(dtype) for k in LEAVES}
    arguments["target_ids"][::3] = -100
    sizes = torch.int64 if layout == "strided" else torch.int32
    head = (*(arguments[k] for k in ("hidden", "target_ids", "weight", "bias")), 0.8, 2.0)
    names = ("cu_seqlens", "behavior_logprob", "target_log_score")
    sequences, options = [arguments[k] for k in names], ("alpha:0.3", torch.tensor(0.1), "sequence", 2.0, 3.0, None)
    sequences = [sequences[0].to(sizes), *sequences[1:], torch.tensor(0.1)]
    wants, ops = (True, True, False), torch.ops.fdpg_kernels
    temperatures = place(torch.ones(sum(lengths)))
    for of_head, weight_grad_dtype in (((*head, None), None), ((*head, temperatures), torch.float32)):
        checked = (*of_head, weight_grad_dtype, 1000, *sequences, 4, *options, wants, impl)
        torch.library.opcheck(ops.fdpg_loss.default, checked)
        hidden, ids, *rest = of_head
        for K, with_entropy in ((1, False), (3, True)):
            many = place(ids[:, None].expand(-1, K).contiguous())
            head_and_rows = (*rest, None, 1000)
            forward = (hidden, many, *head_and_rows, with_entropy, impl)
            torch.library.opcheck(ops.linear_logprob.default, forward)
            logprob, lse, entropy = ops.linear_logprob(*forward)
            given = (place(torch.ones_like(logprob)), place(torch.ones_like(lse).to(logprob)))
            given += (place(torch.ones_like(given[1])) if with_entropy else None,)
            backward = (hidden, many, *head_and_rows, logprob, lse, *given, wants, impl)
            torch.library.opcheck(ops.linear_logprob_backward.default, backward)
    torch.library.opcheck(ops.sequence_weights.default, (logprob[:, 0], *sequences, *options, impl))


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_autocast_means_bfloat16_inputs_and_nothing_else(impl):
    """The answer is that of rounded inputs, with float32 accumulation; gradients come back in the parameters' dtype."""
    arguments = {k: x.detach().float() if x.is_floating_point() else x for k, x in head_batch([3, 0, 9, 4]).items()}
    del arguments["bias"]
    rounded = arguments | {k: arguments[k].bfloat16() for k in ("hidden", "weight")}
    expected = fdpg_loss(**rounded, impl=impl)
    leaves = {k: arguments[k].clone().requires_grad_() for k in ("hidden", "weight")}
    with torch.autocast("cpu", torch.bfloat16):
        out = fdpg_loss(**arguments | leaves, impl=impl)
        logprob = linear_logprob(*leaves.values(), arguments["target_ids"], impl=impl)
        (out.loss + logprob.sum()).backward()
    torch.testing.assert_close(out.loss.detach(), expected.loss, rtol=1e-6, atol=0)
    same = linear_logprob(rounded["hidden"], rounded["weight"], arguments["target_ids"], impl=impl)
    torch.testing.assert_close(logprob.detach(), same, rtol=0, atol=0)
    assert logprob.dtype == leaves["hidden"].grad.dtype == leaves["weight"].grad.dtype == torch.float32
