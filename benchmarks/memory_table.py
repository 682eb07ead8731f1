"""Arithmetic: what one of W processes holds at most while it trains, and what it sends; the tables of docs/scaling.md.

python benchmarks/memory_table.py            prints both tables, in Markdown

Every number is reckoned from a model's shape by what FSDP2 and autograd keep, moment by moment; step_memory.py holds
the same functions against what processes on a CPU take.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
MASTER, MOMENTS, REDUCED = 4, 8, 4  # bytes a parameter: float32, AdamW's two, and gradients as they are summed
CARD = 80e9 / GIB  # GiB of an 80 GB card
CONTEXT = 2.5  # GiB of it for CUDA, NCCL and fragments
LOGITS = GIB  # the block that the fused loss forms on a GPU (fdpg_kernels.chunks)
FLOPS = 0.45 * 990e12  # of an H100 in bfloat16, as large models reach it
LINKS = {"NVLink": 300e9, "400 Gb/s a GPU": 50e9}  # bytes a second and direction


@dataclass(frozen=True)
class Shape:
    """A Llama, or whatever has its matrices."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    is_tied: bool = False

    @property
    def layer(self) -> int:
        """Parameters of a layer."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def table(self) -> int:
        """Of the embedding, and of a head of its own."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + (1 if self.is_tied else 2) * self.table + self.hidden


SHAPES = (
    Shape("1 B (Llama 3.2, tied)", 16, 2048, 8192, 32, 8, 64, 128_256, True),
    Shape("8 B (Llama 3.1)", 32, 4096, 14_336, 32, 8, 128, 128_256),
    Shape("32 B (Qwen 2.5)", 64, 5120, 27_648, 40, 8, 128, 152_064),
    Shape("70 B (Llama 3.1)", 80, 8192, 28_672, 64, 8, 128, 128_256),
)


@dataclass(frozen=True)
class Run:
    """How a model is trained.

    item: bytes of a number in a pass: 2, bfloat16, or 4.
    base: bytes a parameter of the frozen copy; 0: there is none, as with LoRA.
    logits: bytes of the loss's block.
    is_gloo: gradients are summed in a copy of what is sent.
    """

    world: int
    tokens: int = 8192  # of a micro-batch, prompts included
    scored: int = 4  # times as many where the base is asked, without gradients
    item: int = 2
    base: int = 2
    is_checkpointed: bool = True
    logits: int = LOGITS
    is_gloo: bool = False


def state(shape: Shape, run: Run) -> float:
    """Bytes that are there from round to round: masters, moments and the base, each divided."""
    return (MASTER + MOMENTS + run.base) * shape.parameters / run.world


def kept_in_a_layer(shape: Shape, run: Run) -> float:
    """Bytes of activations from a layer's forward pass to its backward pass, its input among them.

    Each norm keeps its input in float32, in bfloat16 a copy, and two results; attention keeps query, key, value and
    what it gives; the MLP keeps gate, its SiLU, up and their product.
    """
    norms = 2 * (4 + 2 * run.item) * shape.hidden + (run.item if run.item != 4 else 0) * shape.hidden
    attention = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim
    return run.tokens * (norms + run.item * (attention + 4 * shape.intermediate))


def moments(shape: Shape, run: Run) -> dict[str, dict[str, float]]:
    """Bytes beside the state in those moments of which one is the largest of a round, by what they are for.

    Of an update the second micro-batch and those that follow: gradients of the first are there.
    """
    tokens, item, layer, table = run.tokens * shape.hidden * run.item, run.item, shape.layer, shape.table
    kept, wide = kept_in_a_layer(shape, run), run.tokens * shape.intermediate * run.item
    gradients = REDUCED * shape.parameters / run.world
    inputs = shape.layers * (tokens if run.is_checkpointed else kept)
    last_norm = run.tokens * shape.hidden * (4 + 3 * item)
    # backward through an MLP has two gradients of its width beside what is kept, and one of the layer's output
    working = (kept if run.is_checkpointed else 0) + 2 * wide + tokens
    copies = 2 if run.is_gloo else 1  # of what is summed

    def summed(parameters: int) -> float:
        """While gradients are summed: as autograd left them beside what is sent, or the part that comes back."""
        return max(item + REDUCED, REDUCED * copies + REDUCED / run.world) * parameters

    # a head of its own is summed before the layers' turn, and what was sent stays until the next sum begins
    waiting = 2 * item * table if shape.is_tied else 0  # a tied table stays whole, its gradient there, to the end
    in_flight = REDUCED * (layer if shape.is_tied else max(table, layer))
    found = {
        "scoring": {  # an MLP has three products at once
            "activations": run.scored * (3 * wide + 2 * tokens) + run.logits,
            "weights": item * (2 * layer + table),
        },
        "loss": {
            "gradients": gradients,
            "layer inputs": inputs,
            "activations": last_norm + 2 * tokens + run.logits,
            "weights": 2 * item * table,
        },
        "a layer": {
            "gradients": gradients,
            "layer inputs": inputs,
            "activations": working,
            "weights": 2 * item * layer + waiting + in_flight,
        },
        "a layer's sum": {
            "gradients": gradients,
            "layer inputs": inputs,
            "activations": tokens,
            "weights": item * layer + waiting + summed(layer),
        },
        "the embedding's sum": {"gradients": gradients, "weights": waiting / 2 + summed(table)},
    }
    if not shape.is_tied:
        weights = (item + REDUCED * copies + REDUCED / run.world) * table  # measured: here autograd's stays as well
        found["the head's sum"] = {"gradients": gradients, "layer inputs": inputs, "weights": weights}
    return found


def peak(shape: Shape, run: Run) -> tuple[str, dict[str, float]]:
    """The largest moment of an update, and bytes beside the state by what they are for."""
    return max(moments(shape, run).items(), key=lambda found: sum(found[1].values()))


def total(shape: Shape, run: Run) -> float:
    """Bytes at most: the state, and what the largest moment adds."""
    return state(shape, run) + sum(peak(shape, run)[1].values())


def sent(shape: Shape) -> float:
    """Bytes that a process sends for a micro-batch: parameters twice in bfloat16, gradients once in float32."""
    return (2 + 2 + REDUCED) * shape.parameters


def seconds(shape: Shape, tokens: int) -> float:
    """Of one forward, a second one that recomputes, and a backward pass of a micro-batch."""
    return 8 * shape.parameters * tokens / FLOPS


def memory_table(worlds: tuple[int, ...] = (8, 16, 32, 64)) -> str:
    head = ["model", "GPUs", "state", "gradients", "layer inputs", "activations", "weights", "**update**", "80 GB"]
    head += ["without recomputing", "room for vLLM"]
    rows = [head, ["---"] * len(head)]
    for shape in SHAPES:
        for world in worlds:
            run, plain = Run(world), Run(world, is_checkpointed=False)
            _, found = peak(shape, run)
            largest, without = (total(shape, each) / GIB + CONTEXT for each in (run, plain))
            room = CARD - CONTEXT - state(shape, run) / GIB
            columns = ("gradients", "layer inputs", "activations", "weights")
            parts = [state(shape, run), *(found.get(column, 0.0) for column in columns)]
            row = [shape.name, str(world), *(f"{part / GIB:.1f}" for part in parts), f"**{largest:.0f}**"]
            row += ["yes" if largest < CARD else "**no**", f"{without:.0f}", f"{room:.0f}" if room > 0 else "none"]
            rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def time_table(tokens: int = 8192) -> str:
    head = ["model", "compute, s", "sent, GB", *(f"{name}, s" for name in LINKS)]
    rows = [head, ["---"] * len(head)]
    for shape in SHAPES:
        there = [f"{sent(shape) / rate:.2f}" for rate in LINKS.values()]
        rows.append([shape.name, f"{seconds(shape, tokens):.2f}", f"{sent(shape) / 1e9:.0f}", *there])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(memory_table(), time_table(), sep="\n\n")
    for name, rate in LINKS.items():
        tokens = sent(SHAPES[0]) / rate / seconds(SHAPES[0], 1)
        print(f"\n{name}: sending takes as long as computing at {tokens:,.0f} tokens a micro-batch")
