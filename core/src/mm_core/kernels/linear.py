"""Projections: y = x Wᵀ + b, and the gated pair that opens a feed-forward layer."""

from functools import cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_core.kernels.activation import silu_and_mul
from mm_core.kernels.gelu import quick_gelu_
from mm_core.kernels.norm import add_layer_norm_

MOST_ROWS = 128  # beyond them the library's kernels are the faster ones
MANY_ROWS = 1024  # from here on it may pay to have the activation in the same kernel
_HALF = (torch.bfloat16, torch.float16)

Activation = Literal["silu", "quick_gelu", "gelu"]  # silu: of the first half, times the second


class AddNorm(NamedTuple):
    """The layer norm of x + residual [T, K]; weight, bias: [K]."""

    residual: Tensor
    weight: Tensor
    bias: Tensor
    eps: float


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, summed in float32 for 16-bit types and rounded once.

    x: [..., K]; weight: [N, K]; bias: [N]. Returns [..., N]. On a Hopper GPU few rows of 16 bits go to the
    kernel that was measured to be fastest for the sizes, everything else to torch. A row of the result does
    not depend on the other rows, only on how many there are, which chooses the kernel. Products by one
    weight must follow each other on a stream.
    """
    y = _measured(x, weight, bias, gated=False)
    return F.linear(x, weight, bias) if y is None else y


def gated_linear(x: Tensor, weight: Tensor) -> Tensor:
    """silu(x Wgᵀ) · (x Wuᵀ), where Wg is the first half of the weight's rows (SwiGLU; Shazeer 2020).

    x: [..., K]; weight: [2 F, K]. Returns [..., F]. Where one kernel does it all (see `linear`), gate and up
    stay in float32 and the result is rounded once; elsewhere they are rounded before `silu_and_mul`.
    """
    y = _measured(x, weight, None, gated=True)
    if y is None:
        y = _activated(x, weight, None, "silu")
    if y is not None:
        return y
    both = F.linear(x, weight)
    return silu_and_mul(both.view(-1, weight.shape[0])).view(*x.shape[:-1], weight.shape[0] // 2)


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """gelu(x Wᵀ + b), the exact one (Hendrycks & Gimpel 2016), with the roundings of `linear` and `F.gelu`; rounded
    once where one kernel does it for many rows (see `quick_gelu_linear`)."""
    y = _one_row(x, weight, bias, None, gelu=True)
    if y is not None:
        return y[0]
    many = _activated(x, weight, bias, "gelu")
    return F.gelu(linear(x, weight, bias)) if many is None else many


def quick_gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`quick_gelu_` of x Wᵀ + b.

    x: [..., K]; weight: [N, K]; bias: [N]. Returns [..., N]. Where one kernel does it (many rows of 16 bits on a
    Hopper GPU, sizes for which that was measured to be faster), everything before the result stays in float32 and
    is rounded once; elsewhere x Wᵀ + b is rounded before.
    """
    y = _activated(x, weight, bias, "quick_gelu")
    return quick_gelu_(linear(x, weight, bias)) if y is None else y


def norm_linear(
    x: Tensor, norm: AddNorm, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False
) -> tuple[Tensor, Tensor]:
    """`linear` (or `gelu_linear`) of the layer norm of x + residual, and that sum, rounded as `add_layer_norm_`
    and `linear` do.

    x: [T, K]. The residual passed is no longer the caller's: its memory may hold the sum.
    """
    y = _one_row(x, weight, bias, norm, gelu=gelu)
    if y is None:
        x = add_layer_norm_(x, *norm)
        y = (gelu_linear if gelu else linear)(x, weight, bias), norm.residual
    return y


def _one_row(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: AddNorm | None, *, gelu: bool
) -> tuple[Tensor, Tensor] | None:
    """By the kernel for one row, where there is one row that it fits."""
    if x.dim() != 2 or x.shape[0] != 1 or not _for_ours(x, weight):
        return None
    from mm_core.kernels._triton import linear_choice as impl

    return impl.run_row(x, weight, bias, norm, gelu=gelu)


def _measured(x: Tensor, weight: Tensor, bias: Tensor | None, *, gated: bool) -> Tensor | None:
    """The product by one of our kernels, or None where torch's is the faster one or none of ours fits."""
    if not _for_ours(x, weight):
        return None
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    if not 0 < rows <= MOST_ROWS:
        return None
    from mm_core.kernels._triton import linear_choice as impl

    y = impl.run(x.reshape(rows, width), weight, bias, gated=gated)
    return y if y is None or x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def _activated(x: Tensor, weight: Tensor, bias: Tensor | None, act: Activation) -> Tensor | None:
    """Many rows' product and activation by one kernel, or None where two are faster or ours does not fit."""
    width = x.shape[-1]
    if not _for_ours(x, weight) or x.numel() < MANY_ROWS * width:
        return None
    from mm_core.kernels._triton import linear_choice as impl

    y = impl.run_many(x.reshape(-1, width), weight, bias, act)
    return y if y is None or x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def _for_ours(x: Tensor, weight: Tensor) -> bool:
    """Whether our kernels take such operands: both of the same 16 bits, on a Hopper GPU."""
    return x.dtype in _HALF and x.device.type == "cuda" and weight.dtype == x.dtype and _on_hopper(x.device)


@cache
def _on_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)
