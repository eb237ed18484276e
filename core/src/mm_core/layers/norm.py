"""Normalisation layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_core.kernels.norm import add_layer_norm_, add_rms_norm_, rms_norm
from mm_core.layers.parameter import empty_parameter


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight (Zhang & Sennrich 2019), computed in float32."""

    def __init__(
        self, size: int, eps: float, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = empty_parameter((size,), device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] → [..., size]."""
        return rms_norm(x, self.weight, self.eps)

    def add_(self, x: Tensor, residual: Tensor) -> Tensor:
        """Add x to `residual` in place, then normalise the sum; the sum stays in `residual`."""
        return add_rms_norm_(x, residual, self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) · weight + bias (Ba et al. 2016)."""

    def __init__(
        self, size: int, eps: float, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.shape = (size,)
        self.weight = empty_parameter((size,), device, dtype)
        self.bias = empty_parameter((size,), device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] → [..., size]."""
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)

    def add_(self, x: Tensor, residual: Tensor) -> Tensor:
        """Add x to `residual` in place, then normalise the sum; the sum stays in `residual`."""
        return add_layer_norm_(x, residual, self.weight, self.bias, self.eps)
