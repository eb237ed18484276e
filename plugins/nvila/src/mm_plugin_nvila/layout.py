"""How many rows an item has, and in what order its tokens stand. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import Any

from mm_core.errors import ConfigError, InvalidParamsError
from mm_plugin_nvila.settings import Settings

_MLP = re.compile(r"mlp(\d+)x_gelu")
_DOWNSAMPLE: Mapping[str, int] = {
    "identity": 1,
    "linear": 1,
    "mlp_downsample": 2,
    "mlp_downsample_2x2_fix": 2,
    "mlp_downsample_3x3_fix": 3,
    "mlp_downsample_3x3_s2": 3,
    "mlp_downsample_3x3_s2_new": 3,
}


def depth(projector: str) -> int:
    """N of `mlpNx_gelu`; 0 for another type."""
    found = _MLP.fullmatch(projector)
    return int(found[1]) if found else 0


def downsample(projector: str) -> int:
    """Patches a side that the projector makes one row of. Raises ConfigError for a type it does not know."""
    if depth(projector):
        return 1
    if projector not in _DOWNSAMPLE:
        raise ConfigError(
            f"The checkpoint's projector is of type {projector!r}; this plugin has {', '.join(_DOWNSAMPLE)} and "
            "mlpNx_gelu. Check mm_projector_type."
        )
    return _DOWNSAMPLE[projector]


class Layout:
    """Rows of items. side: patches a side of a tile; rows come as squares of `square` a side a tile."""

    def __init__(self, settings: Settings, side: int) -> None:
        self.settings = settings
        # Static S2 hands the projector one map a picture, as large as the chosen scale's.
        self.map = side * settings.tiles[settings.output] if settings.static else side
        self.square = -(-self.map // downsample(settings.projector))
        for _, rows, columns in settings.pools:
            if self.square % rows or self.square % columns:
                raise ConfigError(
                    f"video_encoder.pool_sizes has {rows}×{columns}, which does not divide a frame's "
                    f"{self.square}×{self.square} rows. Correct config.json."
                )

    def block(self, block: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of tiles that the merged map of a cut picture has; block: of its last scale."""
        settings = self.settings
        last = settings.output == len(settings.tiles) - 1
        return block if last else (settings.tiles[settings.output],) * 2

    def runs(self, info: Mapping[str, Any], modality: str) -> list[list[int]]:
        """Rows of each run of placeholders, by the level of the pyramid (images have one)."""
        if modality == "video":
            return [
                [self.square**2 // (rows * columns)] * (info["tiles"] // frames)
                for frames, rows, columns in self.settings.pools
            ]
        if info["block"] is not None:
            return [[self.square**2 * prod(self.block(info["block"]))]]
        return [[self.square**2] * info["tiles"]]

    def check_frames(self, count: int) -> None:
        """Raise InvalidParamsError where the video encoder cannot average that many frames."""
        for frames, _, _ in self.settings.pools:
            if count % frames:
                raise InvalidParamsError(
                    f"The model averages over {frames} frames each, and {count} frames of the video are kept. Pass a "
                    f"multiple of {frames} as num_frames in mm_processor_kwargs.",
                    param="mm_processor_kwargs",
                )
