# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
# ruff: noqa: N803 (Triton constants are upper case)
"""Scatters new keys and values into the paged cache."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mm_core.kernels._triton.launch import can_start_early, launch_options


@triton.jit
def kv_write_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
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
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: all heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    # The batch's: no kernel that lets others start early writes it.
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    if slot < 0:
        return
    block = slot // BLOCK_SIZE
    offset = slot % BLOCK_SIZE
    heads = tl.arange(0, BLOCK_H)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    mask = (heads < HEADS) & (dims < D)
    k = tl.load(k_ptr + token * stride_kt + heads * stride_kh + dims, mask=mask)
    v = tl.load(v_ptr + token * stride_vt + heads * stride_vh + dims, mask=mask)
    k_at = k_cache_ptr + block * stride_kcb + offset * stride_kct + heads * stride_kch + dims
    v_at = v_cache_ptr + block * stride_vcb + offset * stride_vct + heads * stride_vch + dims
    tl.store(k_at, k.to(k_cache_ptr.dtype.element_ty), mask=mask)
    tl.store(v_at, v.to(v_cache_ptr.dtype.element_ty), mask=mask)


def kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """See `mm_core.kernels.kv_write`."""
    num_tokens, num_heads, head_size = k.shape
    if num_tokens == 0:
        return
    early = can_start_early(k.device)
    kv_write_kernel[(num_tokens,)](
        k, v, k_cache, v_cache, slot_mapping,
        *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
        HEADS=num_heads, D=head_size, BLOCK_H=triton.next_power_of_2(num_heads),
        BLOCK_D=triton.next_power_of_2(head_size), BLOCK_SIZE=k_cache.shape[1],
        EARLY=early, num_warps=4, enable_fp_fusion=True, **launch_options(early),
    )  # fmt: skip
