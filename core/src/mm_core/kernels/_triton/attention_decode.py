# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
# ruff: noqa: N803 (Triton constants are upper case)
"""Attention of one query token per sequence over paged keys, split along the keys (Flash-Decoding, 2023).

With `shared`, the keys that a group of sequences shares were already attended to (`attention_shared`); each
sequence starts from those partial results and reads its own keys alone.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mm_core.kernels._triton.attention import add_partials, attend, finish, log_sum, split_size
from mm_core.kernels._triton.attention_prefill import INTEGERS, LOG2_E, stride_unit
from mm_core.kernels._triton.attention_shared import SharedPart, shared_by

MAX_SPLITS = 128


@triton.jit(do_not_specialize=["num_splits", "min_keys", "num_shared_splits"], do_not_specialize_on_alignment=INTEGERS)
def decode_kernel(
    out_ptr,  # [T, Hq, D]
    partial_ptr,  # float32 [S, Hq, num_splits, D] when SPLIT
    lse_ptr,  # float32 [S, Hq, num_splits], base 2
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    cu_seqlens_ptr,
    kv_lens_ptr,
    bias_ptr,
    members_ptr,  # of the groups, when SHARED
    bounds_ptr,
    lens_ptr,
    shared_ptr,  # float32 [S, Hq, num_shared_splits, D]
    shared_lse_ptr,  # float32 [S, Hq, num_shared_splits], base 2
    num_splits,
    min_keys,
    num_shared_splits,
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
    SHARED: tl.constexpr,
    SHARED_KEYS: tl.constexpr,
    SHARED_BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STEP: tl.constexpr,  # splits and shared keys end at multiples of it
    UNIT: tl.constexpr,
):
    """One program: the GROUP query heads of one key head of one sequence, over one split of its own keys."""
    stride_ot, stride_oh = stride_ot * UNIT, stride_oh * UNIT
    stride_qt, stride_qh = stride_qt * UNIT, stride_qh * UNIT
    stride_kb, stride_kt, stride_kh = stride_kb * UNIT, stride_kt * UNIT, stride_kh * UNIT
    stride_vb, stride_vt, stride_vh = stride_vb * UNIT, stride_vt * UNIT, stride_vh * UNIT
    kv_head, seq, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    own = 0
    if SHARED:
        seq, own = shared_by(seq, members_ptr, bounds_ptr, lens_ptr, tl.num_programs(1), BLOCK_S)
    token = tl.load(cu_seqlens_ptr + seq)
    if tl.load(cu_seqlens_ptr + seq + 1) <= token:
        return
    kv_len = tl.load(kv_lens_ptr + seq)
    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    heads = kv_head * GROUP + rows
    row_ok = rows < GROUP
    io_mask = row_ok[:, None] & (dims[None, :] < D)
    at = (seq * (tl.num_programs(0) * GROUP) + heads).to(tl.int64)

    lo, hi = own, kv_len
    if SPLIT:
        size = split_size(kv_len - own, num_splits, min_keys, STEP)
        lo = own + split * size
        if (lo >= kv_len) & (split > 0):
            return
        hi = tl.minimum(lo + size, kv_len)

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
    # The newest token sees every key: no causal mask. One masked loop is sooner done than a bare one and a rest.
    acc, row_max, row_sum = attend(
        acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, stride_kb, stride_kt, stride_vb, stride_vt,
        bias_at, stride_bk, row_ok[:, None], lo, hi, hi, rows, scale,
        D, BLOCK_N, BLOCK_D, BLOCK_SIZE, True, False, HAS_BIAS, SCALE_LATE, MASKED=True, ALIGN=STEP,
    )  # fmt: skip
    if SHARED:  # noqa: SIM102 (decided when compiled, unlike the next)
        if (own > 0) & (split == 0):
            count = tl.cdiv(own, split_size(own, num_shared_splits, SHARED_KEYS, SHARED_BLOCK))
            acc, row_max, row_sum = add_partials(
                acc, row_max, row_sum, shared_ptr, shared_lse_ptr, at * num_shared_splits, count, row_ok, D, BLOCK_D
            )
    result = finish(acc, row_sum)
    whole = True
    if SPLIT:
        whole = (split == 0) & (hi >= kv_len)
        if not whole:
            partial = at * num_splits + split
            tl.store(lse_ptr + partial, log_sum(row_max, row_sum), mask=row_ok)
            tl.store(partial_ptr + partial[:, None] * D + dims[None, :], result, mask=io_mask)
    if whole:
        out_at = out_ptr + token.to(tl.int64) * stride_ot + heads[:, None] * stride_oh + dims[None, :]
        tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=io_mask)


@triton.jit(do_not_specialize=["num_splits", "min_keys"], do_not_specialize_on_alignment=INTEGERS[1:])
def combine_kernel(
    out_ptr,  # [T, Hq, D]
    partial_ptr,  # float32 [S, Hq, num_splits, D]
    lse_ptr,  # float32 [S, Hq, num_splits]
    cu_seqlens_ptr,
    kv_lens_ptr,
    members_ptr,
    bounds_ptr,
    lens_ptr,
    num_splits,
    min_keys,
    stride_ot,
    stride_oh,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """One program: BLOCK_D dims of one head of a sequence of several splits. out = sum_i 2^(lse_i - lse) partial_i."""
    head = tl.program_id(0)
    seq = tl.program_id(1)
    own = 0
    if SHARED:
        seq, own = shared_by(seq, members_ptr, bounds_ptr, lens_ptr, tl.num_programs(1), BLOCK_S)
    token = tl.load(cu_seqlens_ptr + seq)
    length = tl.load(kv_lens_ptr + seq) - own
    used = tl.cdiv(length, split_size(length, num_splits, min_keys, STEP))
    if (used <= 1) | (tl.load(cu_seqlens_ptr + seq + 1) <= token):
        return
    splits = tl.arange(0, BLOCK_SPLITS)
    dims = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    at = (seq * tl.num_programs(0) + head).to(tl.int64) * num_splits + splits
    lse = tl.load(lse_ptr + at, mask=splits < used, other=float("-inf"))
    best = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(best == float("-inf"), 0.0, best))
    # Unused splits wrote nothing: what lies there may be NaN and must not be loaded.
    loadable = (splits < used)[:, None] & (dims[None, :] < D)
    parts = tl.load(partial_ptr + at[:, None] * D + dims[None, :], mask=loadable, other=0.0)
    total = tl.sum(weights, 0)
    result = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    out_at = out_ptr + token.to(tl.int64) * stride_ot + head * stride_oh + dims
    tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=dims < D)


def num_decode_splits(num_programs: int, max_kv_len: int, num_processors: int) -> tuple[int, int]:
    """The most splits of a sequence, two programs for each multiprocessor, and the fewest keys worth one.

    The more sequences there are, the longer a split must be to pay for the reduction: they keep the memory busy
    anyway. Measured on one H100.
    """
    wanted = 2 * num_processors // max(num_programs, 1)
    min_keys = max(64, 4 * triton.next_power_of_2(num_programs))
    return max(1, min(wanted, triton.cdiv(max_kv_len, min_keys), MAX_SPLITS)), min_keys


class DecodeTiles(NamedTuple):
    """Sizes of one decode program: keys a step, warps, pipeline stages."""

    keys: int
    warps: int
    stages: int


def decode_tiles(dtype: torch.dtype, head_size: int) -> DecodeTiles:
    """Fixed by shape: enough bytes in flight for the memory's latency. Measured on one H100."""
    if dtype == torch.float32 or head_size > 128:
        return DecodeTiles(32, 4, 2)
    return DecodeTiles(64, 4, 2)


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
    shared: SharedPart | None = None,
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
    splits, min_keys = num_decode_splits(programs, max_kv_len, processors)
    splits = num_splits or splits
    partial, lse = out, out
    if splits > 1:
        partial = torch.empty((num_seqs, num_heads, splits, head_size), dtype=torch.float32, device=q.device)
        lse = torch.empty((num_seqs, num_heads, splits), dtype=torch.float32, device=q.device)
    part = shared or SharedPart(cu_seqlens_q, cu_seqlens_q, cu_seqlens_q, out, out, 1, 1, 1)
    strides = (*out.stride()[:2], *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3])
    unit = stride_unit(strides)
    bias_strides = (0, 0, 0) if bias is None else (bias.stride(0) * (bias.shape[0] > 1), *bias.stride()[1:])
    rows = max(16, triton.next_power_of_2(group))
    size = tiles or decode_tiles(q.dtype, head_size)
    step = math.gcd(block_size, size.keys)
    over = {"SHARED": shared is not None, "BLOCK_S": triton.next_power_of_2(num_seqs) if shared else 1}
    decode_kernel[(num_kv_heads, num_seqs, splits)](
        out, partial, lse, q, k_cache, v_cache, block_tables, cu_seqlens_q, kv_lens, q if bias is None else bias,
        part.members, part.bounds, part.lens, part.results, part.lse, splits, min_keys, part.splits, scale * LOG2_E,
        *(stride // unit for stride in strides), block_tables.stride(0), *bias_strides,
        GROUP=group, D=head_size, BLOCK_M=rows, BLOCK_N=size.keys,
        BLOCK_D=triton.next_power_of_2(head_size), BLOCK_SIZE=block_size,
        CAUSAL=causal, HAS_BIAS=bias is not None, SCALE_LATE=bias is None and scale > 0, SPLIT=splits > 1,
        SHARED_KEYS=part.min_keys, SHARED_BLOCK=part.block, STEP=step, UNIT=unit, **over,
        num_warps=size.warps, num_stages=size.stages, enable_fp_fusion=True,
    )  # fmt: skip
    if splits > 1:
        dims = triton.next_power_of_2(head_size)
        dims = min(dims, 32) if num_seqs * num_heads < 2 * processors else dims
        combine_kernel[(num_heads, num_seqs, triton.cdiv(head_size, dims))](
            out, partial, lse, cu_seqlens_q, kv_lens, part.members, part.bounds, part.lens, splits, min_keys,
            *out.stride()[:2], D=head_size, BLOCK_D=dims, STEP=step, **over,
            BLOCK_SPLITS=triton.next_power_of_2(splits), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
