"""A run of gpu.py as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

Record = dict[str, Any]
EXPLANATION = """\
Medians; backends are named. TFLOP/s count useful work only: 2NDV forward, 6NDV with the head trained, 4NDV with it
frozen. × bare: over the products that no method can do without, timed in turns with each method; their second and third
product multiply probabilities, as every method's do. Extra MiB: peak memory beyond the inputs, gradients included. Host
ms: until the call comes back. Errors against float64: the largest of any log-prob, in nats; relative of both gradients,
on sampled rows. What is beyond its limit is marked WRONG; an op of ours is where its error is more than twice that of
PyTorch eager. A loss composed of log-probs and plain PyTorch has no limit of its own: its gradient error shows what
rounded log-probs do to the weights of sequences.
"""
METHODS = (
    "method", "ms", "tokens/s", "TFLOP/s", "% of GEMM ceiling", "% of peak", "× bare", "extra MiB", "host ms",
    "log-prob error", "hidden-gradient error", "weight-gradient error", "SM MHz",
)  # fmt: skip
PRODUCTS = ("product", "ms", "TFLOP/s", "% of GEMM ceiling", "relative error", "SM MHz")
TILES = ("tile", "ms", "× bare", "head_gemm ms", "other kernels ms", "host ms", "nearest to its limit", "SM MHz")


def number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "–" if value is None else format(scale * value, form)


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(tuple(columns)) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def named(step: Record, name: str) -> str:
    """What is not well is said with the name."""
    if step["status"] == "ok":
        return name
    return f"{name}: **{step['status'].upper()}** {step.get('reason') or ''}".replace("|", "/").replace("\n", " ")


def of_step(step: Record, ceiling: float | None) -> dict[str, str]:
    """Every cell that any table shows of a step."""
    errors, kernels = step.get("errors", {}), step.get("kernels", [])
    took = {row["kernel"]: sum(row["microseconds"]) for row in kernels}
    product = sum(time for name, time in took.items() if "head_gemm" in name)
    return {
        "ms": number(step.get("median"), ".3f", 1e3),
        "tokens/s": number(step.get("tokens_per_second"), ",.0f"),
        "TFLOP/s": number(step.get("tflops"), ".0f"),
        "% of GEMM ceiling": number(ceiling and "tflops" in step and step["tflops"] / ceiling or None, ".0f", 100),
        "% of peak": number(step.get("of_peak"), ".0f", 100),
        "× bare": number(step.get("over_bare"), ".2f"),
        "extra MiB": number(step.get("extra_bytes"), ",.0f", 2**-20),
        "host ms": number(step.get("host_seconds"), ".2f", 1e3),
        "log-prob error": number(errors.get("logprob"), ".1e"),
        "hidden-gradient error": number(errors.get("hidden_grad"), ".1e"),
        "weight-gradient error": number(errors.get("weight_grad"), ".1e"),
        "nearest to its limit": _nearest(step),
        "relative error": number(errors.get("relative"), ".1e"),
        "head_gemm ms": number(product or None, ".3f", 1e-3),
        "other kernels ms": number(sum(took.values()) - product if product else None, ".3f", 1e-3),
        "SM MHz": number(step.get("sm_mhz"), ".0f"),
    }


def rows_of(steps: list[Record], key: str, columns: tuple[str, ...], ceiling: float | None) -> Iterator[list[str]]:
    for step in steps:
        cells = of_step(step, ceiling)
        yield [named(step, step.get(key) or step["step"]), *(cells[column] for column in columns[1:])]


def markdown(result: Record) -> Iterator[str]:
    """The tables, line by line."""
    found, steps = result["machine"], result["steps"]
    ceilings: Record = next((step for step in steps if "gemm_tflops" in step), {})
    ceiling = ceilings.get("gemm_tflops")
    yield f"# {found['chip']}, {found['date'][:10]}\n"
    yield f"torch {found['torch']}, triton {found['triton']}, CUDA {found['cuda']}, commit {found['commit']}. Measured"
    yield f"ceilings: bfloat16 GEMM {number(ceiling, '.0f')} TFLOP/s (large square), copy"
    yield f"{number(ceilings.get('copy_gbytes_per_s'), '.0f')} GB/s (read + written). Peers: " + ", ".join(
        f"{name} {version}" for name, version in found["peers"].items() if version
    )
    yield "\n" + EXPLANATION
    checks = sorted((s for s in steps if s["phase"] == "checks"), key=lambda step: step["status"] == "ok")
    yield f"## Checks: {sum(step['status'] == 'ok' for step in checks)} of {len(checks)} right\n"
    yield from table(("check", "nearest to its limit"), ([named(s, s["step"]), _nearest(s)] for s in checks))
    for shape in dict.fromkeys(step["shape"] for step in steps if step["phase"] == "breakdown" and "shape" in step):
        here = [step for step in steps if step["phase"] == "breakdown" and step.get("shape") == shape]
        yield f"\n## Breakdown, {shape}\n"
        yield from table(PRODUCTS, rows_of([step for step in here if "mode" not in step], "", PRODUCTS, ceiling))
        for mode in dict.fromkeys(step["mode"] for step in here if "mode" in step):
            yield f"\n{mode}:\n"
            part = [step for step in here if step.get("mode") == mode]
            yield from table(TILES, rows_of(part, "", TILES, ceiling))
            for step in (step for step in part if "method" in step):
                yield from ("", *table(("kernel", "launches", "ms"), _kernels(step)))
    shapes = [step for step in steps if step["phase"] == "shapes"]
    for shape in dict.fromkeys(step["shape"] for step in shapes if "shape" in step):
        here = [step for step in shapes if step.get("shape") == shape]
        yield f"\n## {shape}, mean length {here[0]['mean_length']:.0f}"
        for mode in dict.fromkeys(step["mode"] for step in here):
            yield f"\n### {mode}\n"
            yield from table(METHODS, rows_of([s for s in here if s["mode"] == mode], "method", METHODS, ceiling))
        for step in (step for step in here if step.get("implementation")):
            yield f"\n{step['method']} ran as {', '.join(step['implementation'])}."
    yield "\n## Not measured\n"
    for step in steps:
        if step["status"] in ("left out", "skipped", "unfinished") and "seconds" not in step:
            yield f"- {step['phase']}, {named(step, step['step'])}"


def _nearest(step: Record) -> str:
    errors, limits = step.get("errors", {}), step.get("limits", {})
    pairs = [(errors[what], limit, what) for what, limit in limits.items() if errors[what] is not None and limit]
    if not pairs:
        return "–"
    error, limit, what = max(pairs, key=lambda pair: pair[0] / pair[1])
    return f"{what}: {error:.1e} of {limit:.1e}"


def _kernels(step: Record) -> Iterator[list[str]]:
    kernels = step.get("kernels", [])
    for row in kernels:
        yield [row["kernel"].replace("|", "/"), str(len(row["microseconds"])), f"{sum(row['microseconds']) / 1e3:.3f}"]
    total = sum(sum(row["microseconds"]) for row in kernels) / 1e6
    if "median" in step:
        yield ["time in no kernel", "", f"{1e3 * (step['median'] - total):.3f}"]
