"""Rows replace placeholders; positions are plain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mm_core.types import PlaceholderRange


class Qwen2AudioFusion:
    """`hookspecs.Fusion` of the family."""

    kind: Literal["embed", "cross_attention", "encoder_decoder"] = "embed"

    def positions(self, token_ids: Sequence[int], ranges: Sequence[PlaceholderRange]) -> None:
        """None: positions are 0, 1, 2 and so on, placeholders included."""
