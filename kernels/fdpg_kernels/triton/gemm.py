"""One persistent matrix product, hidden [N, D] × head [V, D]ᵀ, that never writes the logits.

Its epilogue works on the float32 accumulator of a [BM, BV] tile and either
* reduces it: row maximum and row sum of exponentials, the partial statistics of an online softmax; or
* anchors it: E = exp(z + a) with one number a for each row, stored in the inputs' dtype, and the row sums of E.
  With a = log q − z_y the row sum is q/π (docs/kernels.md); with a = −lse it is 1 and E is the softmax; or
* anchors it with −lse and stores a gradient of the logits instead of the softmax π: π·(α + β·log π) with two more
  numbers for each row, but for what the targets add.
"""

import triton
import triton.language as tl

FLOOR = tl.constexpr(-200.0)  # exp2 of it is 0, and so is it times 0, which −inf is not


@triton.jit
def tanh_of_small(x):
    """For |x| ≤ 1: a polynomial (minimax, 5e-8 of tanh x), which asks nothing of the unit that makes exponentials."""
    square = x * x
    series = -0.006203361786901951 + square * 0.001041016774252057
    series = -0.05345701798796654 + square * (0.020289961248636246 + square * series)
    series = -0.33332839608192444 + square * (0.13325203955173492 + square * series)
    return x * (0.9999999403953552 + square * series)


@triton.jit
def tanh(x):
    """Right to 1e-6 of itself, also near 0, where 1 − 2/(1 + e²ˣ) is right to 1e-7 of 1 only."""
    large = 1 - 2 / (1 + tl.exp2(x * 2.8853900817779268))
    return tl.where(tl.abs(x) <= 1, tanh_of_small(x), large)


@triton.jit
def tile_of(item, num_rows, num_columns, GROUP_M: tl.constexpr):
    """Row and column of the work item'th tile: GROUP_M row tiles share a slice of the head while it is in L2."""
    per_group = GROUP_M * num_columns
    first = item // per_group * GROUP_M
    height = min(num_rows - first, GROUP_M)
    return first + item % per_group % height, item % per_group // height


@triton.jit
def any_flag(flag_ptr, count, BLOCK: tl.constexpr):
    """1 where one of so many flags is set, else 0."""
    found = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        found |= tl.load(flag_ptr + at, mask=at < count, other=0)
    return tl.max(found, 0)


@triton.jit
def matrix_product(
    x, w, row, column, N, D, V, stride_x, stride_w,
    TMA: tl.constexpr, EVEN_D: tl.constexpr, UPCAST: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """x[row : row+BM] · w[column : column+BV]ᵀ in float32, [BM, BV]; rows and columns past the end hold anything.

    SPLIT: a row is two bfloat16 halves of D that add up to it; multiplied are high·high, high·low and low·high.
    """
    accumulator = tl.zeros((BM, BV), tl.float32)
    rows = tl.minimum(row + tl.arange(0, BM), N - 1).to(tl.int64)
    columns = tl.minimum(column + tl.arange(0, BV), V - 1).to(tl.int64)
    depth = tl.arange(0, BD)
    for d in range(0, 3 * D if SPLIT else D, BD):
        at_x, at_w = d, d
        if SPLIT:
            at_x = tl.where(d < D, d, d - D)
            at_w = tl.where(d < 2 * D, d, d - 2 * D)
        if TMA:
            a = x.load([row, at_x])
            b = w.load([column, at_w])
        elif EVEN_D:
            a = tl.load(x + rows[:, None] * stride_x + (at_x + depth)[None, :])
            b = tl.load(w + columns[:, None] * stride_w + (at_w + depth)[None, :])
        else:
            inside = (d + depth < D)[None, :]
            a = tl.load(x + rows[:, None] * stride_x + (d + depth)[None, :], mask=inside, other=0.0)
            b = tl.load(w + columns[:, None] * stride_w + (d + depth)[None, :], mask=inside, other=0.0)
        if UPCAST:  # Triton's interpreter multiplies the bit patterns of bfloat16
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        accumulator = tl.dot(a, b.T, accumulator, input_precision="ieee")
    return accumulator


@triton.jit
def store_tile(e, z, row, column, N, stride_e, TMA: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr):
    if TMA:
        e.store([row, column], z.to(e.dtype))
    else:
        # E's pitch is a multiple of 16 bytes; told so, the compiler stores whole words, into the padding too
        WORD: tl.constexpr = 128 // e.dtype.element_ty.primitive_bitwidth
        stride_e = stride_e // WORD * WORD
        rows, columns = row + tl.arange(0, BM), column + tl.arange(0, BV)
        offset = rows.to(tl.int64)[:, None] * stride_e + columns[None, :]
        tl.store(e + offset, z.to(e.dtype.element_ty), mask=(rows < N)[:, None] & (columns < stride_e)[None, :])


@triton.jit
def one_tile(
    x, w, e, e_low, bias_ptr, temperature_ptr, anchor_ptr, alpha_ptr, beta_ptr, maximum_ptr, sum_ptr, moment_ptr,
    tile_row, tile_column, N, D, V, stride_x, stride_w, stride_e, scale2, softcap,
    ANCHORED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, RAGGED: tl.constexpr,
    TMA: tl.constexpr, EVEN_D: tl.constexpr, UPCAST: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row, column = tile_row * BM, tile_column * BV
    z = matrix_product(x, w, row, column, N, D, V, stride_x, stride_w, TMA, EVEN_D, UPCAST, SPLIT, BM, BV, BD)
    rows, columns = row + tl.arange(0, BM), column + tl.arange(0, BV)
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        z *= 1 / softcap
        if tl.max(tl.abs(z)) <= 1:  # noqa: SIM108  so it is in nearly every tile
            z = tanh_of_small(z)
        else:
            z = tanh(z)
        slope = 1 - z * z
        scale2 *= softcap  # instead of every z
    if temperature_ptr is not None:
        z *= 1 / tl.load(temperature_ptr + rows, mask=rows < N, other=1.0)[:, None]
    if RAGGED:  # noqa: SIM102  in Triton's language one is known when it compiles
        if column + BV > V:  # in the other tiles 256 comparisons and as many registers would be for nothing
            z = tl.where((columns < V)[None, :], z, float("-inf"))
    at = tile_column * N + rows
    if ANCHORED:
        anchor = tl.load(anchor_ptr + rows, mask=rows < N, other=float("-inf"))  # −inf: a dead row, E = 0
        z = z * scale2 + anchor[:, None]
        if alpha_ptr is None:
            z = tl.exp2(z)
            tl.store(sum_ptr + at, tl.sum(z, 1), mask=rows < N)
        else:
            slant = tl.load(alpha_ptr + rows, mask=rows < N, other=0.0)[:, None]
            if beta_ptr is not None:
                z = tl.maximum(z, FLOOR)
                slant += z * tl.load(beta_ptr + rows, mask=rows < N, other=0.0)[:, None]
            z = tl.exp2(z) * slant
        if HAS_SOFTCAP:
            z = z * slope
        high = z.to(tl.bfloat16) if SPLIT else z
        if SPLIT:  # before the first store, after which z needs no registers
            low = (z - high.to(tl.float32)).to(tl.bfloat16)
            store_tile(e_low, low, row, column, N, stride_e, TMA, BM, BV)
        store_tile(e, high, row, column, N, stride_e, TMA, BM, BV)
    else:
        # the largest is found before scaling: one FFMA and one EX2 for each logit
        largest = tl.max(z, 1) * scale2
        largest = tl.where(largest == float("-inf"), 0.0, largest)
        tl.store(maximum_ptr + at, largest, mask=rows < N)
        z = z * scale2 - largest[:, None]
        if moment_ptr is None:
            tl.store(sum_ptr + at, tl.sum(tl.exp2(z), 1), mask=rows < N)
        else:
            exponentials = tl.exp2(z)
            tl.store(sum_ptr + at, tl.sum(exponentials, 1), mask=rows < N)
            tl.store(moment_ptr + at, tl.sum(exponentials * tl.maximum(z, FLOOR), 1), mask=rows < N)


# chunks differ in height and where they begin: one binary for all of them
@triton.jit(
    do_not_specialize=["N"],
    do_not_specialize_on_alignment=[
        *("temperature_ptr", "anchor_ptr", "alpha_ptr", "beta_ptr", "maximum_ptr", "sum_ptr", "moment_ptr", "flag_ptr")
    ],
)
def head_gemm(
    x, w, e, e_low,
    bias_ptr, temperature_ptr, anchor_ptr, alpha_ptr, beta_ptr, maximum_ptr, sum_ptr, moment_ptr, flag_ptr,
    N, D, V, stride_x, stride_w, stride_e, scale2, softcap,
    ANCHORED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, RAGGED: tl.constexpr,
    GUARDED: tl.constexpr, TMA: tl.constexpr, EVEN_D: tl.constexpr, UPCAST: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, GROUP_M: tl.constexpr, FLAG_ROWS: tl.constexpr,
):  # fmt: skip
    """x [N, D] and w [V, D] (descriptors where TMA, else pointers) → partials [V/BV, N] float32, and e [N, V].

    scale2 is log₂e / temperature, log₂e where each row has its own; anchors, logits of beta and moments are in log₂
    units. With alpha and beta e is a gradient, without row sums; with moments Σ exp2(z − max)·(z − max) is found too.
    GUARDED: only row tiles with a flag set, of which there is one for FLAG_ROWS rows; mostly none is, seen at a glance.
    """
    num_rows, num_columns = tl.cdiv(N, BM), tl.cdiv(V, BV)
    items = num_rows * num_columns
    if GUARDED:
        items *= any_flag(flag_ptr, tl.cdiv(N, FLAG_ROWS), 256)
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), flatten=False):
        tile_row, tile_column = tile_of(item, num_rows, num_columns, GROUP_M)
        run = True
        if GUARDED:
            flags = tile_row * (BM // FLAG_ROWS) + tl.arange(0, BM // FLAG_ROWS)
            run = tl.max(tl.load(flag_ptr + flags, mask=flags < tl.cdiv(N, FLAG_ROWS), other=0), 0) != 0
        if run:
            one_tile(
                x, w, e, e_low,
                bias_ptr, temperature_ptr, anchor_ptr, alpha_ptr, beta_ptr, maximum_ptr, sum_ptr, moment_ptr,
                tile_row, tile_column, N, D, V, stride_x, stride_w, stride_e, scale2, softcap,
                ANCHORED, HAS_BIAS, HAS_SOFTCAP, RAGGED, TMA, EVEN_D, UPCAST, SPLIT, BM, BV, BD,
            )  # fmt: skip
