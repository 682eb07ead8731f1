"""Align a language model with an explicit preference: f-DPG (Go et al., ICML 2023).

from fdpg_fast import Trainer, load_config
Trainer(load_config("examples/quickstart.yaml")).train()
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config.load import load_config as load_config
    from .config.schema import TrainConfig as TrainConfig
    from .trainer import RunResult as RunResult
    from .trainer import Trainer as Trainer

__version__ = "0.1.0"

_HOME = {"TrainConfig": "config.schema", "load_config": "config.load", "RunResult": "trainer", "Trainer": "trainer"}


def __getattr__(name: str) -> Any:
    """Import on first use: the command line must set thread options before torch loads, and answer --help at once."""
    from importlib import import_module

    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
