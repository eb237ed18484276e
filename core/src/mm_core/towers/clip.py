"""CLIP's vision tower (Radford et al. 2021): a class token before the patches, and a norm before the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mm_core.hookspecs import BuildContext
from mm_core.layers import empty_parameter
from mm_core.towers.base import TowerConfig, VisionTower, tower_norm


@dataclass(frozen=True)
class ClipConfig(TowerConfig):
    """Sizes of a CLIP tower; defaults as transformers' CLIPVisionConfig."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    }  # fmt: skip
    class_tokens: ClassVar[int] = 1


class ClipTower(VisionTower):
    """Row 0 of a tile is its class token."""

    def __init__(self, config: ClipConfig, context: BuildContext, *, layers: int | Sequence[int] = -1) -> None:
        super().__init__(config, context, layers=layers, bias=False)
        self.class_embedding = empty_parameter((config.hidden_size,), context.device, context.dtype)
        self.pre_layrnorm = tower_norm(config, context)  # as checkpoints spell it

    def embed(self, patches: Tensor) -> Tensor:
        """Class token, positions, norm."""
        first = self.class_embedding.expand(len(patches), 1, -1)
        rows: Tensor = self.pre_layrnorm(torch.cat((first, patches), dim=1).add_(self.position_embedding.weight))
        return rows
