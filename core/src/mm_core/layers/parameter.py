"""Parameters as the checkpoint loader expects them: empty, frozen, with the facts it needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def empty_parameter(
    shape: Sequence[int],
    device: torch.device | None,
    dtype: torch.dtype | None,
    *,
    shard_sizes: Sequence[int] | None = None,
    checkpoint_shape: Sequence[int] | None = None,
) -> nn.Parameter:
    """An uninitialised parameter without gradient.

    shard_sizes: rows of each tensor that is fused into it, in order; read by the loader for names
    of `WeightMap.fused`. checkpoint_shape: the tensor's shape in the checkpoint where that differs
    (same elements, same order); the loader reshapes.
    """
    param = nn.Parameter(torch.empty(tuple(shape), device=device, dtype=dtype), requires_grad=False)
    for name, value in (("shard_sizes", shard_sizes), ("checkpoint_shape", checkpoint_shape)):
        if value is not None:
            setattr(param, name, tuple(value))
    return param
