"""Feed-forward blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mm_core.kernels.activation import silu_and_mul
from mm_core.kernels.linear import gated_linear
from mm_core.layers.linear import Linear, MergedLinear


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
