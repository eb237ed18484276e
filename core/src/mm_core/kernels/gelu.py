"""Activations of plain feed-forward layers, in place."""

import torch.nn.functional as F
from torch import Tensor


def quick_gelu_(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x) in place (Hendrycks & Gimpel 2016, the approximation that CLIP uses); returns x.

    x: contiguous. On a GPU computed in float32 and rounded once.
    """
    return quick_gelu_triton_(x) if x.device.type == "cuda" else _quick_gelu_cpu_(x)


def quick_gelu_triton_(x: Tensor) -> Tensor:
    """`quick_gelu_` by its Triton kernel, whatever the device."""
    from mm_core.kernels._triton import gelu as impl

    return impl.quick_gelu_(x)


def _quick_gelu_cpu_(x: Tensor) -> Tensor:
    # As silu(1.702 x) / 1.702: one pass less than with the sigmoid and a product.
    return F.silu(x.mul_(1.702), inplace=True).mul_(1 / 1.702)
