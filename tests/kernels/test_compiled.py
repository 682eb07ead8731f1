"""Kernels compiled for GPUs that are not here: what their machine code must hold.

Of sm_90 those that bfloat16 and aligned rows ask for, of all chips those with the most to keep in registers;
`python -m support.ahead_of_time` compiles the rest. The compiling runs in a process of its own:
here kernels belong to Triton's interpreter.
"""

import json
import os
import subprocess
import sys

import pytest

from support.ahead_of_time import faults

PROGRAM = """
import json
from fdpg_kernels.triton.tiles import CANDIDATES, UNALIGNED
from support.ahead_of_time import build_all, cases
anchored = [case for case in cases() if "anchored" in case.name]
crowded = {(case.chip, case.config): case for case in anchored}  # the last has bias, cap and halves, if any has
usual = [c for c in cases() if c.chip == 90 and c.config not in (UNALIGNED, *CANDIDATES) and "float" not in c.name]
for made in build_all(usual + [case for case in crowded.values() if case not in usual]):
    print(json.dumps(made))
"""


@pytest.fixture(scope="module")
def compiled():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    ran = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=1200)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [json.loads(line) for line in ran.stdout.splitlines()]


def test_no_spill_enough_shared_memory_tensor_cores_and_a_barrier_before_each_ticket(compiled):
    assert [line for made in compiled for line in faults(made)] == []
    assert {made["chip"] for made in compiled} == {80, 89, 90, 100, 103, 120}
    tickets = [made["name"].split()[0] for made in compiled if made["barrier_before_ticket"] is not None]
    assert tickets == ["finish_sequences"] * 4


def test_the_epilogue_is_lean(compiled):
    """Masks of a ragged vocabulary and the exact tanh lie beside the way of most tiles."""
    cost = {made["name"]: made["epilogue_per_logit"] for made in compiled if made["chip"] == 90 and "tma" in made}
    assert cost["anchored 128×256×64 TMA, plain"] < 5
    assert cost["anchored 128×256×64 TMA, ragged V"] < cost["anchored 128×256×64 TMA, plain"] + 0.2
    assert cost["anchored 128×128×64 TMA, soft cap"] < cost["anchored 128×128×64 TMA, ragged V"] + 13


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (dict(stack=8), "spills"),
        (dict(STL=1), "spills"),
        (dict(shared=120_000), "too much shared memory"),
        (dict(registers=130), "too many registers"),
        (dict(HGMMA=0, HMMA=4), "not on tensor cores"),
        (dict(UTMALDG=0), "no bulk loads"),
        (dict(barrier_before_ticket=False), "no barrier"),
    ],
    ids=str,
)
def test_what_would_be_a_fault(change, fault):
    sound = dict(chip=90, name="a kernel", warps=8, registers=120, stack=0, shared=98_320, programs_per_sm=2, tma=True)
    sound |= dict(
        barrier_before_ticket=None, STL=0, LDL=0, UTMALDG=4, HMMA=0, HGMMA=4, UTCHMMA=0, epilogue_per_logit=4.6
    )
    assert faults(sound) == []
    (found,) = faults(sound | change)
    assert fault in found
