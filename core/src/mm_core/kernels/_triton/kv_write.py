# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
# ruff: noqa: N803 (Triton constants are upper case)
"""Scatters new keys and values into the paged cache, in fp8 with a scale for each token and head."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mm_core.kernels import fp8
from mm_core.kernels._triton.launch import can_start_early, launch_options
from mm_core.kernels.kv_write import Scales

MIN_EXPONENT = tl.constexpr(fp8.MIN_EXPONENT)
MAX_HALF = tl.constexpr(fp8.MAX_HALF)


@triton.jit
def magnitude_bits(x):
    """[heads, dims] -> [heads] int32: the bits of the largest magnitude as float32, of which NaN is the greatest."""
    return tl.max(x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@triton.jit
def scale_exponents(bits):
    """The byte of the least power of two that maps a magnitude to 448 or less, as int32."""
    # 0x1FFFFF carries into the exponent where the significand is above 448's.
    return tl.maximum(((tl.minimum(bits, 0x7F800000) + 0x1FFFFF) >> 23) - 8, MIN_EXPONENT)


@triton.jit
def write_e4m3(x, at, target, exponents, mask):
    """Writes x [heads, dims] divided by its heads' scales to the cache's `target`, and to `at` what that holds."""
    wide = x.to(tl.float32)
    wide = tl.where(tl.abs(wide) == float("inf"), float("nan"), wide)
    if at.dtype.element_ty == tl.float16:
        wide = tl.where(wide > MAX_HALF, MAX_HALF, tl.where(wide < -MAX_HALF, -MAX_HALF, wide))
    inverse = ((254 - exponents) << 23).to(tl.float32, bitcast=True)[:, None]
    codes = (wide * inverse).to(target.dtype.element_ty)
    scale = (exponents << 23).to(tl.float32, bitcast=True)[:, None]
    tl.store(target, codes, mask=mask)
    tl.store(at, (codes.to(tl.float32) * scale).to(at.dtype.element_ty), mask=mask)


@triton.jit
def kv_write_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scales_ptr,  # these and v's are read when QUANTISED
    v_scales_ptr,
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
    stride_ksb,
    stride_kst,
    stride_ksh,
    stride_vsb,
    stride_vst,
    stride_vsh,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUANTISED: tl.constexpr,
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
    k_from = k_ptr + token * stride_kt + heads * stride_kh + dims
    v_from = v_ptr + token * stride_vt + heads * stride_vh + dims
    k = tl.load(k_from, mask=mask, other=0.0)
    v = tl.load(v_from, mask=mask, other=0.0)
    k_at = k_cache_ptr + block * stride_kcb + offset * stride_kct + heads * stride_kch + dims
    v_at = v_cache_ptr + block * stride_vcb + offset * stride_vct + heads * stride_vch + dims
    if QUANTISED:
        k_exponents = scale_exponents(magnitude_bits(k))
        v_exponents = scale_exponents(magnitude_bits(v))
        head = tl.arange(0, BLOCK_H)
        k_scales_at = k_scales_ptr + block * stride_ksb + offset * stride_kst + head * stride_ksh
        v_scales_at = v_scales_ptr + block * stride_vsb + offset * stride_vst + head * stride_vsh
        tl.store(k_scales_at, k_exponents.to(tl.uint8), mask=head < HEADS)
        tl.store(v_scales_at, v_exponents.to(tl.uint8), mask=head < HEADS)
        write_e4m3(k, k_from, k_at, k_exponents, mask)
        write_e4m3(v, v_from, v_at, v_exponents, mask)
    else:
        tl.store(k_at, k.to(k_cache_ptr.dtype.element_ty), mask=mask)
        tl.store(v_at, v.to(v_cache_ptr.dtype.element_ty), mask=mask)


def scale_arguments(scales: Scales | None, slot_mapping: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, ...]]:
    """Both tensors and their six strides, or what stands in for them."""
    if scales is None:
        return (slot_mapping, slot_mapping), (0,) * 6
    return scales, (*scales[0].stride(), *scales[1].stride())


def kv_write(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, scales: Scales | None = None
) -> None:
    """See `mm_core.kernels.kv_write`."""
    num_tokens, num_heads, head_size = k.shape
    if num_tokens == 0:
        return
    early = can_start_early(k.device)
    exponents, strides = scale_arguments(scales, slot_mapping)
    kv_write_kernel[(num_tokens,)](
        k, v, k_cache, v_cache, *exponents, slot_mapping,
        *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], *strides,
        HEADS=num_heads, D=head_size, BLOCK_H=triton.next_power_of_2(num_heads),
        BLOCK_D=triton.next_power_of_2(head_size), BLOCK_SIZE=k_cache.shape[1], QUANTISED=scales is not None,
        EARLY=early, num_warps=4, enable_fp_fusion=True, **launch_options(early),
    )  # fmt: skip
