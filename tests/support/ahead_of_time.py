"""Compile every kernel in every shipped configuration for GPUs that are not here, and list what it costs.

    PYTHONPATH=kernels:tests python -m support.ahead_of_time            # prints the table as it grows
    PYTHONPATH=kernels:tests python -m support.ahead_of_time --write    # and writes docs/kernels-compiled.md

Triton's compiler and NVIDIA's assembler run without a GPU; registers, stack, shared memory and instructions are read
off the machine code. `tests/kernels/test_compiled.py` asserts what must hold.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fdpg_kernels.triton import gemm, rows
from fdpg_kernels.triton import tiles as configs
from fdpg_kernels.triton import weigh as weights
from fdpg_kernels.triton.tiles import Config

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TABLE = Path(__file__).resolve().parents[2] / "docs/kernels-compiled.md"
PRODUCTS = ("HMMA", "HGMMA", "UTCHMMA")  # tensor-core instructions of the three generations
CHIPS = {80: "A100", 90: "H100/H200", 100: "B200"}
GIVEN = "a pointer"
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "ragged V": dict(RAGGED=True),
    "ragged, guarded": dict(RAGGED=True, GUARDED=True, EVEN_D=False),
    "bias, soft cap": dict(RAGGED=True, HAS_BIAS=True, HAS_SOFTCAP=True),
    "bias, soft cap, row temperatures, ragged, guarded": dict(
        RAGGED=True, GUARDED=True, EVEN_D=False, HAS_BIAS=True, HAS_SOFTCAP=True, temperature_ptr=GIVEN
    ),
}


@dataclass(frozen=True)
class Case:
    """A kernel with the types of its arguments, its compile-time constants and options, for one chip."""

    name: str
    chip: int
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    config: Config | None = None


@dataclass(frozen=True)
class Compiled:
    """What the machine code says of itself."""

    registers: int
    stack: int
    local: int
    shared: int
    barrier_before_ticket: bool | None  # None: it draws none
    instructions: Counter

    def per_logit(self, case: Case) -> float:
        """Instructions of the whole kernel for each logit of a tile and thread: how lean the epilogue is."""
        assert case.config is not None
        return sum(self.instructions.values()) / (case.config.BM * case.config.BV / (32 * case.config.num_warps))


def cases() -> Iterator[Case]:
    """Everything that `configs.choose` and the launcher can ask for, on every chip."""
    for chip, shipped in configs.SHIPPED.items():
        for config in shipped:
            for anchored in (False, True):
                for feature, constants in FEATURES.items():
                    if "HAS_BIAS" in constants and config in configs.PLAIN_ONLY:
                        continue
                    yield _gemm(chip, config, anchored, feature, constants)
        yield from _row_kernels(chip)


def _gemm(chip: int, config: Config, anchored: bool, feature: str, constants: dict[str, Any]) -> Case:
    def matrix(height: int, width: int) -> str:
        return f"tensordesc<bf16[{height}, {width}]>" if config.tma else "*bf16"

    flags: dict[str, Any] = dict(HAS_BIAS=False, HAS_SOFTCAP=False, RAGGED=False, GUARDED=False, EVEN_D=True)
    flags |= {"temperature_ptr": None} | constants
    flags = {name: value for name, value in flags.items() if value != GIVEN}
    types = {"x": matrix(config.BM, config.BD), "w": matrix(config.BV, config.BD), "e": matrix(config.BM, config.BV)}
    types |= {"bias_ptr": "*bf16", "flag_ptr": "*i32", "scale2": "fp32", "softcap": "fp32"}
    # as at run time, so many of the sizes are multiples of 16 (D = 4,096, V = 49,152) that loads come in words of 16
    types |= dict.fromkeys(
        ("D", "stride_x", "stride_w") * flags["EVEN_D"] + ("V", "stride_e") * (not flags["RAGGED"]), "i32:16"
    )
    tile = f"{config.BM}×{config.BV}×{config.BD}{' TMA' if config.tma else ''}"
    return Case(
        f"{'anchored' if anchored else 'statistics'} {tile}, {feature}",
        chip,
        gemm.head_gemm,
        types,
        flags
        | dict(ANCHORED=anchored, TMA=config.tma, UPCAST=False)
        | dict(BM=config.BM, BV=config.BV, BD=config.BD, GROUP_M=16),
        dict(num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True),
        config,
    )


def _row_kernels(chip: int) -> Iterator[Case]:
    head = {"x_ptr": "*bf16", "w_ptr": "*bf16", "bias_ptr": "*bf16", "e_ptr": "*bf16", "scaled_ptr": "*bf16"}
    ids = {name: "*i64" for name in ("target_ids_ptr",)}
    ints = {f"{n}_ptr": "*i32" for n in ("flag", "block_sequence", "first_block", "cu_seqlens", "counter", "sequence")}
    scalars = {name: "fp32" for name in ("inverse_temperature", "temperature", "softcap", "divisor")}
    wide = {f"{n}_ptr": "*fp64" for n in ("score", "log_z", "baseline", "result")} | {"clipped_ptr": "*i8"}
    types = head | ids | ints | scalars | wide
    both = dict(HAS_BIAS=True, HAS_SOFTCAP=True)
    caps = dict(HAS_RATIO=True, LOG_RATIO_CAP=2.0, REWARD_CAP=5.0, HAS_BASELINE=True)
    for family, exponent in (("power", -0.5), ("jensen_shannon", 0.0), ("reverse_kl", 0.0), ("total_variation", 0.0)):
        at_infinity = math.inf if family == "reverse_kl" else 1.0
        law = dict(FAMILY=family, EXPONENT=exponent, FACTOR=-1.0, AT_INFINITY=at_infinity, BT=128) | caps
        tail = law | dict(HAS_SUMS=True, BS=32)
        for kernel, constants in ((weights.weigh_sequences, law), (rows.finish_sequences, tail)):
            yield Case(f"{kernel.__name__} {family}", chip, kernel, types, constants, dict(num_warps=4))
    for kernel, constants in (
        (rows.target_logits, both | dict(ANCHORED=True, BT=16, BD=128)),
        (rows.find_unsafe_rows, dict(BT=128, BS=32)),
        (rows.finish_statistics, dict(GUARDED=True, BT=128, BS=32)),
        (rows.prepare_gradients, dict(HAS_SOFTCAP=True, PER_SEQUENCE=True, BT=32, BD=128)),
        (rows.prepare_gradients, dict(HAS_SOFTCAP=False, temperature_ptr=None, PER_SEQUENCE=False, BT=32, BD=128)),
    ):
        yield Case(kernel.__name__, chip, kernel, types, constants, dict(num_warps=4))


def build(case: Case) -> Compiled:
    place = {name: i for i, name in enumerate(case.kernel.arg_names)}

    def kind(name: str) -> str:
        if name in case.constants:
            return "constexpr"
        return case.types.get(name, "*fp32" if name.endswith("_ptr") else "i32")

    types = {name: kind(name) for name in place}
    unaligned = {parameter.name for parameter in case.kernel.params if parameter.do_not_specialize_on_alignment}
    multiple = [n for n in place if (types[n].startswith("*") and n not in unaligned) or types[n] == "i32:16"]
    source = ASTSource(
        fn=case.kernel,
        signature={name: kind.removesuffix(":16") for name, kind in types.items()},
        constexprs={(place[name],): value for name, value in case.constants.items()},
        attrs={(place[name],): [["tt.divisibility", 16]] for name in multiple},
    )
    binary = triton.compile(source, target=GPUTarget("cuda", case.chip, 32), options=case.options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        usage = _run("cuobjdump", "-res-usage", str(cubin))
        code = _run("nvdisasm", "-c", str(cubin))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    instructions = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", code, re.M)
    ordered = _has_barrier_before_ticket(binary.asm["ptx"])
    return Compiled(*map(int, found.groups()), binary.metadata.shared, ordered, Counter(instructions))


def _has_barrier_before_ticket(ptx: str) -> bool | None:
    """Whether all warps' stores are waited for before one thread draws a ticket for them."""
    before, ticket, _ = ptx.partition("atom.global.gpu.acq_rel")
    return "bar.sync" in before[before.rindex("st.global") :] if ticket else None


def build_all() -> Iterator[tuple[Case, Compiled]]:
    """Every case, two compilers at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield from zip(list(cases()), pool.map(build, cases()), strict=True)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout


def table() -> str:
    lines = [
        f"Compiled ahead of time with Triton {triton.__version__} by `python -m support.ahead_of_time --write`.",
        "",
        "| chip | kernel | warps, stages | registers | stack + local | shared memory | tensor-core instructions | "
        "bulk loads | instructions / logit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case, made in build_all():
        products = {name: made.instructions[name] for name in PRODUCTS if made.instructions[name]}
        cells = (
            f"sm_{case.chip} {CHIPS[case.chip]}",
            case.name,
            f"{case.options['num_warps']}, {case.options.get('num_stages', 3)}",
            str(made.registers),
            str(made.stack + made.local),
            f"{made.shared:,}",
            ", ".join(f"{count} {name}" for name, count in products.items()) or "–",
            str(made.instructions["UTMALDG"] or "–"),
            f"{made.per_logit(case):.1f}" if case.config else "–",
        )
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    text = table()
    if "--write" in sys.argv[1:]:
        TABLE.write_text("# What the kernels compile to\n\n" + text)
        print(f"wrote {TABLE}")
