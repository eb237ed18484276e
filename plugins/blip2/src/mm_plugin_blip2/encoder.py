"""Pictures to rows: the vision tower, and in BLIP-2 the Q-Former behind it, which asks every picture the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from mm_core.hookspecs import BuildContext, Checkpoint, WeightMap
from mm_core.layers import LayerNorm
from mm_core.media import Normalisation
from mm_core.towers import TilePasses
from mm_core.types import MediaFeature
from mm_plugin_blip2.processor import read_settings
from mm_plugin_blip2.qformer import QFormer, QFormerConfig, qformer_weight_map
from mm_plugin_blip2.vision import VISION_NAMES, EvaConfig, EvaTower


def text_width(config: Mapping[str, Any]) -> int:
    """Channels of the language model's embeddings."""
    text = config.get("text_config") or {}
    return int(text.get("d_model", 512) if text.get("model_type") == "t5" else text.get("hidden_size", 768))


class Blip2Encoder(nn.Module):
    """hookspecs.Encoder; its cost unit is the patch. Rows are the language model's where the Q-Former is in it, else
    the tower's, which InstructBLIP's Q-Former reads later, with the instruction.

    A feature holds `pixels` uint8 [1, side, side, 3].
    """

    def __init__(self, config: Mapping[str, Any], norm: Normalisation, context: BuildContext) -> None:
        super().__init__()
        vision = EvaConfig.from_config(config.get("vision_config") or {})
        width = vision.hidden_size
        self.tower = EvaTower(vision, context)
        self.post_layernorm = LayerNorm(width, vision.layer_norm_eps, device=context.device, dtype=context.dtype)
        self.qformer: QFormer | None = None
        self.weight_map = WeightMap(rename=VISION_NAMES)
        self.hidden_size = width
        if config.get("model_type") != "instructblip":
            self.hidden_size = text_width(config)
            self.qformer = QFormer(QFormerConfig.from_config(config, width, self.hidden_size), context)
            names = qformer_weight_map("qformer.")
            self.weight_map = replace(names, rename=VISION_NAMES + names.rename)
        self._passes = TilePasses(vision, norm, context)

    def use_graphs(self) -> None:
        """From now on packs that repeat are captured."""
        self._passes.use_graphs()

    def cost(self, feature: MediaFeature) -> int:  # noqa: ARG002
        """Patches of a picture, all of which have one size."""
        return self.tower.config.num_tokens

    def forward(self, features: Sequence[MediaFeature]) -> list[Tensor]:
        """[num_tokens, hidden_size] each, in order."""
        if not features:
            return []
        return list(self._passes([f.tensors["pixels"] for f in features], self._encode).unbind(0))

    def _encode(self, patches: Tensor) -> Tensor:
        """[S · patches, 3 · patch²] → [S, rows of a picture, hidden_size]."""
        images: Tensor = self.post_layernorm(self.tower(patches))
        return images if self.qformer is None else self.qformer(images)


def make_encoder(checkpoint: Checkpoint, context: BuildContext) -> Blip2Encoder:
    """The encoder of a checkpoint."""
    vision = EvaConfig.from_config(checkpoint.config.get("vision_config") or {})
    return Blip2Encoder(checkpoint.config, read_settings(checkpoint, vision).norm, context)
