"""Token embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_core.layers.parameter import empty_parameter


class Embedding(nn.Module):
    """Rows of a [size, width] table."""

    def __init__(
        self, size: int, width: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = empty_parameter((size, width), device, dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """[...] integer ids → [..., width]."""
        return F.embedding(ids, self.weight)
