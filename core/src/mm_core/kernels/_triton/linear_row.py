# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
# ruff: noqa: N803 (Triton constants are upper case)
"""One row through a narrow model's projection: y = act(W norm(x + r) + b), all of W on its way at once.

Each program holds whole rows of W in registers, which it loads while the kernel before still runs. The norm of
a row costs a program less than a launch does.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mm_core.kernels._triton.launch import can_start_early, launch_options
from mm_core.kernels.linear import AddNorm


class RowConfig(NamedTuple):
    """Outputs of a program, and its warps."""

    block_n: int
    num_warps: int


@triton.jit
def whole_sum(x_ptr, residual_ptr, cols):
    """Part of x + r, rounded once, as the next layer finds it."""
    x = tl.load(x_ptr + cols).to(tl.float32) + tl.load(residual_ptr + cols).to(tl.float32)
    return x.to(x_ptr.dtype.element_ty)


@triton.jit
def row_kernel(
    out_ptr,
    sum_ptr,  # x + r, when NORM
    x_ptr,
    residual_ptr,
    norm_ptr,
    norm_bias_ptr,
    w_ptr,
    bias_ptr,
    eps,
    N,
    stride_w,
    HEAD: tl.constexpr,  # columns, HEAD + TAIL, both powers of two
    TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NORM: tl.constexpr,
    GELU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: BLOCK_N outputs."""
    K: tl.constexpr = HEAD + TAIL
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    used = n < N
    rows = n.to(tl.int64)[:, None] * stride_w
    head = tl.arange(0, HEAD)
    tail = HEAD + tl.arange(0, TAIL)
    w_head = tl.load(w_ptr + rows + head[None, :], mask=used[:, None], other=0.0)
    w_tail = tl.load(w_ptr + rows + tail[None, :], mask=used[:, None], other=0.0)
    if NORM:
        scale_head = tl.load(norm_ptr + head)
        scale_tail = tl.load(norm_ptr + tail)
        shift_head = tl.load(norm_bias_ptr + head)
        shift_tail = tl.load(norm_bias_ptr + tail)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n, mask=used, other=0.0).to(tl.float32)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    if NORM:
        x_head = whole_sum(x_ptr, residual_ptr, head)
        x_tail = whole_sum(x_ptr, residual_ptr, tail)
        if tl.program_id(0) == 0:
            tl.store(sum_ptr + head, x_head)
            tl.store(sum_ptr + tail, x_tail)
        x_head = x_head.to(tl.float32)
        x_tail = x_tail.to(tl.float32)
        mean = (tl.sum(x_head, 0) + tl.sum(x_tail, 0)) / K
        x_head -= mean
        x_tail -= mean
        scale = tl.rsqrt((tl.sum(x_head * x_head, 0) + tl.sum(x_tail * x_tail, 0)) / K + eps)
        x_head = (x_head * scale * scale_head.to(tl.float32) + shift_head.to(tl.float32)).to(dtype)
        x_tail = (x_tail * scale * scale_tail.to(tl.float32) + shift_tail.to(tl.float32)).to(dtype)
    else:
        x_head = tl.load(x_ptr + head)
        x_tail = tl.load(x_ptr + tail)
    y = tl.sum(w_head.to(tl.float32) * x_head.to(tl.float32)[None, :], 1)
    y += tl.sum(w_tail.to(tl.float32) * x_tail.to(tl.float32)[None, :], 1)
    if HAS_BIAS:
        y += bias
    if GELU:
        # Rounded as the product alone would be.
        y = y.to(dtype).to(tl.float32)
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    tl.store(out_ptr + n, y.to(dtype), mask=used)


def row_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    config: RowConfig,
    *,
    norm: AddNorm | None = None,
    gelu: bool = False,
) -> tuple[Tensor, Tensor]:
    """x [1, K] → y [1, N] and the new residual [1, K] (x itself without a norm). K: see `parts`."""
    count, width = weight.shape
    head, tail = parts(width)
    early = can_start_early(x.device)
    out = torch.empty((1, count), dtype=x.dtype, device=x.device)
    total = x if norm is None else torch.empty_like(norm.residual)
    row_kernel[(triton.cdiv(count, config.block_n),)](
        out,
        total,
        x,
        x if norm is None else norm.residual,
        x if norm is None else norm.weight,
        x if norm is None else norm.bias,
        weight,
        bias,
        0.0 if norm is None else norm.eps,
        count,
        weight.stride(0),
        HEAD=head,
        TAIL=tail,
        BLOCK_N=config.block_n,
        NORM=norm is not None,
        GELU=gelu,
        HAS_BIAS=bias is not None,
        EARLY=early,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
        **launch_options(early),
    )
    return out, total


@cache
def parts(width: int) -> tuple[int, int]:
    """A width as the sum of two powers of two, the larger first; (0, 0) where it is none."""
    head = 1 << max(width.bit_length() - 1, 0)
    if head == width:
        head //= 2
    tail = width - head
    return (head, tail) if tail > 0 and tail & (tail - 1) == 0 else (0, 0)


@cache
def choose_row(count: int, width: int) -> RowConfig | None:
    """Tiles for a weight of [N, K]; None where whole rows do not fit in registers well, or the weight is small."""
    tail = parts(width)[1]
    if tail < 64 or not 512 <= width <= 8192 or not 2**18 <= count * width <= 2**23:
        return None
    most = min(16, 20480 // width, count // 256)
    block = 1 << max(most.bit_length() - 1, 0)
    return RowConfig(block, 8 if block == 16 else 4)
