"""Compile every kernel in every shipped configuration for GPUs that are not here, and check what comes out.

    PYTHONPATH=kernels:tests python -m support.ahead_of_time FILE.json   # all chips, with the Triton that is installed
    PYTHONPATH=kernels:tests python -m support.compiled_table NEWEST.json OLDEST.json   # docs/kernels-compiled.md

Triton's compiler and NVIDIA's assembler run without a GPU; registers, stack, shared memory and instructions are read
off the machine code (`machine_code`). `tests/kernels/test_compiled.py` compiles a part of it. Triton 3.6 brings a
disassembler that does not know sm_103: TRITON_NVDISASM_PATH names a newer one.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fdpg_kernels.triton import entries, gemm, rows, tiles
from fdpg_kernels.triton import weigh as weights
from fdpg_kernels.triton.tiles import Config

from . import machine_code

OWN_PRODUCT = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 103: "UTCHMMA", 120: "HMMA"}
GIVEN = "a pointer"
HALVES = "float32 in halves"
CROWDED = dict(RAGGED=True, HAS_BIAS=True, HAS_SOFTCAP=True, temperature_ptr=GIVEN)
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "ragged V": dict(RAGGED=True),
    "ragged, guarded": dict(RAGGED=True, GUARDED=True),
    "soft cap": dict(RAGGED=True, HAS_SOFTCAP=True),
    "bias, soft cap, row temperatures, ragged, guarded": dict(GUARDED=True, **CROWDED),
}
OF_ANCHORED: dict[str, dict[str, Any]] = {  # instead of E
    "gradient": dict(alpha_ptr=GIVEN),
    "gradient, entropy's": dict(alpha_ptr=GIVEN, beta_ptr=GIVEN),
}
OF_STATISTICS: dict[str, dict[str, Any]] = {"entropy": dict(moment_ptr=GIVEN)}
for _features, _one in ((OF_ANCHORED, "gradient, entropy's"), (OF_STATISTICS, "entropy")):
    _features[f"{_one}, bias, soft cap, row temperatures, ragged"] = _features[_one] | CROWDED


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


def cases() -> Iterator[Case]:
    """Everything that `tiles.choose` and the launcher can ask for on every chip, and the candidates."""
    for chip in tiles.SHIPPED:
        for config in tiles.candidates(chip, aligned=True):
            plain_only = config in tiles.PLAIN_ONLY + tiles.CANDIDATES
            possible = [*product((True,), (FEATURES | OF_ANCHORED).items())]
            possible += product((False,), (FEATURES | OF_STATISTICS).items())
            for anchored, (feature, constants) in possible:
                crowded = "HAS_SOFTCAP" in constants
                if not plain_only if crowded else config != tiles.SQUARE:
                    yield _gemm(chip, config, anchored, feature, constants)
                    if anchored and {"GUARDED", "beta_ptr"} & constants.keys() and config not in tiles.CANDIDATES:
                        yield _gemm(chip, config, anchored, feature, constants, "float16")
                        if config != tiles.UNALIGNED and not plain_only:  # halves are aligned by their making
                            yield _gemm(chip, config, anchored, feature, constants, HALVES)
        yield from _row_kernels(chip)


def _gemm(
    chip: int, config: Config, anchored: bool, feature: str, constants: dict[str, Any], dtype: str = "bfloat16"
) -> Case:
    kind, split = "fp16" if dtype == "float16" else "bf16", dtype == HALVES

    def matrix(height: int, width: int, kind: str) -> str:
        return f"tensordesc<{kind}[{height}, {width}]>" if config.tma else f"*{kind}"

    flags: dict[str, Any] = dict(HAS_BIAS=False, HAS_SOFTCAP=False, RAGGED=False, GUARDED=False)
    flags |= dict(EVEN_D=split or config != tiles.UNALIGNED, SPLIT=split)
    nothing = ("temperature_ptr", "alpha_ptr", "beta_ptr", "moment_ptr") + ("e_low",) * (not split)
    flags |= dict.fromkeys(nothing) | constants
    flags = {name: value for name, value in flags.items() if value != GIVEN}
    types = {"x": matrix(config.BM, config.BD, kind), "w": matrix(config.BV, config.BD, kind)}
    types |= dict.fromkeys(("e", "e_low"), matrix(config.BM, config.BV, "bf16"))
    types |= {"bias_ptr": "*fp32" if split else f"*{kind}", "flag_ptr": "*i32", "scale2": "fp32", "softcap": "fp32"}
    # as at run time, so many of the sizes are multiples of 16 (D = 4,096, V = 49,152) that loads come in words of 16
    types |= dict.fromkeys(
        ("D", "stride_x", "stride_w") * flags["EVEN_D"] + ("V", "stride_e") * (not flags["RAGGED"]), "i32:16"
    )
    tile = f"{config.BM}×{config.BV}×{config.BD}{' TMA' if config.tma else ''}"
    return Case(
        f"{'anchored' if anchored else 'statistics'} {tile}, {feature}{'' if dtype == 'bfloat16' else f', {dtype}'}",
        chip,
        gemm.head_gemm,
        types,
        flags
        | dict(ANCHORED=anchored, TMA=config.tma, UPCAST=False)
        | dict(BM=config.BM, BV=config.BV, BD=config.BD, GROUP_M=16, FLAG_ROWS=32),
        dict(num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.registers, enable_fp_fusion=True),
        config,
    )


def _row_kernels(chip: int) -> Iterator[Case]:
    head = {"x_ptr": "*bf16", "w_ptr": "*bf16", "bias_ptr": "*bf16", "e_ptr": "*bf16", "scaled_ptr": "*bf16"}
    ids = {name: "*i64" for name in ("target_ids_ptr",)}
    ints = {f"{n}_ptr": "*i32" for n in ("flag", "block_sequence", "first_block", "cu_seqlens", "counter", "sequence")}
    scalars = {name: "fp32" for name in ("inverse_temperature", "temperature", "softcap", "divisor")}
    wide = {f"{n}_ptr": "*fp64" for n in ("score", "log_z", "baseline", "result")} | {"clipped_ptr": "*i8"}
    types = head | ids | ints | scalars | wide
    halves = {"x_ptr": "*fp32", "e_low_ptr": "*bf16", "scaled_low_ptr": "*bf16"}
    both = dict(HAS_BIAS=True, HAS_SOFTCAP=True)
    caps = dict(HAS_RATIO=True, LOG_RATIO_CAP=2.0, LOG_RATIO_DROP=3.0, REWARD_CAP=5.0, HAS_BASELINE=True)
    for family, exponent in (("power", -0.5), ("jensen_shannon", 0.0), ("reverse_kl", 0.0), ("total_variation", 0.0)):
        at_infinity = math.inf if family == "reverse_kl" else 1.0
        law = dict(FAMILY=family, EXPONENT=exponent, FACTOR=-1.0, AT_INFINITY=at_infinity, BT=128) | caps
        for kernel in (weights.weigh_sequences, rows.finish_sequences):
            yield Case(f"{kernel.__name__} {family}", chip, kernel, types, law, dict(num_warps=4))
    for kernel, constants, *others in (
        (rows.target_logits, both | dict(ANCHORED=True, BT=16, BD=128)),
        (rows.sum_rows, dict(BT=32, BS=128)),
        (rows.finish_statistics, dict(GUARDED=True, BT=32, BS=128)),
        (entries.prepare_gradients, dict(e_low_ptr=None, scaled_low_ptr=None, HAS_SOFTCAP=True, BT=32, BD=128)),
        (entries.prepare_gradients, dict(HAS_SOFTCAP=True, BT=32, BD=64), halves),
        (entries.write_targets, dict(e_low_ptr=None, HAS_SOFTCAP=True, BT=128)),
        (entries.write_targets, dict(HAS_SOFTCAP=True, BT=128), halves),
    ):
        yield Case(kernel.__name__, chip, kernel, types | dict(*others), constants, dict(num_warps=4))


def build(case: Case) -> dict[str, Any]:
    """What the machine code says of itself, a record of plain numbers."""
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
    code = machine_code.read(binary.asm["cubin"])
    made = dict(chip=case.chip, name=case.name, warps=case.options["num_warps"], registers=code.registers)
    made |= dict(stack=code.stack + code.local, shared=binary.metadata.shared, programs_per_sm=1)
    made |= dict(barrier_before_ticket=_has_barrier_before_ticket(binary.asm["ptx"]))
    made |= dict(instructions=sum(code.instructions.values()))
    made |= {name: code.instructions[name] for name in ("STL", "LDL", "UTMALDG", *machine_code.PRODUCTS)}
    if (config := case.config) is not None:
        logits = config.BM * config.BV / (32 * config.num_warps)  # of a thread
        made |= dict(stages=config.num_stages, tma=config.tma, programs_per_sm=config.programs_per_sm)
        made |= dict(instructions_per_logit=round(made["instructions"] / logits, 2))
        made |= dict(epilogue_per_logit=round(code.epilogue / logits, 2))
    return made


def _has_barrier_before_ticket(ptx: str) -> bool | None:
    """Whether all warps' stores are waited for before one thread draws a ticket for them; None: it draws none."""
    before, ticket, _ = ptx.partition("atom.global.gpu.acq_rel")
    return "bar.sync" in before[before.rindex("st.global") :] if ticket else None


def faults(made: dict[str, Any]) -> list[str]:
    """What must not be, of a record of `build`."""
    programs, limit = made["programs_per_sm"], tiles.SHARED_MEMORY[made["chip"]]
    is_product = "epilogue_per_logit" in made
    wrong = {
        "spills": made["stack"] or made["STL"] or made["LDL"],
        "too much shared memory": programs * (made["shared"] + 1024) > limit + 1024,  # 1 KiB of each is the system's
        "too many registers for its programs": programs * made["warps"] * 32 * made["registers"] > tiles.REGISTERS,
        "not on tensor cores": is_product and not made[OWN_PRODUCT[made["chip"]]],
        "no bulk loads": is_product and made["tma"] and not made["UTMALDG"],
        "no barrier before a ticket": made["barrier_before_ticket"] is False,
    }
    return [f"sm_{made['chip']} {made['name']}: {what}" for what, is_so in wrong.items() if is_so]


def build_all(chosen: list[Case]) -> Iterator[dict[str, Any]]:
    """Records of these cases, compiled two at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(build, chosen)


def main(path: str) -> None:
    kernels = []
    for made in build_all(list(cases())):
        kernels.append(made)
        print(made, file=sys.stderr, flush=True)
    text = ",\n".join(json.dumps(made, ensure_ascii=False) for made in kernels)
    Path(path).write_text(f'{{"triton": "{triton.__version__}", "kernels": [\n{text}\n]}}\n')
    if wrong := [line for made in kernels for line in faults(made)]:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main(sys.argv[1])
