# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
# ruff: noqa: N803 (Triton constants are upper case)
"""Attention of groups of single-token sequences over the keys that they share, each key read once a group.

The queries of a group's members fill the rows of one tile, as in Hydragen (Juravsky et al. 2024) and in
FlashInfer's cascade attention (Ye et al. 2024); `attention_decode` goes on from the partial results.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mm_core.kernels._triton.attention import attend, finish, log_sum, split_size
from mm_core.kernels._triton.attention_prefill import INTEGERS, LOG2_E, stride_unit

# Shared keys are split so that few groups fill the multiprocessors, in pieces of at least so many keys.
MAX_SHARED_SPLITS = 8
MIN_SHARED_KEYS = 128


class SharedPart(NamedTuple):
    """Partial results over shared keys: `results` float32 [S, Hq, splits, D], `lse` float32 [S, Hq, splits] in
    base 2, for a group's members alone; min_keys and block say into how many splits a length falls."""

    members: Tensor
    bounds: Tensor
    lens: Tensor
    results: Tensor
    lse: Tensor
    splits: int
    min_keys: int
    block: int


@triton.jit
def shared_by(place, members_ptr, bounds_ptr, lens_ptr, num_seqs, BLOCK_S: tl.constexpr):
    """The sequence at a place of the members, and the tokens that its group shares.

    Places past the last group hold no member: those sequences stand for themselves.
    """
    groups = tl.arange(0, BLOCK_S)
    ends = tl.load(bounds_ptr + 1 + groups, mask=groups < num_seqs, other=place + 1)
    group = tl.sum(((ends <= place) & (groups < num_seqs)).to(tl.int32), 0)
    member = tl.load(members_ptr + place)
    length = tl.load(lens_ptr + group, mask=group < num_seqs, other=0)
    return tl.where(group < num_seqs, member, place), length


@triton.jit(
    do_not_specialize=["num_splits", "num_seqs"],
    do_not_specialize_on_alignment=[name for name in INTEGERS if name != "kv_lens_ptr"],
)
def shared_kernel(
    partial_ptr,  # float32 [S, Hq, num_splits, D]
    lse_ptr,  # float32 [S, Hq, num_splits], base 2
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    cu_seqlens_ptr,
    members_ptr,
    bounds_ptr,
    lens_ptr,
    num_splits,
    num_seqs,
    scale,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_table,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MIN_KEYS: tl.constexpr,
    SCALE_LATE: tl.constexpr,
    UNIT: tl.constexpr,
):
    """One program: the query heads of one key head of MEMBERS members of one group, over one split of its keys."""
    stride_qt, stride_qh = stride_qt * UNIT, stride_qh * UNIT
    stride_kb, stride_kt, stride_kh = stride_kb * UNIT, stride_kt * UNIT, stride_kh * UNIT
    stride_vb, stride_vt, stride_vh = stride_vb * UNIT, stride_vt * UNIT, stride_vh * UNIT
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    tile = tl.program_id(2)
    # Group g owns the tiles from bounds[g] // MEMBERS + g on: at least as many as it needs.
    groups = tl.arange(0, BLOCK_S)
    starts = tl.load(bounds_ptr + groups, mask=groups < num_seqs, other=0)
    group = tl.sum(((starts // MEMBERS + groups <= tile) & (groups < num_seqs)).to(tl.int32), 0) - 1
    length = tl.load(lens_ptr + group)
    start = tl.load(bounds_ptr + group)
    end = tl.load(bounds_ptr + group + 1)
    first = start + (tile - (start // MEMBERS + group)) * MEMBERS
    size = split_size(length, num_splits, MIN_KEYS, BLOCK_N)
    lo = split * size
    hi = tl.minimum(lo + size, length)
    if (first >= end) | (lo >= hi):
        return
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    places = first + rows // GROUP
    row_ok = (rows < MEMBERS * GROUP) & (places < end)
    io_mask = row_ok[:, None] & (dims[None, :] < D)
    seqs = tl.load(members_ptr + places, mask=row_ok, other=0)
    tokens = tl.load(cu_seqlens_ptr + seqs, mask=row_ok, other=0)
    heads = kv_head * GROUP + rows % GROUP
    q_at = q_ptr + (tokens.to(tl.int64) * stride_qt + heads * stride_qh)[:, None] + dims[None, :]
    q = tl.load(q_at, mask=io_mask, other=0.0)
    # Any member's blocks will do.
    table_ptr += tl.load(members_ptr + first).to(tl.int64) * stride_table
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    k_ptr += kv_head.to(tl.int64) * stride_kh
    v_ptr += kv_head.to(tl.int64) * stride_vh
    clear = lo + (hi - lo) // BLOCK_N * BLOCK_N
    acc, row_max, row_sum = attend(
        acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, stride_kb, stride_kt, stride_vb, stride_vt,
        q_ptr, 0, row_ok[:, None], lo, clear, hi, rows, scale,
        D, BLOCK_N, BLOCK_D, BLOCK_SIZE, True, False, False, SCALE_LATE, MASKED=False, ALIGN=BLOCK_N,
    )  # fmt: skip
    acc, row_max, row_sum = attend(
        acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, stride_kb, stride_kt, stride_vb, stride_vt,
        q_ptr, 0, row_ok[:, None], clear, hi, hi, rows, scale,
        D, BLOCK_N, BLOCK_D, BLOCK_SIZE, True, False, False, SCALE_LATE, MASKED=True, ALIGN=BLOCK_N,
    )  # fmt: skip
    at = (seqs.to(tl.int64) * (tl.num_programs(0) * GROUP) + heads) * num_splits + split
    tl.store(lse_ptr + at, log_sum(row_max, row_sum), mask=row_ok)
    tl.store(partial_ptr + at[:, None] * D + dims[None, :], finish(acc, row_sum), mask=io_mask)


class SharedTiles(NamedTuple):
    """Sizes of one program: rows of queries (members * group), keys a step, warps, pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


def shared_tiles(dtype: torch.dtype, head_size: int, rows: int) -> SharedTiles:
    """Fixed by shape; rows: those of the whole batch, which bound a group's."""
    wide = max(16, triton.next_power_of_2(rows))
    if dtype == torch.float32 or head_size > 128:
        return SharedTiles(min(wide, 32), 32, 4, 2)
    return SharedTiles(min(wide, 128), 64, 8 if wide >= 128 else 4, 2)


def attend_shared(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    members: Tensor,
    bounds: Tensor,
    lens: Tensor,
    *,
    max_kv_len: int,
    scale: float,
    tiles: SharedTiles | None = None,
) -> SharedPart:
    """Partial results of q [T, Hq, D], one row a sequence, over its group's shared keys.

    members, bounds and lens: see `SharedPrefixes`. `tiles` overrides the choice by shape (benchmarks).
    """
    _, block_size, num_kv_heads, head_size = k_cache.shape
    num_heads, num_seqs = q.shape[1], members.shape[0]
    group = num_heads // num_kv_heads
    size = tiles or shared_tiles(q.dtype, head_size, num_seqs * group)
    size = size._replace(rows=max(size.rows, triton.next_power_of_2(group)))
    per_tile = size.rows // group
    splits = max(1, min(MAX_SHARED_SPLITS, triton.cdiv(max_kv_len, MIN_SHARED_KEYS)))
    results = torch.empty((num_seqs, num_heads, splits, head_size), dtype=torch.float32, device=q.device)
    lse = torch.empty((num_seqs, num_heads, splits), dtype=torch.float32, device=q.device)
    strides = (*q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3])
    unit = stride_unit(strides)
    # Groups that share come first and have two members or more; the tiles past their last find nothing to do.
    num_tiles = num_seqs // per_tile + max(num_seqs // 2, 1)
    shared_kernel[(num_kv_heads, splits, num_tiles)](
        results, lse, q, k_cache, v_cache, block_tables, cu_seqlens_q, members, bounds, lens,
        splits, num_seqs, scale * LOG2_E, *(stride // unit for stride in strides), block_tables.stride(0),
        GROUP=group, D=head_size, BLOCK_M=size.rows, MEMBERS=per_tile, BLOCK_N=size.keys,
        BLOCK_D=triton.next_power_of_2(head_size), BLOCK_S=triton.next_power_of_2(num_seqs),
        BLOCK_SIZE=block_size, MIN_KEYS=MIN_SHARED_KEYS, SCALE_LATE=scale > 0, UNIT=unit,
        num_warps=size.warps, num_stages=size.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return SharedPart(members, bounds, lens, results, lse, splits, MIN_SHARED_KEYS, size.keys)
