# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
# ruff: noqa: N803 (Triton constants are upper case)
"""CLIP's approximation of GELU, in place."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def quick_gelu_kernel(x_ptr, count, BLOCK: tl.constexpr):
    """One program: BLOCK neighbouring elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    used = at < count
    x = tl.load(x_ptr + at, mask=used, other=0.0).to(tl.float32)
    tl.store(x_ptr + at, (x * tl.sigmoid(1.702 * x)).to(x_ptr.dtype.element_ty), mask=used)


def quick_gelu_(x: Tensor) -> Tensor:
    """See `mm_core.kernels.quick_gelu_`."""
    count = x.numel()
    if count:
        quick_gelu_kernel[(triton.cdiv(count, BLOCK),)](x, count, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True)
    return x
