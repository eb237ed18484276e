"""The vision tower of BLIP-2: EVA-CLIP's (Fang et al. 2023), with a class token and fused q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from mm_core.errors import ConfigError
from mm_core.hookspecs import BuildContext
from mm_core.layers import empty_parameter
from mm_core.towers import TowerConfig, VisionTower


@dataclass(frozen=True)
class EvaConfig(TowerConfig):
    """Sizes of a tower; defaults as transformers' Blip2VisionConfig."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16,
        "image_size": 224, "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
    }  # fmt: skip
    class_tokens: ClassVar[int] = 1

    @classmethod
    def from_config(cls, vision_config: Mapping[str, Any]) -> Self:
        """See TowerConfig."""
        if not vision_config.get("qkv_bias", True):
            raise ConfigError("vision_config.qkv_bias is false; this tower has biases. Check config.json.")
        return super().from_config(vision_config)


class EvaTower(VisionTower):
    """Row 0 of a picture is its class token; the norm behind the last layer is the caller's."""

    def __init__(self, config: EvaConfig, context: BuildContext) -> None:
        super().__init__(config, context, layers=-1, bias=True)
        width = config.hidden_size
        device, dtype = context.device, context.dtype
        self.class_embedding = empty_parameter((width,), device, dtype, checkpoint_shape=(1, 1, width))
        self.position_embedding.weight = empty_parameter(
            (config.num_tokens, width), device, dtype, checkpoint_shape=(1, config.num_tokens, width)
        )

    def embed(self, patches: Tensor) -> Tensor:
        """Class token and positions."""
        first = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat((first, patches), dim=1).add_(self.position_embedding.weight)


VISION_NAMES = (
    (r"(?:model\.)?vision_model\.embeddings\.position_embedding$", "tower.position_embedding.weight"),
    (r"(?:model\.)?vision_model\.embeddings\.", "tower."),
    (r"(?:model\.)?vision_model\.encoder\.(layers\.\d+\.self_attn\.)qkv\.", r"tower.\1qkv_proj."),
    (r"(?:model\.)?vision_model\.encoder\.(layers\.\d+\.self_attn\.)projection\.", r"tower.\1out_proj."),
    (r"(?:model\.)?vision_model\.encoder\.", "tower."),
    (r"(?:model\.)?vision_model\.post_layernorm\.", "post_layernorm."),
)
"""Where checkpoints keep the tower and the norm behind it, for a module that has them by these names."""
