"""fdpg_kernels needs torch (and Triton) only, and the folder it lives in does not shadow anyone's package."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import fdpg_kernels

REPOSITORY = Path(__file__).resolve().parents[2]


def closure(*names: str) -> set[str]:
    """The installed distributions among `names` and whatever they require, recursively."""
    found, queue = set(), list(names)
    while queue:
        name = queue.pop()
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a requirement of another platform, or Triton on a machine without it
        if distribution.name in found:
            continue
        found.add(distribution.name)
        for line in distribution.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                queue.append(requirement.name)
    return found


@pytest.fixture
def site(tmp_path):
    """A site-packages of symlinks to torch, Triton, NumPy, what they require, and fdpg_kernels."""
    for name in closure("torch", "triton", "numpy"):
        distribution = importlib.metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or ()} - {"..", "/", "__pycache__"}
        for top in tops:
            source, link = Path(distribution.locate_file(top)), tmp_path / top
            if source.exists() and not link.exists():  # several distributions share a folder nvidia/
                link.symlink_to(source)
    (tmp_path / "fdpg_kernels").symlink_to(Path(fdpg_kernels.__file__).parent)
    return tmp_path


PROGRAM = """
import sys
sys.path.append({site!r})
from importlib.util import find_spec
for absent in ("transformers", "fdpg_fast", "vllm", "pytest", "yaml"):
    assert find_spec(absent) is None, absent

import fdpg_kernels
import torch
hidden = torch.randn(3, 4, requires_grad=True)
out = fdpg_kernels.fdpg_loss(
    hidden, torch.randn(5, 4), torch.tensor([0, 1, 2]), torch.tensor([0, 2, 3], dtype=torch.int32),
    torch.full((3,), -1.5), torch.tensor([-2.0, float("-inf")]), torch.tensor(0.0),
)
out.loss.backward()
assert torch.isfinite(hidden.grad).all() and hidden.grad.abs().sum() > 0
foreign = {{name.partition(".")[0] for name in sys.modules}} & {{"transformers", "fdpg_fast", "vllm"}}
assert not foreign, foreign
print("ok", fdpg_kernels.__file__)
"""


def python(*arguments, **options):
    # PYTHONPATH is dropped: it may hold this very repository
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, **options)


def test_it_runs_where_only_torch_and_triton_are_installed(site):
    ran = python("-I", "-S", "-c", PROGRAM.format(site=str(site)), cwd=site)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["ok", str(site / "fdpg_kernels" / "__init__.py")]


def test_the_source_root_is_not_a_package():
    assert (REPOSITORY / "kernels" / "fdpg_kernels" / "__init__.py").exists()
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()


def test_transformers_imports_with_the_repository_first_on_the_path():
    # transformers runs `from kernels import …` where Hugging Face's package of that name seems present
    program = (
        "import importlib.util, sys; assert sys.path[0] == ''\n"
        "spec = importlib.util.find_spec('kernels'); assert spec is None or spec.loader is None or "
        f"not spec.origin.startswith({str(REPOSITORY)!r}), spec\n"
        "import transformers; from transformers import AutoModelForCausalLM; print('ok')"
    )
    ran = python("-c", program, cwd=REPOSITORY)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split()[-1] == "ok"
