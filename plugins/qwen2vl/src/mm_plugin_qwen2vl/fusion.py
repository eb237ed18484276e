"""M-RoPE positions: text counts in one dimension, media in time, height and width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np

from mm_core.errors import MediaError
from mm_core.layers import MROPE_SLACK
from mm_core.types import MediaFeature, PlaceholderRange


class Qwen2VLFusion:
    """hookspecs.Fusion of Qwen2-VL and Qwen2.5-VL.

    tokens_per_second: positions for a second of video (Qwen2.5-VL), or None where every temporal
    slice advances time by one (Qwen2-VL).
    """

    kind: Literal["embed", "cross_attention", "encoder_decoder"] = "embed"

    def __init__(self, merge_size: int, tokens_per_second: float | None) -> None:
        self.merge_size = merge_size
        self.tokens_per_second = tokens_per_second

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From a checkpoint's config.json."""
        vision = config["vision_config"]
        timed = config["model_type"] == "qwen2_5_vl"
        return cls(vision.get("spatial_merge_size", 2), vision.get("tokens_per_second", 4) if timed else None)

    def positions(
        self, token_ids: Sequence[int], ranges: Sequence[PlaceholderRange]
    ) -> tuple[np.ndarray[Any, Any], int] | None:
        """([3, n] int32, decode_delta), as `get_rope_index` of transformers 5.23; None without media."""
        if not ranges:
            return None
        n = len(token_ids)
        out = np.empty((3, n), dtype=np.int32)
        token, position = 0, 0  # [0, token) is filled; the next text token has `position`
        for item in ranges:
            start = item.offset + item.is_media.index(True)
            end = start + item.feature.num_tokens
            out[:, token:start] = np.arange(position, position + start - token)
            position += start - token
            side = self._fill(out[:, start:end], item.feature, position)
            # After a video the text goes on from its height or width, not from its time: so does
            # the reference
            token, position = end, position + side
        out[:, token:] = np.arange(position, position + n - token)
        delta = int(out.max()) + 1 - n
        if delta > MROPE_SLACK:
            raise MediaError(
                f"The prompt's media reach position {n + delta} with {n} tokens: a video's frames lie too far "
                "apart in time. Sample more frames a second, or send a shorter part of it."
            )
        return out, delta

    def _fill(self, out: np.ndarray[Any, Any], feature: MediaFeature, position: int) -> int:
        """Write one item's positions to out [3, num_tokens]; returns how far text advances."""
        t, h, w = feature.info["grid_thw"]
        h, w = h // self.merge_size, w // self.merge_size
        grid = np.empty((3, t, h, w), dtype=np.int32)
        grid[0] = (self._times(t, feature) + position)[:, None, None]
        grid[1] = np.arange(position, position + h)[:, None]
        grid[2] = np.arange(position, position + w)
        out[...] = grid.reshape(3, -1)
        return int(max(h, w))

    def _times(self, t: int, feature: MediaFeature) -> np.ndarray[Any, Any]:
        """[t] int64: when each temporal slice lies, relative to the first."""
        if self.tokens_per_second is None or feature.modality != "video":
            return np.arange(t)
        seconds = feature.info.get("second_per_grid")
        # float32 throughout, or truncation differs from the reference
        step = np.float32(self.tokens_per_second) * np.float32(1.0 if seconds is None else seconds)
        return (np.arange(t, dtype=np.float32) * step).astype(np.int64)
