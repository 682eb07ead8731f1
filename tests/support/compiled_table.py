"""docs/kernels-compiled.md from two records of `ahead_of_time`: a table of the newest Triton, a sentence on the oldest.

PYTHONPATH=kernels:tests python -m support.compiled_table NEWEST.json OLDEST.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .ahead_of_time import faults
from .machine_code import PRODUCTS

TABLE = Path(__file__).resolve().parents[2] / "docs/kernels-compiled.md"
CHIPS = {80: "A100", 89: "L40S, RTX 40", 90: "H100, H200", 100: "B200", 103: "B300", 120: "RTX 50"}
HEAD = """\
# What the kernels compile to

Every kernel for every chip, compiled without a GPU by `python -m support.ahead_of_time` and read off the machine code.
Instructions are counted for each logit of a tile and thread, once in the whole kernel and once after the loop over D:
that is the epilogue of a tile, without the masks that only the last column of a ragged vocabulary takes and without the
exact hyperbolic tangent that only a tile with a logit beyond its soft cap takes. Inputs are bfloat16; the rows of
float16, the same code but for the types, are left out.
"""


def summary(path: str, made: dict[str, Any]) -> str:
    kernels, chips = made["kernels"], {record["chip"] for record in made["kernels"]}
    wrong = [line for record in kernels for line in faults(record)]
    return (
        f"* Triton {made['triton']} ([raw](../{path})): {len(kernels)} kernels for {len(chips)} chips, at most "
        f"{max(record['registers'] for record in kernels)} registers; "
        + (f"**{len(wrong)} faults**: {'; '.join(wrong)}." if wrong else "no spill, no fault.")
    )


def row(made: dict[str, Any]) -> str:
    products = [f"{made[name]} {name}" for name in PRODUCTS if made[name]]
    cells = (
        f"sm_{made['chip']} {CHIPS[made['chip']]}",
        made["name"],
        f"{made['warps']}, {made.get('stages', 3)}",
        str(made["registers"]),
        f"{made['shared']:,}",
        ", ".join(products) or "–",
        str(made["UTMALDG"] or "–"),
        f"{made['epilogue_per_logit']:.1f}" if "stages" in made else "–",
        f"{made['instructions_per_logit']:.1f}" if "stages" in made else "–",
    )
    return f"| {' | '.join(cells)} |"


def main(newest: str, oldest: str) -> None:
    new, old = (json.loads(Path(path).read_text()) for path in (newest, oldest))
    columns = ("chip", "kernel", "warps, stages", "registers", "shared memory", "tensor-core instructions")
    columns += ("bulk loads", "instructions / logit after the loop", "in all")
    lines = [HEAD, summary(newest, new), summary(oldest, old), "", f"The table is of Triton {new['triton']}.", ""]
    lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [row(made) for made in new["kernels"] if not made["name"].endswith("float16")]
    TABLE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
