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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mm_core.kernels._triton.attention import add_partials, finish, log_sum, split_size
from mm_core.kernels._triton.attention_fp8 import alike, attend_masked, scale_arguments, scales_of, takes_pairs
from mm_core.kernels._triton.attention_prefill import INTEGERS, LOG2_E, stride_unit
from mm_core.kernels._triton.attention_shared import SharedPart, shared_by
from mm_core.kernels._triton.attention_splits import (
    combine_kernel,
    counters,
    merge_last,
    num_decode_splits,
    room,
    split_bounds,
)
from mm_core.kernels._triton.launch import can_start_early, launch_options
from mm_core.kernels.fp8 import DTYPE as FP8
from mm_core.kernels.kv_write import Scales

LINE = 128  # bytes of a line of the L2 cache
AHEAD = 128  # keys whose way into the L2 cache begins while the kernel before still runs


@triton.jit
def own_dims(rows, GROUP: tl.constexpr, PACK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[1 or M, BLOCK_D]: each dim of PACK key heads as a dim of the row's own one, outside [0, D) where it is not."""
    dims = tl.arange(0, BLOCK_D)[None, :]
    if PACK > 1:
        dims = dims - (rows // GROUP * D)[:, None]
    return dims


@triton.jit
def fetch_ahead(ptr, table_ptr, lo, hi, stride_b, stride_t, WIDTH: tl.constexpr, KEYS: tl.constexpr,
                LINES: tl.constexpr, BLOCK_SIZE: tl.constexpr):  # fmt: skip
    """Asks for WIDTH elements of each of the first KEYS keys from lo on: into L2, so they may still be written.
    Not so the table and the lengths, which no kernel that lets others start early writes."""
    keys = lo + tl.arange(0, KEYS)
    blocks = tl.load(table_ptr + keys // BLOCK_SIZE, mask=keys < hi, other=0).to(tl.int64)
    rows = ptr + blocks * stride_b + (keys % BLOCK_SIZE).to(tl.int64) * stride_t
    at = rows[:, None] + tl.minimum(tl.arange(0, LINES) * (1024 // ptr.dtype.element_ty.primitive_bitwidth), WIDTH - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def no_keys(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """A softmax's state before the first key."""
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    return tl.zeros([BLOCK_M, BLOCK_D], tl.float32), row_max, tl.zeros([BLOCK_M], tl.float32)


@triton.jit(do_not_specialize=["num_splits", "min_keys", "num_shared_splits"], do_not_specialize_on_alignment=INTEGERS)
def decode_kernel(
    out_ptr,  # [T, Hq, D]
    partial_ptr,  # float32 [S, Hq, num_splits, D] when SPLIT
    lse_ptr,  # float32 [S, Hq, num_splits], base 2
    count_ptr,  # int32 [S * Hkv / PACK], zeros, when COUNTED
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
    k_scales_ptr,  # None, as their strides are, but for fp8 caches
    v_scales_ptr,
    stride_ksb,
    stride_kst,
    stride_ksh,
    stride_vsb,
    stride_vst,
    stride_vsh,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,  # key heads of one program, whose keys lie side by side
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
    COUNTED: tl.constexpr,  # the last split to end merges them
    BLOCK_SPLITS: tl.constexpr,
    EARLY: tl.constexpr,
    AHEAD: tl.constexpr,  # keys to fetch ahead
    LINES: tl.constexpr,  # of the cache that a key takes
    ALIKE: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """One program: the GROUP query heads of each of PACK key heads of one sequence, over one split of its own keys.

    PACK key heads are taken for a single one of PACK * D dims: a query head has zeros where the others' dims are,
    and of its result only its own are kept. Tensor cores multiply 16 rows in any case.
    """
    stride_ot, stride_oh, stride_qt, stride_qh = stride_ot * UNIT, stride_oh * UNIT, stride_qt * UNIT, stride_qh * UNIT
    stride_kb, stride_kt, stride_kh = stride_kb * UNIT, stride_kt * UNIT, stride_kh * UNIT
    stride_vb, stride_vt, stride_vh = stride_vb * UNIT, stride_vt * UNIT, stride_vh * UNIT
    pack, seq, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if EARLY:
        gdc_launch_dependents()
    own = 0
    if SHARED:
        seq, own = shared_by(seq, members_ptr, bounds_ptr, lens_ptr, tl.num_programs(1), BLOCK_S)
    token, next_token = tl.load(cu_seqlens_ptr + seq), tl.load(cu_seqlens_ptr + seq + 1)
    kv_len = tl.load(kv_lens_ptr + seq)
    lo, hi, used = split_bounds(own, kv_len, split, num_splits, min_keys, STEP, SPLIT)
    k_ptr += (pack * PACK).to(tl.int64) * stride_kh
    v_ptr += (pack * PACK).to(tl.int64) * stride_vh
    table_ptr += seq.to(tl.int64) * stride_table
    if EARLY:
        if AHEAD > 0:
            fetch_ahead(k_ptr, table_ptr, lo, hi, stride_kb, stride_kt, D * PACK, AHEAD, LINES, BLOCK_SIZE)
            fetch_ahead(v_ptr, table_ptr, lo, hi, stride_vb, stride_vt, D * PACK, AHEAD, LINES, BLOCK_SIZE)
        gdc_wait()
    if (next_token <= token) | ((lo >= kv_len) & (split > 0)):
        return
    rows = tl.arange(0, BLOCK_M)
    heads, row_ok = pack * (GROUP * PACK) + rows, rows < GROUP * PACK
    dims = own_dims(rows, GROUP, PACK, D, BLOCK_D)
    io_mask = row_ok[:, None] & (dims >= 0) & (dims < D)
    at = (seq * (tl.num_programs(0) * GROUP * PACK) + heads).to(tl.int64)
    q = tl.load(q_ptr + token.to(tl.int64) * stride_qt + heads[:, None] * stride_qh + dims, mask=io_mask, other=0.0)
    bias_at = bias_ptr + heads[:, None].to(tl.int64) * stride_bh
    if CAUSAL:
        bias_at += (kv_len - 1).to(tl.int64) * stride_bq
    acc, row_max, row_sum = no_keys(BLOCK_M, BLOCK_D)
    # The newest token sees every key: no causal mask. One masked loop is sooner done than a bare one and a rest.
    scales = scales_of(
        k_scales_ptr, v_scales_ptr, pack * PACK, stride_ksb, stride_kst, stride_ksh, stride_vsb, stride_vst, stride_vsh
    )
    acc, row_max, row_sum = attend_masked(
        acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, stride_kb, stride_kt, stride_vb, stride_vt, scales,
        bias_at, stride_bk, row_ok[:, None], lo, hi, rows, scale,
        D * PACK, BLOCK_N, BLOCK_D, BLOCK_SIZE, HAS_BIAS, SCALE_LATE, ALIKE, PAIRS, STEP,
    )  # fmt: skip
    if SHARED:
        count = tl.cdiv(own, split_size(own, num_shared_splits, SHARED_KEYS, SHARED_BLOCK)) * (split == 0).to(tl.int32)
        acc, row_max, row_sum = add_partials(
            acc, row_max, row_sum, shared_ptr, shared_lse_ptr, at * num_shared_splits, count, row_ok, D, BLOCK_D
        )
    result = finish(acc, row_sum)
    out_ptr += token.to(tl.int64) * stride_ot
    whole = True
    if SPLIT:
        whole = (split == 0) & (hi >= kv_len)
        if not whole:
            partial = at * num_splits + split
            tl.store(lse_ptr + partial, log_sum(row_max, row_sum), mask=row_ok)
            tl.store(partial_ptr + partial[:, None] * D + dims, result, mask=io_mask)
            if COUNTED:
                out_at, at_head = out_ptr + pack * stride_oh, seq * tl.num_programs(0) + pack
                merge_last(out_at, partial_ptr, lse_ptr, count_ptr, at_head, used, num_splits, D, BLOCK_D, BLOCK_SPLITS)
    if whole:
        tl.store(out_ptr + heads[:, None] * stride_oh + dims, result.to(out_ptr.dtype.element_ty), mask=io_mask)


class DecodeTiles(NamedTuple):
    """Sizes of one decode program: keys a step, warps, pipeline stages, key heads, and the most registers of a
    thread where the compiler would take so many that fewer programs fit on a multiprocessor."""

    keys: int
    warps: int
    stages: int
    pack: int = 1
    registers: int = 0

    def launch(self) -> dict[str, int | bool]:
        """Options of the launch."""
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True, **limit}


def decode_tiles(dtype: torch.dtype, head_size: int) -> DecodeTiles:
    """Fixed by shape: enough bytes in flight for the memory's latency. Measured on one H100."""
    if dtype == torch.float32 or head_size > 128:
        return DecodeTiles(32, 4, 2)
    return DecodeTiles(64, 4, 2)


def coded_tiles(dtype: torch.dtype, head_size: int, programs: float, *, shared: bool) -> DecodeTiles:
    """Over an fp8 cache; programs: a multiprocessor's, without splits. Measured on one H100: as 256 x 400 keys of
    4 heads, 8 programs, took 47 us at once and 58 in three turns of `decode_tiles`."""
    if dtype == torch.float32 or not 64 < head_size <= 128:
        return decode_tiles(dtype, head_size)
    if shared or 4 < programs <= 8:
        return DecodeTiles(32, 2, 3, registers=128)
    if programs > 8:
        return DecodeTiles(64, 2, 3)
    return DecodeTiles(128, 4, 3) if programs <= 2 else DecodeTiles(64, 4, 2)


def _default_tiles(q: Tensor, k_cache: Tensor, programs: float, shared: SharedPart | None) -> DecodeTiles:
    if k_cache.dtype == FP8:
        return coded_tiles(q.dtype, q.shape[2], programs, shared=shared is not None)
    return decode_tiles(q.dtype, q.shape[2])


def _packed(size: DecodeTiles, k_cache: Tensor, v_cache: Tensor, shared: SharedPart | None) -> DecodeTiles:
    """One key head a program where several do not lie side by side, or partial results are to be added."""
    _, _, num_heads, head_size = k_cache.shape
    apart = num_heads % size.pack or (k_cache.stride(2), v_cache.stride(2)) != (head_size, head_size)
    return size._replace(pack=1) if apart or shared is not None or k_cache.dtype == FP8 else size


def early_options(device: torch.device) -> dict[str, bool]:
    """What both kernels' launches need to start early, where the device can."""
    early = can_start_early(device)
    return {"EARLY": early, **launch_options(early)}


def lines_of_key(k_cache: Tensor, pack: int) -> int:
    """Lines of the cache that a key of `pack` heads takes, as a power of two."""
    return triton.next_power_of_2(triton.cdiv(k_cache.shape[3] * pack * k_cache.element_size(), LINE))


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
    scales: Scales | None = None,
    num_splits: int | None = None,
    tiles: DecodeTiles | None = None,
) -> None:
    """Writes attention of q [T, Hq, D], at most one row a sequence, to out [T, Hq, D]. `num_splits` and `tiles`
    override the choice by shape (benchmarks)."""
    _, block_size, num_kv_heads, head_size = k_cache.shape
    num_heads, num_seqs = q.shape[1], kv_lens.shape[0]
    if q.shape[0] == 0 or num_seqs == 0:
        return
    group = num_heads // num_kv_heads
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 8
    default = _default_tiles(q, k_cache, num_seqs * num_kv_heads / processors, shared)
    size = _packed(tiles or default, k_cache, v_cache, shared)
    programs = num_seqs * num_kv_heads // size.pack
    splits, min_keys = num_decode_splits(programs, max_kv_len, processors)
    splits = num_splits or splits
    # A program merges what one head left; of several heads it would take longer than another launch does.
    counted = splits > 1 and group * size.pack == 1 and programs <= processors
    count = counters(k_cache, processors) if counted else out
    partial, lse = room(q, num_seqs, splits) if splits > 1 else (out, out)
    part = shared or SharedPart(cu_seqlens_q, cu_seqlens_q, cu_seqlens_q, out, out, 1, 1, 1)
    strides = (*out.stride()[:2], *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3])
    unit = stride_unit(strides, k_cache.dtype)
    pairs = takes_pairs(q, scales, unit)
    bias_strides = (0, 0, 0) if bias is None else (bias.stride(0) * (bias.shape[0] > 1), *bias.stride()[1:])
    step = math.gcd(block_size, size.keys)
    over = {"SHARED": shared is not None, "BLOCK_S": triton.next_power_of_2(num_seqs) if shared else 1}
    over |= {"BLOCK_SPLITS": triton.next_power_of_2(splits), **early_options(q.device)}
    decode_kernel[(num_kv_heads // size.pack, num_seqs, splits)](
        out, partial, lse, count, q, k_cache, v_cache, block_tables, cu_seqlens_q, kv_lens, q if bias is None else bias,
        part.members, part.bounds, part.lens, part.results, part.lse, splits, min_keys, part.splits, scale * LOG2_E,
        *(stride // unit for stride in strides), block_tables.stride(0), *bias_strides, *scale_arguments(scales),
        GROUP=group, PACK=size.pack, D=head_size, BLOCK_M=max(16, triton.next_power_of_2(group * size.pack)),
        BLOCK_N=size.keys, BLOCK_D=max(32 if pairs else 16, triton.next_power_of_2(head_size * size.pack)),
        BLOCK_SIZE=block_size, CAUSAL=causal, HAS_BIAS=bias is not None, SCALE_LATE=bias is None and scale > 0,
        SPLIT=splits > 1, SHARED_KEYS=part.min_keys, SHARED_BLOCK=part.block, STEP=step, UNIT=unit, COUNTED=counted,
        AHEAD=AHEAD if splits > 1 else 0, LINES=lines_of_key(k_cache, size.pack),
        ALIKE=alike(k_cache, v_cache, scales), PAIRS=pairs, **over, **size.launch(),
    )  # fmt: skip
    if splits > 1 and not counted:
        dims = triton.next_power_of_2(min(head_size, 32 if num_seqs * num_heads < 2 * processors else head_size))
        combine_kernel[(num_heads, num_seqs, triton.cdiv(head_size, dims))](
            out, partial, lse, cu_seqlens_q, kv_lens, part.members, part.bounds, part.lens, splits, min_keys,
            *out.stride()[:2], D=head_size, BLOCK_D=dims, STEP=step, **over, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
