# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
# ruff: noqa: N803 (Triton constants are upper case)
"""Rotary embedding of queries and keys in one launch, also with the write into the paged cache."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mm_core.kernels._triton.kv_write import magnitude_bits, scale_arguments, scale_exponents, write_e4m3
from mm_core.kernels._triton.launch import can_start_early, launch_options
from mm_core.kernels.kv_write import Scales

HEADS_PER_PROGRAM = 16


@triton.jit
def rotate(ptr, heads, num_heads, stride_h, cos, sin, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """Rotates dims (i, i + HALF) of some heads of one token by the angle of frequency i, in place."""
    freqs = tl.arange(0, BLOCK_HALF)
    at = ptr + heads[:, None] * stride_h + freqs[None, :]
    mask = (heads[:, None] < num_heads) & (freqs[None, :] < HALF)
    first = tl.load(at, mask=mask).to(tl.float32)
    second = tl.load(at + HALF, mask=mask).to(tl.float32)
    tl.store(at, (first * cos - second * sin).to(ptr.dtype.element_ty), mask=mask)
    tl.store(at + HALF, (second * cos + first * sin).to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def rope_kv_write_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scales_ptr,  # these and v's are read when QUANTISED
    v_scales_ptr,
    slots_ptr,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_cos,
    stride_sin,
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
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUANTISED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: BLOCK_Q heads of q, or all heads of k and v, of one token."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    freqs = tl.arange(0, BLOCK_HALF)
    turned = freqs < HALF
    cos = tl.load(cos_ptr + token * stride_cos + freqs, mask=turned)[None, :]
    sin = tl.load(sin_ptr + token * stride_sin + freqs, mask=turned)[None, :]
    if part > 0:
        q_heads = (part - 1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        rotate(q_ptr + token * stride_qt, q_heads, Q_HEADS, stride_qh, cos, sin, HALF, BLOCK_HALF)
    else:
        head = tl.arange(0, BLOCK_K)
        heads = head[:, None]
        dims = tl.arange(0, BLOCK_D)[None, :]
        mask = (heads < K_HEADS) & turned[None, :]
        source = k_ptr + token * stride_kt + heads * stride_kh
        first = tl.load(source + freqs[None, :], mask=mask, other=0.0).to(tl.float32)
        second = tl.load(source + HALF + freqs[None, :], mask=mask, other=0.0).to(tl.float32)
        low = tl.where(mask, first * cos - second * sin, 0.0).to(k_ptr.dtype.element_ty)
        high = tl.where(mask, second * cos + first * sin, 0.0).to(k_ptr.dtype.element_ty)
        slot = tl.load(slots_ptr + token).to(tl.int64)
        if not QUANTISED:
            tl.store(source + freqs[None, :], low, mask=mask)
            tl.store(source + HALF + freqs[None, :], high, mask=mask)
        if slot >= 0:
            block = slot // BLOCK_SIZE
            offset = slot % BLOCK_SIZE
            dtype: tl.constexpr = k_cache_ptr.dtype.element_ty
            target = k_cache_ptr + block * stride_kcb + offset * stride_kct + heads * stride_kch
            rest = (heads < K_HEADS) & (dims >= 2 * HALF) & (dims < D)
            used = (heads < K_HEADS) & (dims < D)
            v_from = v_ptr + token * stride_vt + heads * stride_vh + dims
            v = tl.load(v_from, mask=used, other=0.0)
            v_at = v_cache_ptr + block * stride_vcb + offset * stride_vct + heads * stride_vch + dims
            if QUANTISED:
                bits = tl.maximum(magnitude_bits(low), magnitude_bits(high))
                if D > 2 * HALF:
                    kept = tl.load(source + dims, mask=rest, other=0.0)
                    bits = tl.maximum(bits, magnitude_bits(kept))
                exponents = scale_exponents(bits)
                write_e4m3(low, source + freqs[None, :], target + freqs[None, :], exponents, mask)
                write_e4m3(high, source + HALF + freqs[None, :], target + HALF + freqs[None, :], exponents, mask)
                if D > 2 * HALF:
                    write_e4m3(kept, source + dims, target + dims, exponents, rest)
                k_scales_at = k_scales_ptr + block * stride_ksb + offset * stride_kst + head * stride_ksh
                tl.store(k_scales_at, exponents.to(tl.uint8), mask=head < K_HEADS)
                exponents = scale_exponents(magnitude_bits(v))
                write_e4m3(v, v_from, v_at, exponents, used)
                v_scales_at = v_scales_ptr + block * stride_vsb + offset * stride_vst + head * stride_vsh
                tl.store(v_scales_at, exponents.to(tl.uint8), mask=head < K_HEADS)
            else:
                tl.store(target + freqs[None, :], low.to(dtype), mask=mask)
                tl.store(target + HALF + freqs[None, :], high.to(dtype), mask=mask)
                if D > 2 * HALF:
                    tl.store(target + dims, tl.load(source + dims, mask=rest).to(dtype), mask=rest)
                tl.store(v_at, v.to(v_cache_ptr.dtype.element_ty), mask=used)


@triton.jit
def rope_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,  # read when TABLE: cos and sin are rows of a table, else of the tokens
    axis_ptr,
    num_q_heads,
    num_k_heads,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_cos,
    stride_sin,
    stride_pa,
    stride_pt,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TABLE: tl.constexpr,
    AXES: tl.constexpr,
):
    """One program: BLOCK_H heads of q, or of k, of one token."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    freqs = tl.arange(0, BLOCK_HALF)
    used = freqs < HALF
    if TABLE:
        at = positions_ptr + token * stride_pt
        if AXES:
            axis = tl.load(axis_ptr + freqs, mask=used, other=0).to(tl.int64)
            row = tl.load(at + axis * stride_pa, mask=used, other=0).to(tl.int64)
        else:
            row = tl.load(at).to(tl.int64)
    else:
        row = token
    cos = tl.load(cos_ptr + row * stride_cos + freqs, mask=used)[None, :]
    sin = tl.load(sin_ptr + row * stride_sin + freqs, mask=used)[None, :]
    q_parts = tl.cdiv(num_q_heads, BLOCK_H)
    heads = tl.arange(0, BLOCK_H)
    if part < q_parts:
        heads += part * BLOCK_H
        rotate(q_ptr + token * stride_qt, heads, num_q_heads, stride_qh, cos, sin, HALF, BLOCK_HALF)
    else:
        heads += (part - q_parts) * BLOCK_H
        rotate(k_ptr + token * stride_kt, heads, num_k_heads, stride_kh, cos, sin, HALF, BLOCK_HALF)


def rope_launch(num_heads: int, half: int) -> tuple[int, int]:
    """Heads and warps of one program."""
    block_h = min(HEADS_PER_PROGRAM, triton.next_power_of_2(num_heads))
    return block_h, max(1, min(8, block_h * triton.next_power_of_2(half) // 256))


def _launch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, axis_of_freq: Tensor | None
) -> None:
    num_tokens, half = q.shape[0], cos.shape[1]
    if num_tokens == 0:
        return
    block_h, warps = rope_launch(max(q.shape[1], k.shape[1]), half)
    parts = triton.cdiv(q.shape[1], block_h) + triton.cdiv(k.shape[1], block_h)
    axes = positions is not None and axis_of_freq is not None and positions.dim() == 2
    strides = (0, 0)
    if positions is not None:
        strides = (positions.stride(0) if positions.dim() == 2 else 0, positions.stride(-1))
    rope_kernel[(num_tokens, parts)](
        q, k, cos, sin, cos if positions is None else positions, axis_of_freq if axes else cos,
        q.shape[1], k.shape[1], *q.stride()[:2], *k.stride()[:2], cos.stride(0), sin.stride(0), *strides,
        HALF=half, BLOCK_HALF=triton.next_power_of_2(half), BLOCK_H=block_h,
        TABLE=positions is not None, AXES=axes, num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip


def rope_(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, axis_of_freq: Tensor | None) -> None:
    """See `mm_core.kernels.rope_`."""
    half = cos_sin.shape[1] // 2
    _launch(q, k, cos_sin[:, :half], cos_sin[:, half:], positions, axis_of_freq)


def rope_pair_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """See `mm_core.kernels.rope_pair_`."""
    _launch(q, k, cos, sin, None, None)


def rope_kv_write_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    scales: Scales | None = None,
) -> None:
    """See `mm_core.kernels.rope_kv_write_`."""
    num_tokens, q_heads, head_size = q.shape
    if num_tokens == 0:
        return
    half = cos.shape[1]
    block_q, warps = rope_launch(q_heads, half)
    exponents, scale_strides = scale_arguments(scales, slot_mapping)
    early = can_start_early(q.device)
    rope_kv_write_kernel[(num_tokens, 1 + triton.cdiv(q_heads, block_q))](
        q, k, v, cos, sin, k_cache, v_cache, *exponents, slot_mapping,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], cos.stride(0), sin.stride(0),
        *k_cache.stride()[:3], *v_cache.stride()[:3], *scale_strides,
        Q_HEADS=q_heads, K_HEADS=k.shape[1], D=head_size, HALF=half, BLOCK_D=triton.next_power_of_2(head_size),
        BLOCK_HALF=triton.next_power_of_2(half), BLOCK_Q=block_q, BLOCK_K=triton.next_power_of_2(k.shape[1]),
        BLOCK_SIZE=k_cache.shape[1], QUANTISED=scales is not None, EARLY=early, num_warps=warps,
        enable_fp_fusion=True, **launch_options(early),
    )  # fmt: skip
