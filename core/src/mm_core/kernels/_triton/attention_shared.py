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

from mm_core.kernels._triton.attention import finish, log_sum, split_size
from mm_core.kernels._triton.attention_fp8 import alike, attend_cached, scale_arguments, scales_of, takes_pairs
from mm_core.kernels._triton.attention_prefill import INTEGERS, LOG2_E, stride_unit
from mm_core.kernels.kv_write import Scales

# Shared keys are split so that few groups fill the multiprocessors, in pieces of at least so many keys.
MAX_SHARED_SPLITS = 8
MIN_SHARED_KEYS = 128
# Programs a multiprocessor: they share out the work that there is. A grid for all that there could be, in a graph
# captured for the largest batch, took longer to end its idle programs than the rest to do the work.
PROGRAMS = 8


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
    MEMBERS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MIN_KEYS: tl.constexpr,
    SCALE_LATE: tl.constexpr,
    UNIT: tl.constexpr,
    KV_HEADS: tl.constexpr,
    ALIKE: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """A piece of work: the query heads of one key head of MEMBERS members of one group, over one split of its
    keys. A program does every so many-th of them."""
    stride_qt, stride_qh = stride_qt * UNIT, stride_qh * UNIT
    stride_kb, stride_kt, stride_kh = stride_kb * UNIT, stride_kt * UNIT, stride_kh * UNIT
    stride_vb, stride_vt, stride_vh = stride_vb * UNIT, stride_vt * UNIT, stride_vh * UNIT
    groups = tl.arange(0, BLOCK_S)
    known = groups < num_seqs
    starts = tl.load(bounds_ptr + groups, mask=known, other=0)
    ends = tl.load(bounds_ptr + 1 + groups, mask=known, other=0)
    shares = known & (tl.load(lens_ptr + groups, mask=known, other=0) > 0)
    # Group g owns tiles [last[g - 1], last[g]).
    last = tl.cumsum(tl.where(shares, tl.cdiv(ends - starts, MEMBERS), 0), 0)
    pieces = tl.max(last, 0) * num_splits * KV_HEADS
    for piece in range(tl.program_id(0), pieces, tl.num_programs(0)):
        kv_head = piece % KV_HEADS
        split = piece // KV_HEADS % num_splits
        tile = piece // KV_HEADS // num_splits
        group = tl.sum((last <= tile).to(tl.int32), 0)
        before = tl.max(tl.where(last <= tile, last, 0), 0)
        scales = scales_of(
            k_scales_ptr, v_scales_ptr, kv_head, stride_ksb, stride_kst, stride_ksh, stride_vsb, stride_vst, stride_vsh
        )
        shared_piece(
            partial_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, table_ptr, cu_seqlens_ptr, members_ptr, bounds_ptr, lens_ptr,
            kv_head, split, group, tile - before, num_splits, scale, scales,
            stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_table,
            GROUP, D, BLOCK_M, MEMBERS, BLOCK_N, BLOCK_D, BLOCK_SIZE, MIN_KEYS, SCALE_LATE, KV_HEADS, ALIKE, PAIRS,
        )  # fmt: skip


@triton.jit
def shared_piece(
    partial_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, table_ptr, cu_seqlens_ptr, members_ptr, bounds_ptr, lens_ptr,
    kv_head, split, group, tile, num_splits, scale, scales,
    stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_table,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, MEMBERS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, MIN_KEYS: tl.constexpr, SCALE_LATE: tl.constexpr,
    KV_HEADS: tl.constexpr, ALIKE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """The group's tile-th MEMBERS members. Where the group has fewer splits, the piece has no keys and stores
    nothing."""
    length = tl.load(lens_ptr + group)
    first = tl.load(bounds_ptr + group) + tile * MEMBERS
    size = split_size(length, num_splits, MIN_KEYS, BLOCK_N)
    lo = tl.minimum(split * size, length)
    hi = tl.minimum(lo + size, length)
    end = tl.where(lo < hi, tl.load(bounds_ptr + group + 1), first)
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
    acc, row_max, row_sum = attend_cached(
        acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, stride_kb, stride_kt, stride_vb, stride_vt, scales,
        q_ptr, 0, row_ok[:, None], lo, clear, hi, hi, rows, scale,
        D, BLOCK_N, BLOCK_D, BLOCK_SIZE, False, False, SCALE_LATE, ALIKE, PAIRS,
    )  # fmt: skip
    at = (seqs.to(tl.int64) * (KV_HEADS * GROUP) + heads) * num_splits + split
    tl.store(lse_ptr + at, log_sum(row_max, row_sum), mask=row_ok)
    tl.store(partial_ptr + at[:, None] * D + dims[None, :], finish(acc, row_sum), mask=io_mask)


class SharedTiles(NamedTuple):
    """Sizes of one program: rows of queries (members * group), keys a step, warps, pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


def shared_tiles(dtype: torch.dtype, head_size: int, group: int, *, coded: bool = False) -> SharedTiles:
    """Fixed by shape; group: query heads a key head; coded: the cache is fp8. Measured on one H100."""
    rows = 16 if group == 1 else 32
    if dtype == torch.float32 or head_size > 128:
        return SharedTiles(rows, 32, 4, 2)
    return SharedTiles(rows, 128 if coded else 64, 4, 2)


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
    scales: Scales | None = None,
    tiles: SharedTiles | None = None,
) -> SharedPart:
    """Partial results of q [T, Hq, D], one row a sequence, over its group's shared keys.

    members, bounds and lens: see `SharedPrefixes`. `tiles` overrides the choice by shape (benchmarks).
    """
    _, block_size, num_kv_heads, head_size = k_cache.shape
    num_heads, num_seqs = q.shape[1], members.shape[0]
    group = num_heads // num_kv_heads
    size = tiles or shared_tiles(q.dtype, head_size, group, coded=scales is not None)
    size = size._replace(rows=max(size.rows, triton.next_power_of_2(group)))
    per_tile = size.rows // group
    splits = max(1, min(MAX_SHARED_SPLITS, triton.cdiv(max_kv_len, MIN_SHARED_KEYS)))
    results = torch.empty((num_seqs, num_heads, splits, head_size), dtype=torch.float32, device=q.device)
    lse = torch.empty((num_seqs, num_heads, splits), dtype=torch.float32, device=q.device)
    strides = (*q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3])
    unit = stride_unit(strides, k_cache.dtype)
    pairs = takes_pairs(q, scales, unit)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
    # Groups that share have two members or more.
    most = num_kv_heads * splits * (num_seqs // per_tile + max(num_seqs // 2, 1))
    shared_kernel[(min(PROGRAMS * processors, most),)](
        results, lse, q, k_cache, v_cache, block_tables, cu_seqlens_q, members, bounds, lens,
        splits, num_seqs, scale * LOG2_E, *(stride // unit for stride in strides), block_tables.stride(0),
        *scale_arguments(scales),
        GROUP=group, D=head_size, BLOCK_M=size.rows, MEMBERS=per_tile, BLOCK_N=size.keys,
        BLOCK_D=max(32 if pairs else 16, triton.next_power_of_2(head_size)), BLOCK_S=triton.next_power_of_2(num_seqs),
        BLOCK_SIZE=block_size, MIN_KEYS=MIN_SHARED_KEYS, SCALE_LATE=scale > 0, UNIT=unit, KV_HEADS=num_kv_heads,
        ALIKE=alike(k_cache, v_cache, scales), PAIRS=pairs,
        num_warps=size.warps, num_stages=size.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return SharedPart(members, bounds, lens, results, lse, splits, MIN_SHARED_KEYS, size.keys)
