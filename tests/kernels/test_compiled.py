"""Every kernel in every shipped configuration, compiled for GPUs that are not here: what its machine code must hold.

The compiling runs in a process of its own: here kernels belong to Triton's interpreter.
"""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json
from support.ahead_of_time import build_all
from fdpg_kernels.triton.tiles import SHARED_MEMORY
for case, made in build_all():
    kind = case.config and ("TMA" if case.config.tma else "pointers")
    print(json.dumps(dict(vars(made), name=case.name, chip=case.chip, loads=kind, limit=SHARED_MEMORY[case.chip])))
"""


@pytest.fixture(scope="module")
def compiled():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    ran = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=1200)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [json.loads(line) for line in ran.stdout.splitlines()]


def offenders(compiled, is_wrong):
    return [f"sm_{made['chip']} {made['name']}" for made in compiled if is_wrong(made)]


def test_everything_is_there(compiled):
    assert {made["chip"] for made in compiled} == {80, 90, 100}
    assert sum(made["loads"] is not None for made in compiled) >= 40 and len(compiled) >= 80


def test_nothing_spills(compiled):
    assert not offenders(compiled, lambda made: made["stack"] + made["local"] > 0)
    assert not offenders(compiled, lambda made: {"STL", "LDL"} & made["instructions"].keys())


def test_shared_memory_fits(compiled):
    assert not offenders(compiled, lambda made: made["shared"] > made["limit"])


def test_products_run_on_tensor_cores(compiled):
    own = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
    assert not offenders(compiled, lambda made: made["loads"] and not made["instructions"].get(own[made["chip"]]))


def test_bulk_loads_where_the_chip_has_them(compiled):
    assert not offenders(compiled, lambda made: made["loads"] == "TMA" and not made["instructions"].get("UTMALDG"))


def test_a_ticket_is_drawn_after_the_stores_of_all_warps(compiled):
    tickets = [made for made in compiled if made["barrier_before_ticket"] is not None]
    assert {made["name"].split()[0] for made in tickets} == {"finish_sequences"} and len(tickets) == 12
    assert not offenders(tickets, lambda made: not made["barrier_before_ticket"])
