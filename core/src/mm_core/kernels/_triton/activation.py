# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
# ruff: noqa: N803 (Triton constants are upper case)
"""Gated activations."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mm_core.kernels._triton.launch import can_start_early, launch_options

BLOCK = 1024


@triton.jit
def silu_and_mul_kernel(out_ptr, x_ptr, width, stride_x, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """One program: BLOCK columns of one row."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    used = cols < width
    gate = tl.load(x_ptr + row * stride_x + cols, mask=used, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * stride_x + width + cols, mask=used, other=0.0).to(tl.float32)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    active = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * width + cols, (active * up).to(dtype), mask=used)


def silu_and_mul(x: Tensor) -> Tensor:
    """See `mm_core.kernels.silu_and_mul`."""
    rows, width = x.shape[0], x.shape[1] // 2
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    early = can_start_early(x.device)
    if rows and width:
        silu_and_mul_kernel[(rows, triton.cdiv(width, BLOCK))](
            out,
            x,
            width,
            x.stride(0),
            BLOCK=BLOCK,
            EARLY=early,
            num_warps=4,
            enable_fp_fusion=True,
            **launch_options(early),
        )
    return out
