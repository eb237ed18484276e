# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
# ruff: noqa: N803 (Triton constants are upper case)
"""The inner loop of attention, shared by the decode and the variable-length kernels.

Softmax runs online, block by block of keys (Milakov & Gimelshein 2018; Dao et al., FlashAttention, 2022),
in base 2: exp(x) = exp2(x * log2 e), and log2 e is folded into the scale on the host.

Query heads that share a key head are packed into the rows of one tile, so their keys are loaded once.
"""

import triton
import triton.language as tl

# Values of an fp8 cache differ in size by up to 2^40, float16 probabilities only by 2^24: the largest is made 2^15, and
# those that count where values are large are not rounded to nothing.
HEADROOM = tl.constexpr(15.0)


@triton.jit
def find_blocks(table_ptr, start, kv_len, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr, PAGED: tl.constexpr):
    """Cache blocks of keys [start, start + BLOCK_N), one entry where they lie in one; block 0 unless PAGED."""
    if not PAGED:
        blocks = tl.full([1], 0, tl.int64)
    elif BLOCK_SIZE % BLOCK_N == 0:
        at = start // BLOCK_SIZE + tl.arange(0, 1)
        blocks = tl.load(table_ptr + at, mask=start + tl.arange(0, 1) < kv_len, other=0).to(tl.int64)
    else:
        keys = start + tl.arange(0, BLOCK_N)
        blocks = tl.load(table_ptr + keys // BLOCK_SIZE, mask=keys < kv_len, other=0).to(tl.int64)
    return blocks


@triton.jit
def load_rows(ptr, rows, keys, kv_len, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """[BLOCK_N, BLOCK_D] tile; zeros past kv_len (whatever lies in the cache there) and past head size D."""
    dims = tl.arange(0, BLOCK_D)
    at = ptr + rows[:, None] + dims[None, :]
    if MASKED:
        tile = tl.load(at, mask=(keys[:, None] < kv_len) & (dims[None, :] < D), other=0.0)
    elif D == BLOCK_D:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=dims[None, :] < D, other=0.0)
    return tile


@triton.jit
def load_exponents(scales, blocks, keys, kv_len, BLOCK_SIZE: tl.constexpr):
    """[BLOCK_N] int32 of the keys and of the values, biased by 127. scales: see `scales_of`."""
    offsets = (keys % BLOCK_SIZE).to(tl.int64)
    k_at = scales[0] + blocks * scales[2] + offsets * scales[3]
    v_at = scales[1] + blocks * scales[4] + offsets * scales[5]
    k = tl.load(k_at, mask=keys < kv_len, other=127)
    return k.to(tl.int32), tl.load(v_at, mask=keys < kv_len, other=127).to(tl.int32)


@triton.jit
def dequantise(codes, exponents, DTYPE: tl.constexpr):
    """The numbers of a tile of e4m3 codes: exact, `mm_core.kernels.fp8` says why."""
    factors = (exponents << 23).to(tl.float32, bitcast=True)
    # Not straight to bfloat16: that is an instruction of a quarter the speed.
    numbers = codes.to(tl.float16)
    if DTYPE == tl.float16:  # noqa: SIM300
        numbers = numbers * factors.to(tl.float16)[:, None]
    else:
        numbers = (numbers.to(tl.float32) * factors[:, None]).to(DTYPE)
    return numbers


@triton.jit
def attend(
    acc,  # [M, BLOCK_D] float32, not yet divided by row_sum
    row_max,  # [M] float32, in base 2
    row_sum,  # [M] float32
    q,  # [M, BLOCK_D]
    k_ptr,  # at this key head (and at this sequence's first key unless PAGED)
    v_ptr,
    table_ptr,  # at this sequence's row
    stride_kb,
    stride_kt,
    stride_vb,
    stride_vt,
    bias_ptr,  # [M, 1]: key 0 of each row
    stride_bias,
    bias_rows,  # [M, 1] bool: rows whose bias may be loaded
    lo,
    hi,
    kv_len,
    positions,  # [M]: the last key that each row may see, for CAUSAL
    scale,  # scale * log2 e
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGED: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALE_LATE: tl.constexpr,  # scale > 0 and no bias: max(s * x) = s * max(x), and s * x - m is one FMA
    MASKED: tl.constexpr,
    ALIGN: tl.constexpr,  # divides lo and BLOCK_N
    scales=None,  # of an fp8 cache: see `scales_of`
):
    """Adds keys [lo, hi) to the running softmax. Without MASKED every row must see all of them."""
    # Found one step ahead, so that loads of keys wait for no other load.
    blocks = find_blocks(table_ptr, lo, kv_len, BLOCK_N, BLOCK_SIZE, PAGED)
    if scales is not None:
        k_exponents, v_exponents = load_exponents(scales, blocks, lo + tl.arange(0, BLOCK_N), kv_len, BLOCK_SIZE)
    for begin in range(lo, hi, BLOCK_N):
        start = tl.multiple_of(begin, ALIGN)
        keys = start + tl.arange(0, BLOCK_N)
        offsets = (keys % BLOCK_SIZE if PAGED else keys).to(tl.int64)
        k = load_rows(k_ptr, blocks * stride_kb + offsets * stride_kt, keys, kv_len, D, BLOCK_D, MASKED)
        if scales is not None:
            k = dequantise(k, k_exponents, q.dtype)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        if not SCALE_LATE:
            scores = scores * scale
        if HAS_BIAS:
            loadable = bias_rows & (keys[None, :] < kv_len)
            added = tl.load(bias_ptr + keys[None, :].to(tl.int64) * stride_bias, mask=loadable, other=0.0)
            scores = scores + added.to(tl.float32) * 1.4426950408889634
        if MASKED:
            visible = keys[None, :] < kv_len
            if CAUSAL:
                visible = visible & (keys[None, :] <= positions[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        best = tl.max(scores, 1)
        if SCALE_LATE:
            best = best * scale
        if scales is not None and q.dtype == tl.float16:
            best = best - HEADROOM
        new_max = tl.maximum(row_max, best)
        anchor = new_max
        if MASKED or HAS_BIAS:
            # A row that has seen no key yet has maximum -inf; -inf - -inf would be NaN.
            anchor = tl.where(new_max == float("-inf"), 0.0, new_max)
        scores = scores * scale if SCALE_LATE else scores
        weights = tl.exp2(scores - anchor[:, None])
        fade = tl.exp2(row_max - anchor)
        row_sum = row_sum * fade + tl.sum(weights, 1)
        v = load_rows(v_ptr, blocks * stride_vb + offsets * stride_vt, keys, kv_len, D, BLOCK_D, MASKED)
        if scales is not None:
            v = dequantise(v, v_exponents, q.dtype)
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * fade[:, None], input_precision="ieee")
        row_max = new_max
        blocks = find_blocks(table_ptr, start + BLOCK_N, kv_len, BLOCK_N, BLOCK_SIZE, PAGED)
        if scales is not None:
            k_exponents, v_exponents = load_exponents(scales, blocks, keys + BLOCK_N, kv_len, BLOCK_SIZE)
    return acc, row_max, row_sum


@triton.jit
def split_size(length, num_splits, min_keys, STEP: tl.constexpr):
    """Keys of one split, a multiple of STEP: as many splits as there are min_keys, evenly long.

    By the true length, not the batch's longest: graphs are captured for the longest there can be.
    """
    used = tl.maximum(tl.minimum(num_splits, tl.cdiv(length, min_keys)), 1)
    return tl.maximum(tl.cdiv(tl.cdiv(length, used), STEP), 1) * STEP


@triton.jit
def log_sum(row_max, row_sum):
    """Base-2 logarithm of a softmax's sum, -inf for rows without keys."""
    # Without keys the maximum is -inf.
    return row_max + tl.log2(tl.where(row_sum == 0.0, 1.0, row_sum))


@triton.jit
def add_partials(
    acc, row_max, row_sum, partial_ptr, lse_ptr, at, count, rows_ok, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Merges finished partial results, with at least one key each, into the running softmax.

    partial_ptr: float32 [.., D], lse_ptr: float32 [..]; row m's lie at at[m] .. at[m] + count - 1.
    """
    dims = tl.arange(0, BLOCK_D)
    for index in range(count):
        lse = tl.load(lse_ptr + at + index, mask=rows_ok, other=0.0)
        mask = rows_ok[:, None] & (dims[None, :] < D)
        part = tl.load(partial_ptr + (at + index)[:, None] * D + dims[None, :], mask=mask, other=0.0)
        new_max = tl.maximum(row_max, lse)
        fade = tl.exp2(row_max - new_max)
        weight = tl.exp2(lse - new_max)
        acc = acc * fade[:, None] + part * weight[:, None]
        row_sum = row_sum * fade + weight
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def finish(acc, row_sum):
    """Divides by the softmax's sum; rows that saw no key give zeros."""
    return acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
