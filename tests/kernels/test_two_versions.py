"""Several versions of the ops live in one process, as those loaded from Hugging Face's kernel hub do."""

import importlib.util
import sys

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

import fdpg_kernels
from support.kernel_cases import head_batch

# names of modules as the hub's client gives them, and as an older one does, a bare hash; their operators' namespaces
NAMESPACES = {
    "fdpg_kernels": "fdpg_kernels",
    "_fdpg_kernels_cpu_0a1b2c3": "_fdpg_kernels_cpu_0a1b2c3",
    "_fdpg_kernels_cpu_4d5e6f7": "_fdpg_kernels_cpu_4d5e6f7",
    "0ff1ce": "_0ff1ce",
}


@pytest.fixture(scope="module")
def versions():
    """The package as it is imported, and others loaded beside it the way the hub's client does it."""
    loaded = {"fdpg_kernels": fdpg_kernels}
    for name in NAMESPACES.keys() - loaded.keys():
        spec = importlib.util.spec_from_file_location(name, fdpg_kernels.__file__)
        loaded[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded[name])
    return loaded


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_each_runs_and_compiles_to_its_own_operators(versions, impl):
    arguments = {k: x.detach().float() if x.is_floating_point() else x for k, x in head_batch([3, 0, 9, 4]).items()}
    head = [arguments[k] for k in ("hidden", "weight", "target_ids")]
    expected = fdpg_kernels.fdpg_loss(**arguments, impl="reference").loss.float()
    for name, ops in versions.items():
        seen = set()

        def keep(graph, _inputs, seen=seen):
            seen |= {str(node.target).partition(".")[0] for node in graph.graph.nodes if node.op == "call_function"}
            return graph

        def run(ops=ops):
            return ops.linear_logprob(*head, impl=impl), ops.fdpg_loss(**arguments, impl=impl).loss

        torch._dynamo.reset()
        compiled = torch.compile(run, backend=aot_autograd(fw_compiler=keep), fullgraph=True)()
        torch.testing.assert_close(compiled, run(), rtol=0, atol=0)
        torch.testing.assert_close(compiled[1], expected)
        assert NAMESPACES[name] in seen
        assert not seen & (set(NAMESPACES.values()) - {NAMESPACES[name]})
