# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
# ruff: noqa: N803 (Triton constants are upper case)
"""Attention of one query token per sequence over paged keys, split along the keys (Flash-Decoding, 2023)."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mm_core.kernels._triton.attention import attend, finish
from mm_core.kernels._triton.attention_prefill import LOG2_E, stride_unit

# A split shorter than this costs more in the reduction than it gains.
MIN_SPLIT_KEYS = 256
MAX_SPLITS = 128


@triton.jit(do_not_specialize=["num_splits"])
def decode_kernel(
    out_ptr,  # [T, Hq, D], or float32 [S, Hq, num_splits, D] when SPLIT
    lse_ptr,  # float32 [S, Hq, num_splits], base 2, -inf for a split without keys
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    cu_seqlens_ptr,
    kv_lens_ptr,
    bias_ptr,
    num_splits,
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
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALE_LATE: tl.constexpr,
    SPLIT: tl.constexpr,
    MIN_KEYS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """One program: the GROUP query heads of one key head of one sequence, over one split of its keys."""
    stride_ot, stride_oh = stride_ot * UNIT, stride_oh * UNIT
    stride_qt, stride_qh = stride_qt * UNIT, stride_qh * UNIT
    stride_kb, stride_kt, stride_kh = stride_kb * UNIT, stride_kt * UNIT, stride_kh * UNIT
    stride_vb, stride_vt, stride_vh = stride_vb * UNIT, stride_vt * UNIT, stride_vh * UNIT
    kv_head = tl.program_id(0)
    seq = tl.program_id(1)
    split = tl.program_id(2)
    token = tl.load(cu_seqlens_ptr + seq)
    if tl.load(cu_seqlens_ptr + seq + 1) <= token:
        return
    kv_len = tl.load(kv_lens_ptr + seq)
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    heads = kv_head * GROUP + rows
    row_ok = rows < GROUP
    io_mask = row_ok[:, None] & (dims[None, :] < D)

    lo = 0
    hi = kv_len
    partial = (seq * (tl.num_programs(0) * GROUP) + heads).to(tl.int64) * num_splits + split
    if SPLIT:
        # By the true length, not the batch's longest: graphs are captured for the longest there can be.
        keys = tl.maximum(tl.cdiv(tl.cdiv(kv_len, num_splits), BLOCK_N) * BLOCK_N, MIN_KEYS)
        lo = split * keys
        hi = tl.minimum(lo + keys, kv_len)
        if lo >= hi:
            tl.store(lse_ptr + partial, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=row_ok)
            return

    q_at = q_ptr + token.to(tl.int64) * stride_qt + heads[:, None] * stride_qh + dims[None, :]
    q = tl.load(q_at, mask=io_mask, other=0.0)
    bias_at = bias_ptr + heads[:, None].to(tl.int64) * stride_bh
    if CAUSAL:
        bias_at += (kv_len - 1).to(tl.int64) * stride_bq
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    k_ptr += kv_head.to(tl.int64) * stride_kh
    v_ptr += kv_head.to(tl.int64) * stride_vh
    table_ptr += seq.to(tl.int64) * stride_table
    clear = lo + (hi - lo) // BLOCK_N * BLOCK_N
    # The newest token sees every key, so no row needs a causal mask.
    acc, row_max, row_sum = attend(
        acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, stride_kb, stride_kt, stride_vb, stride_vt,
        bias_at, stride_bk, row_ok[:, None], lo, clear, hi, rows, scale,
        D, BLOCK_N, BLOCK_D, BLOCK_SIZE, True, False, HAS_BIAS, SCALE_LATE, MASKED=False,
    )  # fmt: skip
    acc, row_max, row_sum = attend(
        acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, stride_kb, stride_kt, stride_vb, stride_vt,
        bias_at, stride_bk, row_ok[:, None], clear, hi, hi, rows, scale,
        D, BLOCK_N, BLOCK_D, BLOCK_SIZE, True, False, HAS_BIAS, SCALE_LATE, MASKED=True,
    )  # fmt: skip
    result = finish(acc, row_sum)
    if SPLIT:
        lse = tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log2(row_sum))
        tl.store(lse_ptr + partial, lse, mask=row_ok)
        tl.store(out_ptr + partial[:, None] * D + dims[None, :], result, mask=io_mask)
    else:
        out_at = out_ptr + token.to(tl.int64) * stride_ot + heads[:, None] * stride_oh + dims[None, :]
        tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=io_mask)


@triton.jit(do_not_specialize=["num_splits"])
def combine_kernel(
    out_ptr,  # [T, Hq, D]
    partial_ptr,  # float32 [S, Hq, num_splits, D]
    lse_ptr,  # float32 [S, Hq, num_splits]
    cu_seqlens_ptr,
    num_splits,
    stride_ot,
    stride_oh,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """One program: one head of one sequence. out = sum_i 2^(lse_i - lse) partial_i."""
    head = tl.program_id(0)
    seq = tl.program_id(1)
    token = tl.load(cu_seqlens_ptr + seq)
    if tl.load(cu_seqlens_ptr + seq + 1) <= token:
        return
    splits = tl.arange(0, BLOCK_SPLITS)
    dims = tl.arange(0, BLOCK_D)
    at = (seq * tl.num_programs(0) + head).to(tl.int64) * num_splits + splits
    lse = tl.load(lse_ptr + at, mask=splits < num_splits, other=float("-inf"))
    best = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(best == float("-inf"), 0.0, best))
    # A split without keys wrote no partial result: what lies there may be NaN and must not be loaded.
    loadable = (lse != float("-inf"))[:, None] & (dims[None, :] < D)
    parts = tl.load(partial_ptr + at[:, None] * D + dims[None, :], mask=loadable, other=0.0)
    total = tl.sum(weights, 0)
    result = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    out_at = out_ptr + token.to(tl.int64) * stride_ot + head * stride_oh + dims
    tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=dims < D)


def num_decode_splits(num_programs: int, max_kv_len: int, num_processors: int) -> int:
    """As many splits as run at once, at three programs a multiprocessor, none under MIN_SPLIT_KEYS keys.

    One program more than run at once would double the time, so the quotient is rounded down.
    """
    wanted = 3 * num_processors // max(num_programs, 1)
    return max(1, min(wanted, triton.cdiv(max_kv_len, MIN_SPLIT_KEYS), MAX_SPLITS))


class DecodeTiles(NamedTuple):
    """Sizes of one decode program: keys a step, warps, pipeline stages."""

    keys: int
    warps: int
    stages: int


def decode_tiles(dtype: torch.dtype, head_size: int, rows: int, busy: bool) -> DecodeTiles:
    """Fixed by shape: enough bytes in flight for the memory's latency. Measured on one H100.

    rows: query heads of one key head, padded. busy: many more programs than run at once; small ones then keep
    all multiprocessors loading, while few programs are sooner done with wide steps.
    """
    if dtype == torch.float32 or head_size > 128:
        return DecodeTiles(32, 4, 2)
    return DecodeTiles(32, 2, 4) if busy and rows <= 32 else DecodeTiles(64, 4, 3)


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    out: Tensor,
    *,
    max_kv_len: int,
    scale: float,
    causal: bool,
    bias: Tensor | None = None,
    num_splits: int | None = None,
    tiles: DecodeTiles | None = None,
) -> None:
    """Writes attention of q [T, Hq, D], at most one row a sequence, to out [T, Hq, D].

    `num_splits` and `tiles` override the choice by shape (benchmarks).
    """
    _, block_size, num_kv_heads, head_size = k_cache.shape
    num_heads, num_seqs = q.shape[1], kv_lens.shape[0]
    if q.shape[0] == 0 or num_seqs == 0:
        return
    group = num_heads // num_kv_heads
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 8
    programs = num_seqs * num_kv_heads
    splits = num_splits or num_decode_splits(programs, max_kv_len, processors)
    partial, lse = out, out
    if splits > 1:
        partial = torch.empty((num_seqs, num_heads, splits, head_size), dtype=torch.float32, device=q.device)
        lse = torch.empty((num_seqs, num_heads, splits), dtype=torch.float32, device=q.device)
    strides = (*out.stride()[:2], *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3])
    unit = stride_unit(strides)
    bias_strides = (0, 0, 0) if bias is None else (bias.stride(0) * (bias.shape[0] > 1), *bias.stride()[1:])
    rows = max(16, triton.next_power_of_2(group))
    size = tiles or decode_tiles(q.dtype, head_size, rows, programs >= 8 * processors)
    decode_kernel[(num_kv_heads, num_seqs, splits)](
        partial, lse, q, k_cache, v_cache, block_tables, cu_seqlens_q, kv_lens,
        q if bias is None else bias, splits, scale * LOG2_E,
        *(stride // unit for stride in strides), block_tables.stride(0), *bias_strides,
        GROUP=group, D=head_size, BLOCK_M=rows, BLOCK_N=size.keys,
        BLOCK_D=triton.next_power_of_2(head_size), BLOCK_SIZE=block_size,
        CAUSAL=causal, HAS_BIAS=bias is not None, SCALE_LATE=bias is None and scale > 0, SPLIT=splits > 1,
        MIN_KEYS=MIN_SPLIT_KEYS, UNIT=unit,
        num_warps=size.warps, num_stages=size.stages, enable_fp_fusion=True,
    )  # fmt: skip
    if splits > 1:
        combine_kernel[(num_heads, num_seqs)](
            out, partial, lse, cu_seqlens_q, splits, *out.stride()[:2],
            D=head_size, BLOCK_D=triton.next_power_of_2(head_size),
            BLOCK_SPLITS=triton.next_power_of_2(splits), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
