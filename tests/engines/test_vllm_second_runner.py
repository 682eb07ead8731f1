"""What a GPU's model runner does in another way than a CPU's: where random numbers come from."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_seeds_in_the_model_runner_that_gpus_get():
    # the rest of test_vllm.py passes with it too, in ten minutes
    chosen = ["-k", "equal_seeds", str(HERE / "test_vllm.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "support.second_runner", *chosen]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parents[1])
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout[-4000:] + done.stderr[-1000:]
