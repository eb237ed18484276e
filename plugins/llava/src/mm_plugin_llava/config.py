"""What a LLaVA checkpoint's config.json says, with transformers' defaults."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from mm_core.decoders import LlamaConfig
from mm_core.errors import ConfigError
from mm_core.hookspecs import Checkpoint
from mm_core.towers import TowerConfig, tower_config

# Towers and text models of checkpoints that name none.
_CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
}  # fmt: skip
_SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26,
    "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
}  # fmt: skip
_TEXT = {"llava": "llama", "llava_next": "llama", "llava_onevision": "qwen2"}
_TEXT_TYPES = ("llama", "mistral", "qwen2")


@dataclass(frozen=True)
class LlavaConfig:
    """kind: `model_type`. vision: the tower's settings. layers: of its hidden states, as transformers counts them.
    skip: rows at a tile's beginning that are left out. text, text_type: the language model's settings, and which
    it is. act, bias: of the projector. most_tiles: what a picture's tiles are shrunk to together, in tiles
    (OneVision); 0: never.
    """

    kind: str
    vision: Mapping[str, Any]
    tower: TowerConfig
    layers: int | Sequence[int]
    skip: int
    text: Mapping[str, Any]
    text_type: str
    act: str
    bias: bool
    most_tiles: int

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Raises ConfigError where settings do not go together."""
        return cls.from_config(checkpoint.config, checkpoint.text_config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], text: Mapping[str, Any]) -> Self:
        """text: the language model's settings in the flat spelling, if config.json has any."""
        kind = str(config.get("model_type"))
        if kind not in _TEXT:
            raise ConfigError(f"config.json has model_type {kind!r}; this plugin reads {', '.join(_TEXT)}.")
        onevision = kind == "llava_onevision"
        vision = config.get("vision_config") or (_SIGLIP if onevision else _CLIP)
        vision = {"model_type": "siglip_vision_model" if onevision else "clip_vision_model", **vision}
        strategy = config.get("vision_feature_select_strategy", "full" if onevision else "default")
        if strategy not in ("default", "full"):
            raise ConfigError(f"vision_feature_select_strategy is {strategy!r}; want 'default' or 'full'.")
        text = text if config.get("text_config") else {}
        text_type = str(text.get("model_type") or _TEXT[kind]).removesuffix("_text")
        if text_type not in _TEXT_TYPES:
            raise ConfigError(f"The text model is of type {text_type!r}; this plugin has {', '.join(_TEXT_TYPES)}.")
        made = cls(
            kind=kind,
            vision=vision,
            tower=tower_config(vision),
            layers=config.get("vision_feature_layer", -1 if onevision else -2),
            skip=int(strategy == "default"),
            text={**text, "model_type": text_type, "tie_word_embeddings": _tied(config)},
            text_type=text_type,
            act=config.get("projector_hidden_act", "gelu"),
            bias=config.get("multimodal_projector_bias", True),
            most_tiles=_most_tiles(config.get("vision_aspect_ratio", "anyres_max_9")) if onevision else 0,
        )
        if made.tiled and made.tile_rows != made.tower.num_patches:
            raise ConfigError(
                f"vision_feature_select_strategy={strategy!r} leaves {made.tile_rows} rows of a tile of "
                f"{made.tower.num_patches} patches, which make no grid. Use 'default' with a class token, else 'full'."
            )
        return made

    @property
    def tiled(self) -> bool:
        """Whether pictures are cut to tiles (anyres)."""
        return self.kind != "llava"

    @property
    def text_width(self) -> int:
        """The decoder's hidden size."""
        return LlamaConfig.from_text_config(self.text).hidden_size

    @property
    def tile_rows(self) -> int:
        """Rows that one tile gives."""
        return self.tower.num_tokens - self.skip


def _tied(config: Mapping[str, Any]) -> bool:
    """As transformers: either level may say so, as checkpoints hold it in the text model's settings."""
    return any(part.get("tie_word_embeddings") for part in (config, config.get("text_config") or {}))


def _most_tiles(aspect_ratio: Any) -> int:
    found = re.fullmatch(r"anyres_max_([1-9]\d*)", str(aspect_ratio))
    if found is None:
        raise ConfigError(f"vision_aspect_ratio is {aspect_ratio!r}; this plugin reads 'anyres_max_N'.")
    return int(found[1])
