# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
# ruff: noqa: N803 (Triton constants are upper case)
"""Decode attention whose keys are split: how many splits there are, and how their results become one."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mm_core.kernels._triton.attention import split_size
from mm_core.kernels._triton.attention_prefill import INTEGERS
from mm_core.kernels._triton.attention_shared import shared_by

MAX_SPLITS = 128


@triton.jit
def merge_splits(
    out_ptr, partial_ptr, lse_ptr, used, dims, D: tl.constexpr, BLOCK_SPLITS: tl.constexpr
):  # fmt: skip
    """Some dims of one head: out = sum_i 2^(lse_i - lse) partial_i over the `used` splits."""
    splits = tl.arange(0, BLOCK_SPLITS)
    # Not from L1: other multiprocessors wrote them, maybe during this very kernel.
    lse = tl.load(lse_ptr + splits, mask=splits < used, other=float("-inf"), cache_modifier=".cg")
    # Unused splits wrote nothing: what lies there may be NaN and must not be loaded.
    loadable = (splits < used)[:, None] & (dims[None, :] < D)
    at = partial_ptr + splits[:, None] * D + dims[None, :]
    parts = tl.load(at, mask=loadable, other=0.0, cache_modifier=".cg")
    best = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(best == float("-inf"), 0.0, best))
    total = tl.sum(weights, 0)
    result = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + dims, result.to(out_ptr.dtype.element_ty), mask=dims < D)


@triton.jit
def merge_last(
    out_ptr, partial_ptr, lse_ptr, count_ptr, at, used, num_splits, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Counts one split of head `at` as done; the last of the `used` ones merges them."""
    tl.debug_barrier()  # all that this program stored comes before
    if tl.atomic_add(count_ptr + at, 1, sem="acq_rel", scope="gpu") == used - 1:
        tl.atomic_xchg(count_ptr + at, 0, sem="relaxed", scope="gpu")
        first = at.to(tl.int64) * num_splits
        dims = tl.arange(0, BLOCK_D)
        merge_splits(out_ptr, partial_ptr + first * D, lse_ptr + first, used, dims, D, BLOCK_SPLITS)


@triton.jit
def split_bounds(own, kv_len, split, num_splits, min_keys, STEP: tl.constexpr, SPLIT: tl.constexpr):
    """Keys [lo, hi) of one split of a sequence's own ones, and how many splits there are."""
    lo, hi, used = own, kv_len, 1
    if SPLIT:
        size = split_size(kv_len - own, num_splits, min_keys, STEP)
        lo = own + split * size
        hi = tl.minimum(lo + size, kv_len)
        used = tl.cdiv(kv_len - own, size)
    return lo, hi, used


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
    EARLY: tl.constexpr,
):
    """One program: BLOCK_D dims of one head of a sequence of several splits."""
    if EARLY:
        gdc_launch_dependents()
    head = tl.program_id(0)
    seq = tl.program_id(1)
    own = 0
    if SHARED:
        seq, own = shared_by(seq, members_ptr, bounds_ptr, lens_ptr, tl.num_programs(1), BLOCK_S)
    token = tl.load(cu_seqlens_ptr + seq)
    length = tl.load(kv_lens_ptr + seq) - own
    used = tl.cdiv(length, split_size(length, num_splits, min_keys, STEP))
    if EARLY:
        gdc_wait()
    if (used <= 1) | (tl.load(cu_seqlens_ptr + seq + 1) <= token):
        return
    at = (seq * tl.num_programs(0) + head).to(tl.int64) * num_splits
    merge_splits(
        out_ptr + token.to(tl.int64) * stride_ot + head * stride_oh, partial_ptr + at * D, lse_ptr + at, used,
        tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D), D, BLOCK_SPLITS,
    )  # fmt: skip


def num_decode_splits(num_programs: int, max_kv_len: int, num_processors: int) -> tuple[int, int]:
    """The most splits of a sequence, two programs for each multiprocessor, and the fewest keys worth one.

    The more sequences there are, the longer a split must be to pay for the reduction: they keep the memory busy
    anyway. Measured on one H100.
    """
    wanted = 2 * num_processors // max(num_programs, 1)
    min_keys = max(64, 4 * triton.next_power_of_2(num_programs))
    return max(1, min(wanted, triton.cdiv(max_kv_len, min_keys), MAX_SPLITS)), min_keys


_COUNTERS: dict[tuple[int, torch.device], Tensor] = {}


def counters(k_cache: Tensor, size: int) -> Tensor:
    """Counters of finished splits, zero; every launch leaves them so. Each cache has its own, because kernels on
    two streams run at once, and those do not share a cache."""
    key = (k_cache.data_ptr(), k_cache.device)
    found = _COUNTERS.get(key)
    if found is None:
        found = torch.zeros(size, dtype=torch.int32, device=k_cache.device)
        if not (k_cache.is_cuda and torch.cuda.is_current_stream_capturing()):  # zeroed by that graph alone, else
            _COUNTERS[key] = found
    return found


def room(q: Tensor, num_seqs: int, splits: int) -> tuple[Tensor, Tensor]:
    """Float32 results [S, Hq, splits, D] and logarithms of sums [S, Hq, splits]."""
    shape = (num_seqs, q.shape[1], splits)
    partial = torch.empty((*shape, q.shape[2]), dtype=torch.float32, device=q.device)
    return partial, torch.empty(shape, dtype=torch.float32, device=q.device)
