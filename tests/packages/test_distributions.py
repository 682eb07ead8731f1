"""The two wheels, built and installed where nothing else is: what they hold, what they need, what runs there."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = {"fdpg_kernels": REPOSITORY / "kernels", "fdpg_fast": REPOSITORY}


def run(*command, **options):
    # neither this repository nor an index of packages: no paths to look for modules, no settings of pip
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_"))}
    ran = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=120,
        env=environment | {"PIP_CONFIG_FILE": os.devnull},
        **options,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the source archive of each package, and the wheel made from it."""
    folder = tmp_path_factory.mktemp("built")
    for source in SOURCES.values():
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    return folder


def installed_with(*names):
    """The installed distributions among `names` and whatever they require, recursively."""
    found, queue = {}, list(names)
    while queue:
        name = queue.pop()
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a requirement of another platform
        if distribution.name not in found:
            found[distribution.name] = distribution
            requirements = map(Requirement, distribution.requires or ())
            queue += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found.values()


def environment(folder, built, wanted, *names):
    """The Python of a new environment: links to the installed `names` and what they require, then `wanted` by pip."""
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    for distribution in installed_with(*names):
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "/", "__pycache__"}:
            source, link = Path(distribution.locate_file(top)), site / top
            if source.exists() and not link.exists():  # several distributions share a folder nvidia/
                link.symlink_to(source)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--find-links", built, wanted)
    return python


@pytest.fixture(scope="module")
def beside_torch(tmp_path_factory, built):
    """A Python with torch and fdpg-kernels, without NumPy or Triton."""
    return environment(tmp_path_factory.mktemp("ops"), built, "fdpg-kernels", "torch")


@pytest.fixture(scope="module")
def beside_all(tmp_path_factory, built):
    """A Python with fdpg-fast and all that it requires, and Triton as a torch for GPUs brings it."""
    names = {Requirement(line).name for line in importlib.metadata.requires("fdpg-fast") if "extra ==" not in line}
    return environment(tmp_path_factory.mktemp("all"), built, "fdpg-fast", *names - {"fdpg-kernels"}, "triton")


@pytest.mark.parametrize("package", SOURCES)
def test_a_wheel_holds_its_package_and_nothing_else(built, package):
    source = SOURCES[package]
    files = {str(file.relative_to(source)) for file in (source / package).rglob("*") if file.is_file()}
    (wheel,) = built.glob(f"{package}-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    dist_info = {name for name in held if ".dist-info/" in name}
    assert f"{package}/py.typed" in held
    assert held - dist_info == {name for name in files if "__pycache__" not in name}
    assert any(name.endswith("/licenses/LICENSE") for name in dist_info)
    (archive,) = built.glob(f"{package}-*.tar.gz")
    with tarfile.open(archive) as members:
        (licence,) = [member for member in members if member.name.endswith("/LICENSE")]
    assert licence.isfile() and licence.size == (REPOSITORY / "LICENSE").stat().st_size  # a link would dangle


def test_the_ops_are_small_and_have_a_page_without_broken_links(built):
    (wheel,) = built.glob("fdpg_kernels-*.whl")
    assert wheel.stat().st_size <= 100_000
    assert not re.findall(r"\]\((?!https?://)[^)]*\)", (REPOSITORY / "kernels" / "README.md").read_text())


def test_the_ops_import_quickly_and_nothing_but_torch(beside_torch, beside_all):
    alone = "import time, fdpg_kernels; print(time.process_time())"
    assert any(float(run(beside_torch, "-I", "-c", alone)) <= 2.0 for _ in range(3))  # seconds of a core, with torch
    program = """
import sys, torch
before = set(sys.modules)
import fdpg_kernels
print(*{name.partition(".")[0] for name in sys.modules.keys() - before})
"""
    assert run(beside_all, "-I", "-c", program).split() == ["fdpg_kernels"]


PREPARED = """
import importlib.metadata, re, torch
from types import SimpleNamespace

torch.manual_seed(0)
hidden_states = torch.randn(2, 4, 8, requires_grad=True)
prepared = dict(
    model=SimpleNamespace(
        model=lambda ids: SimpleNamespace(last_hidden_state=hidden_states), lm_head=torch.nn.Linear(8, 11, bias=False)
    ),
    input_ids=torch.randint(11, (2, 4)),
    completion_mask=torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0]]).bool(),
    hidden=torch.randn(6, 8, requires_grad=True),
    head=torch.randn(11, 8, requires_grad=True),
    token_ids=torch.randint(11, (6,)),
    cu_seqlens=torch.tensor([0, 4, 6], dtype=torch.int32),
    sampler_logprob=-torch.rand(6) - 2,
    advantage=torch.randn(6),
    base_logprob=torch.tensor([-9.0, -5.0]),
    log_phi=torch.tensor([0.0, -torch.inf]),
    log_z=torch.tensor(-1.0),
)
"""


def test_the_examples_of_the_page_run_beside_torch_alone(beside_torch, tmp_path):
    program = """
page = importlib.metadata.metadata("fdpg-kernels").get_payload()
for block in re.findall(r"```python\\n(.*?)```", page, re.DOTALL):
    names = dict(prepared)
    exec(block, names)
    loss = names["loss"] if "loss" in names else names["out"].loss
    assert loss.ndim == 0 and loss.isfinite(), block
    print("example", loss.requires_grad)
"""
    ran = run(beside_torch, "-I", "-c", PREPARED + program, cwd=tmp_path)
    assert ran.count("example True") >= 3


def test_the_operators_pass_torchs_checks_beside_torch_alone(beside_torch, tmp_path):
    """`opcheck` of every operator with the arguments that the ops give it, `gradcheck` of the log-probs in float64."""
    program = """
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from fdpg_kernels import fdpg_loss, linear_logprob, operators, sequence_weights

calls = {}
class Record(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == operators.NAMESPACE:
            calls[func] = tree_map_only(torch.Tensor, torch.Tensor.detach, args)  # gradients are those of the ops
        return func(*args, **kwargs or {})

hidden, head, ids, cu_seqlens, sampler = (
    prepared[k] for k in ("hidden", "head", "token_ids", "cu_seqlens", "sampler_logprob")
)
with Record():
    linear_logprob(hidden, head, ids).sum().backward()
    fdpg_loss(hidden, head, ids, cu_seqlens, sampler, prepared["base_logprob"], prepared["log_z"])
    sequence_weights(sampler - 0.1, sampler, cu_seqlens, prepared["base_logprob"], prepared["log_z"])
assert {func._opname for func in calls} == set(operators.KERNELS), calls
for func, args in calls.items():
    torch.library.opcheck(func, args)

leaves = [x.detach().double().requires_grad_() for x in (hidden, head, torch.randn(11))]
logprob = lambda hidden, head, bias: linear_logprob(hidden, head, ids, bias=bias, temperature=0.7, softcap=3.0)
assert torch.autograd.gradcheck(logprob, leaves)
print("checked")
"""
    assert run(beside_torch, "-I", "-c", PREPARED + program, cwd=tmp_path) == "checked\n"


def test_the_command_answers_outside_the_repository(beside_all, tmp_path):
    command, version = beside_all.with_name("fdpg-fast"), importlib.metadata.version("fdpg-fast")
    assert run(command, "--version", cwd=tmp_path) == f"fdpg-fast {version}\n"
    assert run(command, "--help", cwd=tmp_path).startswith("usage:")
