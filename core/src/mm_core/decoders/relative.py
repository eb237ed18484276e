"""Positions by distance: a bias on the scores of attention, as T5 has it (Raffel et al. 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_core.hookspecs import BuildContext
from mm_core.layers import empty_parameter


def bucket(distance: Tensor, buckets: int, far: int, *, bidirectional: bool) -> Tensor:
    """Which bias a distance (key's index - query's) has, int64: one a distance up to half of the buckets, then
    logarithmically wider ones up to `far` (Mesh TensorFlow's `_relative_position_bucket`)."""
    first = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        first = (distance > 0).long() * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    # In float32 and in this order: the result is cut off to a whole number.
    ratio = torch.log(distance.float() / exact) / math.log(far / exact) * (buckets - exact)
    wide = (exact + ratio.long()).clamp(max=buckets - 1)
    return first + torch.where(distance < exact, distance, wide)


class RelativeBias(nn.Module):
    """A bias by bucket and head, looked up by distance. Distances from `far` on share the last bucket."""

    buckets: Tensor

    def __init__(self, buckets: int, heads: int, far: int, context: BuildContext, *, bidirectional: bool) -> None:
        super().__init__()
        self.weight = empty_parameter((buckets, heads), context.device, context.dtype)
        self.far = far
        found = bucket(torch.arange(-far, far + 1), buckets, far, bidirectional=bidirectional)
        self.register_buffer("buckets", found.to(context.device), persistent=False)

    def forward(self, queries: int, keys: int) -> Tensor:
        """[heads, queries, keys], each query and key at its index."""
        device = self.weight.device
        distance = torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None]
        found = self.buckets[distance.clamp(-self.far, self.far) + self.far]
        return F.embedding(found, self.weight).permute(2, 0, 1).contiguous()
