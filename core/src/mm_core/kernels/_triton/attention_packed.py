# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
# ruff: noqa: N803 (Triton constants are upper case)
"""Attention over keys that lie together, for Hopper and later: encoders, and prompts whose keys are new.

Whole tiles of keys come by the copy engine (TMA), one query head a program, and a head size such as 80 is
computed as 64 + 16 rather than padded to 128. Keys of earlier steps, where there are any, are read from the
paged cache first.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mm_core.kernels._triton.attention_fp8 import attend_cached, scale_arguments, scales_of
from mm_core.kernels._triton.attention_prefill import INTEGERS, LOG2_E, find_sequence, stride_unit
from mm_core.kernels.fp8 import DTYPE as FP8
from mm_core.kernels.kv_write import Scales

# Chunks of a prompt from this many tokens on are worth a program for each query head.
MIN_CHUNK = 128


@triton.jit
def packed_step(acc, rest, row_max, row_sum, q, q_rest, k, k_rest, v, v_rest, visible, scale, REST: tl.constexpr):
    """One tile of keys; acc and rest are the two parts of the head. Rows may see none of the keys."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if REST:
        scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision="ieee")
    anchor = row_max
    if visible is not None:
        scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
        anchor = tl.where(new_max == float("-inf"), 0.0, new_max)
    else:
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
        anchor = new_max
    weights = tl.exp2(scores * scale - anchor[:, None])
    fade = tl.exp2(row_max - anchor)
    row_sum = row_sum * fade + tl.sum(weights, 1)
    rounded = weights.to(q.dtype)
    acc = tl.dot(rounded, v, acc * fade[:, None], input_precision="ieee")
    if REST:
        rest = tl.dot(rounded, v_rest, rest * fade[:, None], input_precision="ieee")
    return acc, rest, new_max, row_sum


@triton.jit
def earlier_keys(
    acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, stride_kb, stride_kt, stride_vb, stride_vt, scales, count, rows,
    scale, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Adds `count` keys of the paged cache, which every row sees."""
    clear = count // BLOCK_N * BLOCK_N
    row_ok = rows[:, None] >= 0
    acc, row_max, row_sum = attend_cached(
        acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, stride_kb, stride_kt, stride_vb, stride_vt, scales,
        k_ptr, 0, row_ok, 0, clear, count, count, rows, scale,
        D, BLOCK_N, BLOCK_D, BLOCK_SIZE, False, False, True, False, False,
    )  # fmt: skip
    return acc, row_max, row_sum


@triton.jit
def full_tiles(
    acc, rest, row_max, row_sum, q, q_rest, k_desc, v_desc, k_rest_desc, v_rest_desc, row, end, column, v_column, scale,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Adds the sequence's own keys [0, end), whole tiles that every row sees; its first lies in line `row`."""
    for start in range(0, end, BLOCK_N):
        k = k_desc.load([row + start, column])
        v = v_desc.load([row + start, v_column])
        k_rest, v_rest = k, v
        if REST:
            k_rest = k_rest_desc.load([row + start, column + BLOCK_D])
            v_rest = v_rest_desc.load([row + start, v_column + BLOCK_D])
        acc, rest, row_max, row_sum = packed_step(
            acc, rest, row_max, row_sum, q, q_rest, k, k_rest, v, v_rest, None, scale, REST
        )
    return acc, rest, row_max, row_sum


@triton.jit
def last_tiles(
    acc, rest, row_max, row_sum, q, q_rest, k_ptr, v_ptr, stride_kt, stride_vt, rows, lo, hi, length, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, REST: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Adds keys [lo, hi) of the sequence's `length`, which not all rows see. What lies past its end may be NaN
    and is not loaded."""
    dims = tl.arange(0, BLOCK_D)
    for start in range(lo, hi, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        inside = keys[:, None] < length
        k_at = k_ptr + keys.to(tl.int64)[:, None] * stride_kt
        v_at = v_ptr + keys.to(tl.int64)[:, None] * stride_vt
        k = tl.load(k_at + dims[None, :], mask=inside & (dims[None, :] < D), other=0.0)
        v = tl.load(v_at + dims[None, :], mask=inside & (dims[None, :] < D), other=0.0)
        k_rest, v_rest = k, v
        if REST:
            rest_dims = BLOCK_D + tl.arange(0, REST)
            mask = inside & (rest_dims[None, :] < D)
            k_rest = tl.load(k_at + rest_dims[None, :], mask=mask, other=0.0)
            v_rest = tl.load(v_at + rest_dims[None, :], mask=mask, other=0.0)
        visible = keys[None, :] < length
        if CAUSAL:
            visible = visible & (keys[None, :] <= rows[:, None])
        acc, rest, row_max, row_sum = packed_step(
            acc, rest, row_max, row_sum, q, q_rest, k, k_rest, v, v_rest, visible, scale, REST
        )
    return acc, rest, row_max, row_sum


@triton.jit(do_not_specialize=["num_tiles", "first_tile", "num_seqs"], do_not_specialize_on_alignment=INTEGERS[:3])
def packed_kernel(
    out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    k_desc,  # [T, Hkv * D] in tiles of [BLOCK_N, BLOCK_D]
    v_desc,
    k_rest_desc,  # the same in tiles of [BLOCK_N, REST], when REST
    v_rest_desc,
    k_cache_ptr,  # earlier keys, when PAGED
    v_cache_ptr,
    table_ptr,
    cu_seqlens_ptr,
    kv_lens_ptr,
    num_tiles,
    first_tile,
    num_seqs,
    num_heads,
    scale,
    stride_ot,
    stride_oh,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_kcb,
    stride_kct,
    stride_kch,
    stride_vcb,
    stride_vct,
    stride_vch,
    stride_table,
    k_scales_ptr,  # None, as their strides are, but for fp8 caches
    v_scales_ptr,
    stride_ksb,
    stride_kst,
    stride_ksh,
    stride_vsb,
    stride_vst,
    stride_vsh,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGED: tl.constexpr,
    CAUSAL: tl.constexpr,
    UNIT: tl.constexpr,
):
    """One program: BLOCK_M tokens of one sequence, one query head."""
    stride_ot, stride_oh, stride_qt, stride_qh = stride_ot * UNIT, stride_oh * UNIT, stride_qt * UNIT, stride_qh * UNIT
    stride_kt, stride_kh, stride_vt, stride_vh = stride_kt * UNIT, stride_kh * UNIT, stride_vt * UNIT, stride_vh * UNIT
    head = tl.program_id(0) % num_heads
    # Causal tiles at a sequence's end are the longest: they start first, so none is left alone at the end.
    tile = first_tile + num_tiles - 1 - tl.program_id(0) // num_heads
    seq = find_sequence(cu_seqlens_ptr, tile, num_seqs, BLOCK_M)
    q_start = tl.load(cu_seqlens_ptr + seq)
    q_len = tl.load(cu_seqlens_ptr + seq + 1) - q_start
    first = (tile - (q_start // BLOCK_M + seq)) * BLOCK_M
    if first >= q_len:
        return
    kv_head = head // GROUP
    rows = first + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    row_ok = rows[:, None] < q_len
    at = (q_start + rows).to(tl.int64)[:, None]
    q_at = q_ptr + at * stride_qt + head * stride_qh
    q = tl.load(q_at + dims[None, :], mask=row_ok & (dims[None, :] < D), other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    q_rest, rest = q, acc
    rest_dims = dims
    if REST:
        rest_dims = BLOCK_D + tl.arange(0, REST)
        q_rest = tl.load(q_at + rest_dims[None, :], mask=row_ok & (rest_dims[None, :] < D), other=0.0)
        rest = tl.zeros([BLOCK_M, REST], tl.float32)

    if PAGED:
        scales = scales_of(
            k_scales_ptr, v_scales_ptr, kv_head, stride_ksb, stride_kst, stride_ksh, stride_vsb, stride_vst, stride_vsh
        )
        acc, row_max, row_sum = earlier_keys(
            acc, row_max, row_sum, q, k_cache_ptr + kv_head.to(tl.int64) * stride_kch * UNIT,
            v_cache_ptr + kv_head.to(tl.int64) * stride_vch * UNIT, table_ptr + seq.to(tl.int64) * stride_table,
            stride_kcb * UNIT, stride_kct * UNIT, stride_vcb * UNIT, stride_vct * UNIT, scales,
            tl.load(kv_lens_ptr + seq) - q_len, rows, scale, D, BLOCK_N, BLOCK_D, BLOCK_SIZE,
        )  # fmt: skip
    # The sequence's own keys: [0, clear) are visible to every row of the tile, [clear, hi) only to some.
    hi = q_len
    clear = q_len // BLOCK_N * BLOCK_N
    if CAUSAL:
        hi = tl.minimum(first + BLOCK_M, q_len)
        clear = (first + 1) // BLOCK_N * BLOCK_N
    acc, rest, row_max, row_sum = full_tiles(
        acc, rest, row_max, row_sum, q, q_rest, k_desc, v_desc, k_rest_desc, v_rest_desc, q_start, clear,
        (kv_head * stride_kh).to(tl.int32), (kv_head * stride_vh).to(tl.int32), scale, BLOCK_D, BLOCK_N, REST,
    )  # fmt: skip
    k_ptr += q_start.to(tl.int64) * stride_kt + kv_head * stride_kh
    v_ptr += q_start.to(tl.int64) * stride_vt + kv_head * stride_vh
    acc, rest, row_max, row_sum = last_tiles(
        acc, rest, row_max, row_sum, q, q_rest, k_ptr, v_ptr, stride_kt, stride_vt, rows, clear, hi, q_len, scale,
        D, BLOCK_D, BLOCK_N, REST, CAUSAL,
    )  # fmt: skip
    share = 1.0 / row_sum[:, None]
    out_at = out_ptr + at * stride_ot + head * stride_oh
    dtype = out_ptr.dtype.element_ty
    tl.store(out_at + dims[None, :], (acc * share).to(dtype), mask=row_ok & (dims[None, :] < D))
    if REST:
        tl.store(out_at + rest_dims[None, :], (rest * share).to(dtype), mask=row_ok & (rest_dims[None, :] < D))


class PackedTiles(NamedTuple):
    """Sizes of one program: tokens, keys a step, warps, pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


def packed_tiles(longest: int) -> PackedTiles:
    """Measured on one H100: two programs or three on a multiprocessor hide each other's softmax, which larger
    tiles do not; a pipeline of three stages pays where there are some steps to take."""
    return PackedTiles(64, 64, 4, 3 if longest > 512 else 2)


def packable(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Whether the copy engine can read k and v, and the tiles were made for what they are."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or {k.dtype, v.dtype} != {q.dtype}:
        return False
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    return (
        torch.cuda.get_device_capability(q.device)[0] >= 9
        and 32 <= q.shape[2] <= 128
        and q.shape[2] % 8 == 0
        and scale > 0
        and stride_unit(strides) == 8
        and k.data_ptr() % 16 == 0
        and v.data_ptr() % 16 == 0
    )


def packed_pays(
    q: Tensor, fresh: tuple[Tensor, Tensor], k_cache: Tensor, scale: float, max_q_len: int, max_kv_len: int
) -> bool:
    """Whether chunks of a prompt are better read from `fresh` than from the cache. Short ones, and those after
    many cached keys, do better with the heads of one key head in one tile. A cache of another type than the
    model's holds other values than `fresh`, but for fp8, to whose values `fresh` was rounded."""
    whole = q.shape[2] in (64, 128)
    # Earlier keys in fp8 are converted once for each tile of rows, and these are the smaller ones.
    most = 1.5 if k_cache.dtype == FP8 else 4
    long = max_q_len >= MIN_CHUNK and max_kv_len <= most * max_q_len
    return whole and long and k_cache.dtype in (q.dtype, FP8) and packable(q, *fresh, scale)


def packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    *,
    max_seqlen: int,
    scale: float,
    causal: bool,
    caches: tuple[Tensor, Tensor] | None = None,
    block_tables: Tensor | None = None,
    kv_lens: Tensor | None = None,
    scales: Scales | None = None,
    first_row: int = 0,
    tiles: PackedTiles | None = None,
) -> None:
    """Writes attention of q [T, Hq, D] over k, v [T, Hkv, D] inside each sequence to out [T, Hq, D]; causal for
    sequences that go on after kv_lens - q_len earlier keys in `caches`, whose D must be a power of two.

    `tiles` overrides the choice by shape (benchmarks). first_row: cu_seqlens[0], where known.
    """
    num_tokens, num_heads, head_size = q.shape
    num_seqs, num_kv_heads = cu_seqlens.shape[0] - 1, k.shape[1]
    if num_tokens == 0 or num_seqs == 0:
        return
    size = tiles or packed_tiles(max_seqlen)
    width = 1 << (head_size.bit_length() - 1)
    rest = max(16, triton.next_power_of_2(head_size - width)) if head_size > width else 0
    paged = caches is not None
    old = caches or (k, v)
    strides = (*out.stride()[:2], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    strides += (*old[0].stride()[:3], *old[1].stride()[:3]) if paged else (0,) * 6
    unit = stride_unit(strides)
    first_tile = first_row // size.rows
    num_tiles = num_tokens // size.rows - first_tile + num_seqs

    def described(x: Tensor, dims: int) -> TensorDescriptor:
        columns = (num_kv_heads - 1) * x.stride(1) + head_size
        return TensorDescriptor(x, [num_tokens, columns], [x.stride(0), 1], [size.keys, dims])

    packed_kernel[(num_tiles * num_heads,)](
        out, q, k, v, described(k, width), described(v, width),
        described(k, rest) if rest else q, described(v, rest) if rest else q,
        # Pointers that the kernel's flags leave unread still need some tensor.
        *old, block_tables if paged else cu_seqlens, cu_seqlens, kv_lens if paged else cu_seqlens,
        num_tiles, first_tile, num_seqs, num_heads, scale * LOG2_E,
        *(stride // unit for stride in strides), 0 if block_tables is None else block_tables.stride(0),
        *scale_arguments(scales),
        GROUP=num_heads // num_kv_heads, D=head_size, BLOCK_D=width, REST=rest, BLOCK_M=size.rows,
        BLOCK_N=size.keys, BLOCK_SIZE=old[0].shape[1] if paged else 1, PAGED=paged, CAUSAL=causal, UNIT=unit,
        num_warps=size.warps, num_stages=size.stages, enable_fp_fusion=True,
    )  # fmt: skip
