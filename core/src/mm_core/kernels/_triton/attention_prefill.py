# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
# ruff: noqa: N803 (Triton constants are upper case)
"""Attention of many query tokens per sequence, over paged or packed keys."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mm_core.kernels._triton.attention import finish
from mm_core.kernels._triton.attention_fp8 import attend_cached, scale_arguments, scales_of
from mm_core.kernels.fp8 import DTYPE as FP8
from mm_core.kernels.kv_write import Scales

LOG2_E = 1.4426950408889634
# Bytes of shared memory that the largest tiles take.
ROOMY = 224 * 1024


@triton.jit
def find_sequence(cu_seqlens_ptr, tile, num_seqs, BLOCK_Q: tl.constexpr):
    """The sequence of a tile.

    Sequence s owns the tiles from cu_seqlens[s] // BLOCK_Q + s on: at least as many as it needs, and known
    without reading lengths back from the device. Tiles past its end have nothing to do.
    """
    found = 0
    for start in range(0, num_seqs, 128):
        # Many at a time: one load's wait where a bisection has several.
        seqs = start + tl.arange(0, 128)
        first = tl.load(cu_seqlens_ptr + seqs, mask=seqs < num_seqs, other=0)
        found += tl.sum(((first // BLOCK_Q + seqs <= tile) & (seqs < num_seqs)).to(tl.int32), 0)
    return found - 1


# Slices of a batch's integers start anywhere, which must not compile the kernel anew.
INTEGERS = ["table_ptr", "cu_seqlens_ptr", "kv_lens_ptr", "members_ptr", "bounds_ptr", "lens_ptr"]


@triton.jit(do_not_specialize=["num_tiles", "first_tile", "num_seqs"], do_not_specialize_on_alignment=INTEGERS[:3])
def prefill_kernel(
    out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    cu_seqlens_ptr,
    kv_lens_ptr,
    bias_ptr,
    num_tiles,
    first_tile,
    num_seqs,
    num_kv_heads,
    scale,
    stride_ot,
    stride_oh,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_table,
    stride_bh,
    stride_bq,
    stride_bk,
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
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGED: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALE_LATE: tl.constexpr,
    UNIT: tl.constexpr,
):
    """One program: BLOCK_Q tokens of one sequence, all GROUP query heads of one key head."""
    # Strides come in UNITs, so that the compiler knows them to be multiples and loads 16 bytes at a time.
    stride_ot, stride_oh = stride_ot * UNIT, stride_oh * UNIT
    stride_qt, stride_qh = stride_qt * UNIT, stride_qh * UNIT
    stride_kb, stride_kt, stride_kh = stride_kb * UNIT, stride_kt * UNIT, stride_kh * UNIT
    stride_vb, stride_vt, stride_vh = stride_vb * UNIT, stride_vt * UNIT, stride_vh * UNIT
    kv_head = tl.program_id(0) % num_kv_heads
    # Causal tiles at a sequence's end are the longest: they start first, so none is left alone at the end.
    tile = first_tile + num_tiles - 1 - tl.program_id(0) // num_kv_heads
    seq = find_sequence(cu_seqlens_ptr, tile, num_seqs, BLOCK_Q)
    q_start = tl.load(cu_seqlens_ptr + seq)
    q_len = tl.load(cu_seqlens_ptr + seq + 1) - q_start
    first = (tile - (q_start // BLOCK_Q + seq)) * BLOCK_Q
    if first >= q_len:
        return
    if PAGED:
        kv_len = tl.load(kv_lens_ptr + seq)
    else:
        kv_len = q_len
        k_ptr += q_start.to(tl.int64) * stride_kt
        v_ptr += q_start.to(tl.int64) * stride_vt
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    tokens = first + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    row_ok = (rows < BLOCK_Q * GROUP) & (tokens < q_len)
    io_mask = row_ok[:, None] & (dims[None, :] < D)
    at = (q_start + tokens).to(tl.int64)
    q_at = q_ptr + (at * stride_qt + heads * stride_qh)[:, None] + dims[None, :]
    q = tl.load(q_at, mask=io_mask, other=0.0)

    shift = 0
    if CAUSAL:
        shift = kv_len - q_len
    positions = tokens + shift
    bias_at = bias_ptr + (heads.to(tl.int64) * stride_bh + positions.to(tl.int64) * stride_bq)[:, None]
    bias_rows = (row_ok & (positions >= 0))[:, None]

    # Keys [0, clear) are visible to every row of the tile, keys [clear, hi) only to some.
    hi = kv_len
    clear = kv_len // BLOCK_N * BLOCK_N
    if CAUSAL:
        hi = tl.maximum(0, tl.minimum(kv_len, shift + tl.minimum(first + BLOCK_Q, q_len)))
        clear = tl.maximum(0, tl.minimum(kv_len, shift + first + 1)) // BLOCK_N * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    k_ptr += kv_head.to(tl.int64) * stride_kh
    v_ptr += kv_head.to(tl.int64) * stride_vh
    table_ptr += seq.to(tl.int64) * stride_table
    scales = scales_of(
        k_scales_ptr, v_scales_ptr, kv_head, stride_ksb, stride_kst, stride_ksh, stride_vsb, stride_vst, stride_vsh
    )
    acc, row_max, row_sum = attend_cached(
        acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, stride_kb, stride_kt, stride_vb, stride_vt, scales,
        bias_at, stride_bk, bias_rows, 0, clear, hi, kv_len, positions, scale,
        D, BLOCK_N, BLOCK_D, BLOCK_SIZE, CAUSAL, HAS_BIAS, SCALE_LATE, False, False, PAGED,
    )  # fmt: skip
    out_at = out_ptr + (at * stride_ot + heads * stride_oh)[:, None] + dims[None, :]
    tl.store(out_at, finish(acc, row_sum).to(out_ptr.dtype.element_ty), mask=io_mask)


class Tiles(NamedTuple):
    """Sizes of one prefill program: rows of queries (tokens * group), keys a step, warps, pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


def prefill_tiles(
    dtype: torch.dtype, head_size: int, rows: int, group: int, *, shared_memory: int, coded: bool = False
) -> Tiles:
    """Fixed by shape: float32 runs on plain FMAs, whose tiles must stay small; half types on tensor cores.

    rows: the longest sequence's, tokens * group. shared_memory: what one program may have, in bytes.
    coded: the cache is fp8, whose conversion costs the less a key the more keys a step has.
    Measured on one H100 (228 KiB); the small tiles for less memory are not tuned.
    """
    wide = triton.next_power_of_2(group)
    if dtype == torch.float32:
        return Tiles(max(32, wide), 32, 4, 2)
    if head_size > 128 or shared_memory < ROOMY:
        return Tiles(max(64, wide), 32, 4, 2)
    if rows <= 64:
        return Tiles(max(64, wide), 32, 4, 3)
    return Tiles(max(128, wide), 128, 8, 2) if coded else Tiles(max(128, wide), 64, 8, 3)


def stride_unit(strides: Iterable[int], cached: torch.dtype | None = None) -> int:
    """8 where every stride is a multiple of it (16 bytes of a half type), else 1; or 16 where a cache is fp8."""
    common = math.gcd(*strides)
    if cached == FP8 and common % 16 == 0:
        return 16
    return 8 if common % 8 == 0 else 1


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    out: Tensor,
    *,
    max_q_len: int,
    scale: float,
    causal: bool,
    block_tables: Tensor | None = None,
    kv_lens: Tensor | None = None,
    bias: Tensor | None = None,
    scales: Scales | None = None,
    tiles: Tiles | None = None,
    first_row: int = 0,
) -> None:
    """Writes attention of q [T, Hq, D] to out [T, Hq, D]; rows outside cu_seqlens_q are left as they are.

    With block_tables, k and v are caches [num_blocks, block_size, Hkv, D]; without, they are packed as q is,
    [T, Hkv, D]. `tiles` overrides the choice by shape (benchmarks). first_row: cu_seqlens_q[0], where known.
    """
    num_tokens, num_heads, head_size = q.shape
    group = num_heads // k.shape[-2]
    num_seqs = cu_seqlens_q.shape[0] - 1
    if num_tokens == 0 or num_seqs == 0:
        return
    memory = ROOMY
    if q.is_cuda:
        properties: Any = torch.cuda.get_device_properties(q.device)  # torch's stubs lack the attribute
        memory = properties.shared_memory_per_block_optin
    size = tiles or prefill_tiles(
        q.dtype, head_size, max_q_len * group, group, shared_memory=memory, coded=scales is not None
    )
    block_q = size.rows // group
    first_tile = first_row // block_q
    num_tiles = num_tokens // block_q - first_tile + num_seqs
    paged = block_tables is not None
    k_strides, v_strides = (x.stride()[:3] if paged else (0, *x.stride()[:2]) for x in (k, v))
    strides = (*out.stride()[:2], *q.stride()[:2], *k_strides, *v_strides)
    unit = stride_unit(strides, k.dtype)
    bias_strides = (0, 0, 0) if bias is None else (bias.stride(0) * (bias.shape[0] > 1), *bias.stride()[1:])
    prefill_kernel[(num_tiles * k.shape[-2],)](
        # Pointers that the kernel's flags leave unread still need some tensor.
        out, q, k, v, block_tables if paged else cu_seqlens_q, cu_seqlens_q,
        kv_lens if paged else cu_seqlens_q, q if bias is None else bias,
        num_tiles, first_tile, num_seqs, k.shape[-2], scale * LOG2_E,
        *(stride // unit for stride in strides),
        0 if block_tables is None else block_tables.stride(0), *bias_strides, *scale_arguments(scales),
        GROUP=group, D=head_size, BLOCK_M=size.rows, BLOCK_Q=block_q, BLOCK_N=size.keys,
        BLOCK_D=max(16, triton.next_power_of_2(head_size)), BLOCK_SIZE=k.shape[1] if paged else 1,
        PAGED=paged, CAUSAL=causal, HAS_BIAS=bias is not None, SCALE_LATE=bias is None and scale > 0,
        UNIT=unit, num_warps=size.warps, num_stages=size.stages, enable_fp_fusion=True,
    )  # fmt: skip
