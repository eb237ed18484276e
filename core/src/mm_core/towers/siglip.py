"""SigLIP's vision tower (Zhai et al. 2023): patches and positions, nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mm_core.hookspecs import BuildContext
from mm_core.towers.base import TowerConfig, VisionTower


@dataclass(frozen=True)
class SiglipConfig(TowerConfig):
    """Sizes of a SigLIP tower; defaults as transformers' SiglipVisionConfig."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
    }  # fmt: skip


class SiglipTower(VisionTower):
    """All rows of a tile are its patches. The pooling head of some checkpoints is not loaded."""

    def __init__(self, config: SiglipConfig, context: BuildContext, *, layers: int | Sequence[int] = -1) -> None:
        super().__init__(config, context, layers=layers, bias=True)

    def embed(self, patches: Tensor) -> Tensor:
        """Positions."""
        return patches + self.position_embedding.weight
