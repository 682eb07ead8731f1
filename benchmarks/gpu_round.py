"""Whole rounds on one NVIDIA GPU with each engine, and what they are made of: tokens/s, syncs, gaps, memory.

python -m benchmarks.gpu_round --out DIR                        from the repository root; at most 8 minutes
python -m benchmarks.gpu_round --out DIR --smoke --device cpu   a tiny model: does it run?

Every engine has a process of its own, since vLLM gives its memory back only at the end of one; what fails there is
recorded, and the others go on. Engines are checked before they are timed. Writes DIR/round-<chip>-<date>.json (every
single repeat) and a Markdown table whenever an engine has found something, and a figure at the end.
"""

from __future__ import annotations

import importlib.util
import platform
import re
import sys
import tomllib
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))  # last: an installed fdpg_kernels comes first

from benchmarks.gpu_options import make_parser, why_not

ROOT = Path(__file__).resolve().parents[1]
MODULES = {"pyyaml": "yaml"}  # where a distribution and its module differ by more than a hyphen


def missing() -> list[str]:
    """What the library needs by pyproject.toml and this machine does not have."""
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {need.partition(";")[0].strip(): re.split(r"[^\w-]", need)[0].lower() for need in needs}
    modules = {need: MODULES.get(name, name.replace("-", "_")) for need, name in names.items()}
    return [need for need, module in modules.items() if importlib.util.find_spec(module) is None]


def what_to_carry(needs: list[str]) -> str:
    """How they get to a machine without a network."""
    platforms = [f"manylinux_2_{version}_{platform.machine()}" for version in (17, 28)]
    options = " ".join(f"--platform {name}" for name in platforms)
    quoted = " ".join(f"'{need}'" for need in needs)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return (
        f"not installed here: {', '.join(needs)}. Where there is a network:\n"
        f"    pip download -d wheels --only-binary=:all: --python-version {version} {options} {quoted}\n"
        "and here, with the folder carried over:\n"
        "    pip install --no-index --no-deps --target site wheels/*.whl && export PYTHONPATH=$PWD/site"
    )


def main(argv: list[str] | None = None) -> int:
    parser = make_parser("benchmarks.gpu_round", str(__doc__), minutes=7.5, repeats=3)
    options = parser.parse_args(argv)
    if reason := why_not(options) or (what_to_carry(needs) if (needs := missing()) else None):
        print(reason, file=sys.stderr)
        return 2
    from benchmarks.gpu_round_runs import run_all  # imports the library, and so all that it needs

    return run_all(options)


if __name__ == "__main__":
    sys.exit(main())
