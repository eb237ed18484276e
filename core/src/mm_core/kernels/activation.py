"""Gated activations of feed-forward layers."""

import torch.nn.functional as F
from torch import Tensor


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) * up (SwiGLU; Shazeer 2020), the silu rounded to x's dtype before the product.

    x: [T, 2 I], gate first, last dim contiguous. Returns [T, I].
    """
    return silu_and_mul_triton(x) if x.device.type == "cuda" else _silu_and_mul_cpu(x)


def silu_and_mul_triton(x: Tensor) -> Tensor:
    """`silu_and_mul` by its Triton kernel, whatever the device."""
    from mm_core.kernels._triton import activation as impl

    return impl.silu_and_mul(x)


def _silu_and_mul_cpu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
