"""Feed-forward blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_core.kernels.activation import silu_and_mul
from mm_core.kernels.gelu import quick_gelu_
from mm_core.kernels.linear import AddNorm, gated_linear, norm_linear, quick_gelu_linear
from mm_core.layers.linear import Linear, MergedLinear
from mm_core.layers.norm import LayerNorm


def project_normed(
    norm: LayerNorm, projection: Linear, x: Tensor, residual: Tensor, *, gelu: bool = False
) -> tuple[Tensor, Tensor]:
    """projection(norm(x + residual)), with the exact GELU behind it where asked for, and the sum x + residual,
    which may lie in `residual`. For one row a single kernel."""
    if projection.packed is None:
        before = AddNorm(residual, norm.weight, norm.bias, norm.eps)
        return norm_linear(x, before, projection.weight, projection.bias, gelu=gelu)
    y = projection(norm.add_(x, residual))
    return F.gelu(y) if gelu else y, residual


def project_activated(projection: Linear, act: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """act(projection(x)); act may use up what it is given. By one kernel where there is one for both."""
    if act is quick_gelu_ and projection.packed is None:
        return quick_gelu_linear(x, projection.weight, projection.bias)
    return act(projection(x))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)) (Shazeer 2020, SwiGLU), with gate and up fused.

    The checkpoint's `gate_proj` and `up_proj` are shards 0 and 1 of `gate_up_proj`.
    """

    def __init__(
        self,
        size: int,
        intermediate: int,
        *,
        bias: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = (intermediate, intermediate)
        self.gate_up_proj = MergedLinear(size, sizes, bias=bias, device=device, dtype=dtype)
        self.down_proj = Linear(intermediate, size, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[T, size] → [T, size]."""
        both = self.gate_up_proj
        plain = both.packed is None and both.bias is None
        hidden = gated_linear(x, both.weight) if plain else silu_and_mul(both(x))
        down: Tensor = self.down_proj(hidden)
        return down
