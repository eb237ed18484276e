# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
# ruff: noqa: N803 (Triton constants are upper case)
"""RMS norm, alone and fused with the residual addition before it."""

import torch
import triton
import triton.language as tl
from torch import Tensor


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
):
    """One program: one row, held in registers."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_H)
    used = cols < H
    x = tl.load(x_ptr + row * stride_x + cols, mask=used, other=0.0).to(tl.float32)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if ADD:
        at = residual_ptr + row * stride_r + cols
        # Rounded once before it is normed: what the next layer adds to is what this one saw.
        total = (x + tl.load(at, mask=used, other=0.0).to(tl.float32)).to(dtype)
        tl.store(at, total, mask=used)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / H + eps)
    weight = tl.load(weight_ptr + cols, mask=used, other=0.0).to(tl.float32)
    # The normed row is rounded before the weight multiplies it, as Qwen2RMSNorm does.
    normed = (x * scale).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * stride_o + cols, (normed * weight).to(dtype), mask=used)


def _launch(x: Tensor, residual: Tensor, weight: Tensor, eps: float, add: bool) -> Tensor:
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if rows:
        block = triton.next_power_of_2(width)
        rms_norm_kernel[(rows,)](
            out, x, residual, weight, eps, out.stride(0), x.stride(0), residual.stride(0),
            H=width, BLOCK_H=block, ADD=add, num_warps=min(max(block // 512, 1), 16), enable_fp_fusion=True,
        )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `mm_core.kernels.rms_norm`."""
    return _launch(x, x, weight, eps, False)


def add_rms_norm_(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `mm_core.kernels.add_rms_norm_`."""
    return _launch(x, residual, weight, eps, True)
