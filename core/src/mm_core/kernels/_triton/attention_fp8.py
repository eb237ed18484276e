# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
# ruff: noqa: N803 (Triton constants are upper case)
"""Attention over an fp8 cache (`mm_core.kernels.fp8`): codes times 2^(their token's and head's exponent).

Many rows of queries, and float32: `attend` brings each tile of codes to the queries' dtype, exactly, and goes on as
with any cache. Few rows, where converting would take longer than reading: `attend_pairs` converts codes to float16
alone, two in an instruction (bfloat16 takes six for two), and keeps the exponents outside of the products. A key's
multiplies its column of the scores. A value's enters the exponent of the probabilities: w = 2^(s + e - r) is what
the codes are summed with, and w * 2^-e what the softmax's sum takes. The reference r of a row is the greatest s + e
so far, less 15, so the largest w is 2^15: float16 holds all down to 2^-29 of it with 11 bits, and as the scale is
the least that fits, but for values below 2^-6, codes of the largest one's token reach 224: what is rounded to
nothing adds less than 2^-39 of the sum each. bfloat16 probabilities would have 8 bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mm_core.kernels._triton.attention import HEADROOM, attend, load_rows
from mm_core.kernels._triton.launch import can_start_early
from mm_core.kernels.kv_write import Scales


@triton.jit
def unit_queries(q):
    """Queries of a half type as float16, each row's largest magnitude in [2^14, 2^15), and the [M] powers of two
    that undo it: exact, but for elements below 2^-29 of their row's largest."""
    wide = q.to(tl.float32)
    exponents = tl.maximum(tl.max(tl.abs(wide), 1).to(tl.int32, bitcast=True) >> 23, 15)
    return (wide * power_of_two(268 - exponents)[:, None]).to(tl.float16), power_of_two(exponents - 14)


@triton.jit
def power_of_two(biased):
    """2^(biased - 127) of int32 in [1, 254]."""
    return (biased << 23).to(tl.float32, bitcast=True)


@triton.jit
def blocks_of(table_ptr, keys, kv_len, BLOCK_SIZE: tl.constexpr):
    """[N] int32: the cache block of each key, 0 past kv_len."""
    return tl.load(table_ptr + keys.to(tl.uint32) // BLOCK_SIZE, mask=keys < kv_len, other=0)


@triton.jit
def places(blocks, keys, stride_b, stride_t, BLOCK_SIZE: tl.constexpr):
    """[N] int64 offsets of keys. Unsigned factors of 32 bits are multiplied in one instruction."""
    offsets = (keys.to(tl.uint32) % BLOCK_SIZE).to(tl.int64)
    stride_b, stride_t = tl.cast(stride_b, tl.uint32).to(tl.int64), tl.cast(stride_t, tl.uint32).to(tl.int64)
    return blocks.to(tl.uint32).to(tl.int64) * stride_b + offsets * stride_t


@triton.jit
def exponents_of(scales, blocks, keys, kv_len, BLOCK_SIZE: tl.constexpr, ALIKE: tl.constexpr):
    """`load_exponents`, by fewer instructions."""
    k_at = places(blocks, keys, scales[2], scales[3], BLOCK_SIZE)
    v_at = k_at
    if not ALIKE:
        v_at = places(blocks, keys, scales[4], scales[5], BLOCK_SIZE)
    k = tl.load(scales[0] + k_at, mask=keys < kv_len, other=127)
    return k.to(tl.int32), tl.load(scales[1] + v_at, mask=keys < kv_len, other=127).to(tl.int32)


@triton.jit
def split_pairs(pairs):
    """The two e4m3 codes of each int16, first and second, as float16."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b16 low, high;
        .reg .b32 a, b;
        mov.b32 {low, high}, $2;
        cvt.rn.f16x2.e4m3x2 a, low;
        cvt.rn.f16x2.e4m3x2 b, high;
        prmt.b32 $0, a, b, 0x5410;
        prmt.b32 $1, a, b, 0x7632;
        }
        """,
        "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def weigh(
    scores, k_exponents, v_exponents, factor, row_max, bias_ptr, stride_bias, bias_rows, keys, kv_len, positions,
    CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What a tile's codes are to be summed with, its part of the softmax's sum, how far what there was fades,
    and the new references."""
    scores = scores * power_of_two(k_exponents)[None, :]
    scores = scores * factor[:, None] + (v_exponents - 127).to(tl.float32)[None, :]
    if HAS_BIAS:
        loadable = bias_rows & (keys[None, :] < kv_len)
        added = tl.load(bias_ptr + keys[None, :].to(tl.int64) * stride_bias, mask=loadable, other=0.0)
        scores = scores + added.to(tl.float32) * 1.4426950408889634
    if MASKED:
        visible = keys[None, :] < kv_len
        if CAUSAL:
            visible = visible & (keys[None, :] <= positions[:, None])
        scores = tl.where(visible, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1) - HEADROOM)
    anchor = new_max
    if MASKED or HAS_BIAS:
        # A row that has seen no key yet has maximum -inf; -inf - -inf would be NaN.
        anchor = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - anchor[:, None])
    return weights, weights * power_of_two(254 - v_exponents)[None, :], tl.exp2(row_max - anchor), new_max


@triton.jit
def attend_pairs(
    acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, stride_kb, stride_kt, stride_vb, stride_vt, scales,
    bias_ptr, stride_bias, bias_rows, lo, hi, kv_len, positions, scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_BIAS: tl.constexpr, ALIKE: tl.constexpr, MASKED: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """`attend` over paged codes for few rows. scales: see `scales_of`. ALIKE: both caches have the same strides, and
    so have the exponents.

    Columns are halved into those of even and of odd dims: a pair of codes is loaded as one number, because tensor
    cores' operands can be brought from shared memory transposed in units of two bytes, not of one.
    """
    HALF: tl.constexpr = BLOCK_D // 2
    rounded, factor = unit_queries(q)
    factor = factor * scale
    q_even, q_odd = tl.split(rounded.reshape([q.shape[0], HALF, 2]))
    even, odd = tl.split(acc.reshape([q.shape[0], HALF, 2]))
    k_ptr, v_ptr = k_ptr.to(tl.pointer_type(tl.int16)), v_ptr.to(tl.pointer_type(tl.int16))
    stride_kb, stride_kt, stride_vb, stride_vt = stride_kb // 2, stride_kt // 2, stride_vb // 2, stride_vt // 2
    # One sum for each of a tile's places, added up at the end: rows are spread over warps.
    sums = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
    ahead = tl.arange(0, BLOCK_N)
    # Found two steps ahead: loads of codes and exponents are started one step ahead, and wait for no other load.
    blocks = blocks_of(table_ptr, lo + ahead, kv_len, BLOCK_SIZE)
    following = blocks_of(table_ptr, lo + BLOCK_N + ahead, kv_len, BLOCK_SIZE)
    k_exponents, v_exponents = exponents_of(scales, blocks, lo + ahead, kv_len, BLOCK_SIZE, ALIKE)
    for begin in range(lo, hi, BLOCK_N):
        start = tl.multiple_of(begin, ALIGN)
        keys = start + ahead
        next_k, next_v = exponents_of(scales, following, keys + BLOCK_N, kv_len, BLOCK_SIZE, ALIKE)
        k_at = places(blocks, keys, stride_kb, stride_kt, BLOCK_SIZE)
        v_at = k_at
        if not ALIKE:
            v_at = places(blocks, keys, stride_vb, stride_vt, BLOCK_SIZE)
        k = load_rows(k_ptr, k_at, keys, kv_len, D // 2, HALF, MASKED)
        v = load_rows(v_ptr, v_at, keys, kv_len, D // 2, HALF, MASKED)
        k_even, k_odd = split_pairs(tl.trans(k))
        scores = tl.dot(q_odd, k_odd, tl.dot(q_even, k_even))
        weights, parts, fade, row_max = weigh(
            scores, k_exponents, v_exponents, factor, row_max, bias_ptr, stride_bias, bias_rows, keys, kv_len,
            positions, CAUSAL, HAS_BIAS, MASKED,
        )  # fmt: skip
        row_sum = row_sum * fade
        sums = sums * fade[:, None] + parts
        weights = weights.to(tl.float16)
        v_even, v_odd = split_pairs(v)
        even = tl.dot(weights, v_even, even * fade[:, None])
        odd = tl.dot(weights, v_odd, odd * fade[:, None])
        k_exponents, v_exponents = next_k, next_v
        blocks = tl.maximum(following, 0)  # the same; a plain copy would keep the loop from being pipelined
        following = blocks_of(table_ptr, keys + 2 * BLOCK_N, kv_len, BLOCK_SIZE)
    return tl.interleave(even, odd), row_max, row_sum + tl.sum(sums, 1)


@triton.jit
def scales_of(
    k_scales_ptr, v_scales_ptr, head, stride_ksb, stride_kst, stride_ksh, stride_vsb, stride_vst, stride_vsh
):  # fmt: skip
    """Exponents at a key head, and their strides from block to block and from token to token; None without."""
    found = None
    if k_scales_ptr is not None:
        head = head.to(tl.int64)
        k_at, v_at = k_scales_ptr + head * stride_ksh, v_scales_ptr + head * stride_vsh
        found = (k_at, v_at, stride_ksb, stride_kst, stride_vsb, stride_vst)
    return found


@triton.jit
def attend_cached(
    acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, stride_kb, stride_kt, stride_vb, stride_vt, scales,
    bias_ptr, stride_bias, bias_rows, lo, clear, hi, kv_len, positions, scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_BIAS: tl.constexpr, SCALE_LATE: tl.constexpr, ALIKE: tl.constexpr, PAIRS: tl.constexpr,
    PAGED: tl.constexpr = True,
):  # fmt: skip
    """`attend`, or `attend_pairs`, to keys [lo, clear), which every row sees, and [clear, hi)."""
    if PAIRS:
        acc, row_max, row_sum = attend_pairs(
            acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, stride_kb, stride_kt, stride_vb, stride_vt, scales,
            bias_ptr, stride_bias, bias_rows, lo, clear, kv_len, positions, scale,
            D, BLOCK_N, BLOCK_D, BLOCK_SIZE, CAUSAL, HAS_BIAS, ALIKE, MASKED=False, ALIGN=BLOCK_N,
        )  # fmt: skip
        acc, row_max, row_sum = attend_pairs(
            acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, stride_kb, stride_kt, stride_vb, stride_vt, scales,
            bias_ptr, stride_bias, bias_rows, clear, hi, kv_len, positions, scale,
            D, BLOCK_N, BLOCK_D, BLOCK_SIZE, CAUSAL, HAS_BIAS, ALIKE, MASKED=True, ALIGN=BLOCK_N,
        )  # fmt: skip
    else:
        acc, row_max, row_sum = attend(
            acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, stride_kb, stride_kt, stride_vb, stride_vt,
            bias_ptr, stride_bias, bias_rows, lo, clear, kv_len, positions, scale,
            D, BLOCK_N, BLOCK_D, BLOCK_SIZE, PAGED, CAUSAL, HAS_BIAS, SCALE_LATE, MASKED=False, ALIGN=BLOCK_N,
            scales=scales,
        )  # fmt: skip
        acc, row_max, row_sum = attend(
            acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, stride_kb, stride_kt, stride_vb, stride_vt,
            bias_ptr, stride_bias, bias_rows, clear, hi, kv_len, positions, scale,
            D, BLOCK_N, BLOCK_D, BLOCK_SIZE, PAGED, CAUSAL, HAS_BIAS, SCALE_LATE, MASKED=True, ALIGN=BLOCK_N,
            scales=scales,
        )  # fmt: skip
    return acc, row_max, row_sum


@triton.jit
def attend_masked(
    acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, stride_kb, stride_kt, stride_vb, stride_vt, scales,
    bias_ptr, stride_bias, bias_rows, lo, hi, positions, scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, HAS_BIAS: tl.constexpr,
    SCALE_LATE: tl.constexpr, ALIKE: tl.constexpr, PAIRS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """`attend`, or `attend_pairs`, to all of keys [lo, hi) in one loop."""
    if PAIRS:
        acc, row_max, row_sum = attend_pairs(
            acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, stride_kb, stride_kt, stride_vb, stride_vt, scales,
            bias_ptr, stride_bias, bias_rows, lo, hi, hi, positions, scale,
            D, BLOCK_N, BLOCK_D, BLOCK_SIZE, False, HAS_BIAS, ALIKE, MASKED=True, ALIGN=ALIGN,
        )  # fmt: skip
    else:
        acc, row_max, row_sum = attend(
            acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, stride_kb, stride_kt, stride_vb, stride_vt,
            bias_ptr, stride_bias, bias_rows, lo, hi, hi, positions, scale,
            D, BLOCK_N, BLOCK_D, BLOCK_SIZE, True, False, HAS_BIAS, SCALE_LATE, MASKED=True, ALIGN=ALIGN,
            scales=scales,
        )  # fmt: skip
    return acc, row_max, row_sum


def scale_arguments(scales: Scales | None) -> tuple[Any, ...]:
    """A kernel's arguments for the exponents of k and v, [num_blocks, block_size, Hkv] each, and their strides."""
    if scales is None:
        return (None,) * 8
    return (*scales, *scales[0].stride(), *scales[1].stride())


def alike(k_cache: Tensor, v_cache: Tensor, scales: Scales | None) -> bool:
    """Whether one offset serves keys and values."""
    return scales is not None and k_cache.stride() == v_cache.stride() and scales[0].stride() == scales[1].stride()


def takes_pairs(q: Tensor, scales: Scales | None, unit: int) -> bool:
    """Whether few rows of queries are best computed with even and odd dims apart; unit divides all strides."""
    return scales is not None and q.dtype != torch.float32 and unit % 8 == 0 and can_start_early(q.device)
