"""The example that puts the ops into another training loop learns its constraint both ways."""

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[1] / "examples/ops_in_another_trainer.py"


def test_both_losses_learn_the_constraint():
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # the same sums in the same order on any machine
    ran = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=300, env=environment)
    assert ran.returncode == 0, ran.stderr
    found = re.findall(r"(\S+) +([\d.]+) % satisfy; .* occurs ([\d.]+) times", ran.stdout)
    percent = {name: float(value) for name, value, _ in found}
    copies = {name: float(value) for name, _, value in found}
    assert 30 < percent["before"] < 60
    assert percent["GRPO"] > 90 and percent["f-DPG"] > 90
    # what the comments promise: f-DPG changes no more than was asked for
    assert copies["f-DPG"] < copies["before"] + 0.3 < copies["GRPO"]
