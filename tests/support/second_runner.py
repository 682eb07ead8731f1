"""A pytest plugin: vLLM's second model runner, which GPUs get, here on the CPU and under Triton's interpreter.

vLLM refuses it where Triton has no backend for the device, which interpreted kernels do not need.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}

from triton.backends import backends

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))


def pytest_sessionfinish() -> None:
    assert "vllm.v1.worker.cpu.model_runner" in sys.modules, "vLLM took its first model runner"
