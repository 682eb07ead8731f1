"""The folder that fdpg_kernels lives in does not shadow anyone's package."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def python(*arguments, **options):
    # PYTHONPATH is dropped: it may hold this very repository
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, **options)


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
