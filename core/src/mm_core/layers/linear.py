"""Projections: y = x Wᵀ + b, with W as [out, in]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mm_core.kernels.linear import linear
from mm_core.layers.packing import PackedWeight, pack
from mm_core.layers.parameter import empty_parameter


class Linear(nn.Module):
    """One projection, [..., in_features] → [..., out_features]."""

    bias: nn.Parameter | None
    packed: PackedWeight | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = empty_parameter((out_features, in_features), device, dtype)
        self.bias = empty_parameter((out_features,), device, dtype) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] → [..., out_features]."""
        if self.packed is not None:
            return self.packed.linear(x, self.bias)
        return linear(x, self.weight, self.bias)

    def finish_loading(self) -> None:
        """Pack the loaded weight where that is faster (on a CPU); the plain one is dropped then."""
        if self.packed is None and (packed := pack(self.weight)) is not None:
            self.packed = packed
            self.weight.data = self.weight.data.new_empty(0)


class MergedLinear(Linear):
    """Several projections of one input as a single matrix: their rows follow each other.

    Weight and bias carry `shard_sizes`, the rows of each projection, for the checkpoint loader.
    """

    def __init__(
        self,
        in_features: int,
        shard_sizes: Sequence[int],
        *,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        rows = sum(shard_sizes)
        self.shard_sizes = tuple(shard_sizes)
        self.weight = empty_parameter((rows, in_features), device, dtype, shard_sizes=shard_sizes)
        self.bias = empty_parameter((rows,), device, dtype, shard_sizes=shard_sizes) if bias else None
