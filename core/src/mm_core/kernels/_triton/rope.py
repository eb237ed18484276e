# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
# ruff: noqa: N803 (Triton constants are upper case)
"""Rotary embedding of queries and keys in one launch."""

import triton
import triton.language as tl
from torch import Tensor

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
