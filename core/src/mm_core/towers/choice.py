"""Which tower a checkpoint has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mm_core.errors import ConfigError
from mm_core.hookspecs import BuildContext
from mm_core.towers.base import TowerConfig, VisionTower
from mm_core.towers.clip import ClipConfig, ClipTower
from mm_core.towers.siglip import SiglipConfig, SiglipTower

_CONFIGS: Mapping[str, type[TowerConfig]] = {
    "clip_vision_model": ClipConfig,
    "siglip_vision_model": SiglipConfig,
}


def tower_config(vision_config: Mapping[str, Any]) -> TowerConfig:
    """The sizes of the tower that `vision_config.model_type` names. Raises ConfigError for another one."""
    kind = str(vision_config.get("model_type"))
    if kind not in _CONFIGS:
        raise ConfigError(
            f"The checkpoint's vision tower is of type {kind!r}; this release has {', '.join(_CONFIGS)}. "
            "Check vision_config.model_type in config.json."
        )
    return _CONFIGS[kind].from_config(vision_config)


def make_tower(
    vision_config: Mapping[str, Any], context: BuildContext, *, layers: int | Sequence[int] = -1
) -> VisionTower:
    """The tower, its parameters empty; layers: see `VisionTower`."""
    config = tower_config(vision_config)
    if isinstance(config, ClipConfig):
        return ClipTower(config, context, layers=layers)
    assert isinstance(config, SiglipConfig)
    return SiglipTower(config, context, layers=layers)
