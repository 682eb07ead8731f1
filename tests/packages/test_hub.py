"""The folder for Hugging Face's kernel hub: its client reads it, and loads two versions into one process."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fdpg_kernels

REPOSITORY = Path(__file__).resolve().parents[2]
CLIENT = "kernels==0.17.2"  # not installed beside the tests: transformers would use it
PROGRAM = """
import sys
from pathlib import Path

import torch
from kernels import get_loaded_kernels, get_local_kernel
from kernels._rust import Backend, Build

source, *builds = map(Path, sys.argv[1:])
assert Build.open(source).general.backends == [Backend.CPU, Backend.CUDA]
hidden, head, ids = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, -100, 4])
versions = [get_local_kernel(folder, backend="cpu") for folder in builds]
for version, loaded in zip(versions, get_loaded_kernels(), strict=True):
    compiled = torch.compile(version.linear_logprob, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden, head, ids), versions[0].linear_logprob(hidden, head, ids))
    operators = sys.modules[f"{version.__name__}.operators"]
    assert operators.NAMESPACE == loaded.metadata.id  # the hub's rule for names of operators
    print(operators.NAMESPACE, version.__version__)
"""


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A folder with the hub's client, for PYTHONPATH; what it requires comes with transformers."""
    folder = tmp_path_factory.mktemp("client")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, CLIENT]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if ran.returncode and not os.environ.get("CI"):
        pytest.skip(f"{CLIENT} cannot be installed: {ran.stderr[-200:]}")
    assert ran.returncode == 0, ran.stderr
    return folder


def build(source, folder, revision):
    """What kernel-builder makes of a source that compiles nothing: for each backend the Python files and metadata."""
    general = tomllib.loads((source / "build.toml").read_text())["general"]
    name = general["name"].replace("-", "_")
    for backend in general["backends"]:
        variant = folder / "build" / f"torch-{backend}"
        shutil.copytree(source / "torch-ext" / name, variant, ignore=shutil.ignore_patterns("__pycache__"))
        metadata = {k: general[k] for k in ("name", "version", "license")} | {"id": f"_{name}_{backend}_{revision}"}
        metadata |= {"python-depends": [], "backend": {"type": backend}}
        (variant / "metadata.json").write_text(json.dumps(metadata))
    return folder


def test_two_versions_load_beside_each_other(client, tmp_path):
    source = tmp_path / "source"
    subprocess.run(["make", "hub", f"HUB={source}"], cwd=REPOSITORY, check=True, capture_output=True)
    first = build(source, tmp_path / "first", "0a1b2c3")
    package = source / "torch-ext" / "fdpg_kernels" / "__init__.py"
    package.write_text(package.read_text() + '\n__version__ = "next"\n')
    second = build(source, tmp_path / "second", "4d5e6f7")
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, source, first, second],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        | {"PYTHONPATH": str(client), "HF_HUB_OFFLINE": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    mine = fdpg_kernels.__version__
    assert ran.stdout.split() == ["_fdpg_kernels_cpu_0a1b2c3", mine, "_fdpg_kernels_cpu_4d5e6f7", "next"]
