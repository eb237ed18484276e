# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
# ruff: noqa: N803 (Triton constants are upper case)
"""RMS norm and layer norm, alone and fused with the residual addition before them."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mm_core.kernels._triton.launch import can_start_early, launch_options


@triton.jit
def load_sum(x_ptr, residual_ptr, cols, used, ADD: tl.constexpr):
    """One row in float32; with ADD, residual += x first, which is what the row is then."""
    x = tl.load(x_ptr + cols, mask=used, other=0.0).to(tl.float32)
    if ADD:
        dtype: tl.constexpr = x_ptr.dtype.element_ty
        # Rounded once before it is normed: what the next layer adds to is what this one saw.
        total = (x + tl.load(residual_ptr + cols, mask=used, other=0.0).to(tl.float32)).to(dtype)
        tl.store(residual_ptr + cols, total, mask=used)
        x = total.to(tl.float32)
    return x


@triton.jit
def rms_norm_kernel(
    out_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    eps,
    stride_o,
    stride_x,
    stride_r,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ADD: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: one row, held in registers."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_H)
    used = cols < H
    x = load_sum(x_ptr + row * stride_x, residual_ptr + row * stride_r, cols, used, ADD)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    scale = tl.rsqrt(tl.sum(x * x, 0) / H + eps)
    weight = tl.load(weight_ptr + cols, mask=used, other=0.0).to(tl.float32)
    # The normed row is rounded before the weight multiplies it, as Qwen2RMSNorm does.
    normed = (x * scale).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * stride_o + cols, (normed * weight).to(dtype), mask=used)


@triton.jit
def add_layer_norm_kernel(
    out_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    eps,
    stride_o,
    stride_x,
    stride_r,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: one row, held in registers; the variance is that of the centred row."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_H)
    used = cols < H
    x = load_sum(x_ptr + row * stride_x, residual_ptr + row * stride_r, cols, used, True)
    x = tl.where(used, x - tl.sum(x, 0) / H, 0.0)
    scale = tl.rsqrt(tl.sum(x * x, 0) / H + eps)
    weight = tl.load(weight_ptr + cols, mask=used, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=used, other=0.0).to(tl.float32)
    out = (x * scale * weight + bias).to(x_ptr.dtype.element_ty)
    tl.store(out_ptr + row * stride_o + cols, out, mask=used)


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


def _rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, add: bool) -> Tensor:
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if rows:
        block, early = triton.next_power_of_2(width), can_start_early(x.device)
        rms_norm_kernel[(rows,)](
            out, x, residual, weight, eps, width, x.stride(0), residual.stride(0),
            H=width, BLOCK_H=block, ADD=add, EARLY=early, num_warps=_warps(block), enable_fp_fusion=True,
            **launch_options(early),
        )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `mm_core.kernels.rms_norm`."""
    return _rms_norm(x, x, weight, eps, False)


def add_rms_norm_(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `mm_core.kernels.add_rms_norm_`."""
    return _rms_norm(x, residual, weight, eps, True)


def add_layer_norm_(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See `mm_core.kernels.add_layer_norm_`."""
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if rows:
        block, early = triton.next_power_of_2(width), can_start_early(x.device)
        add_layer_norm_kernel[(rows,)](
            out, x, residual, weight, bias, eps, width, x.stride(0), residual.stride(0),
            H=width, BLOCK_H=block, EARLY=early, num_warps=_warps(block), enable_fp_fusion=True,
            **launch_options(early),
        )  # fmt: skip
    return out
