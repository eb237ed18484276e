"""How rows and text become the language model's input. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mm_core.hookspecs import Checkpoint, Fusion, hookimpl
from mm_core.types import PlaceholderRange


class VilaFusion:
    """hookspecs.Fusion: rows replace placeholders."""

    kind: Literal["embed", "cross_attention", "encoder_decoder"] = "embed"

    def positions(self, token_ids: Sequence[int], ranges: Sequence[PlaceholderRange]) -> None:
        """None: 0…n-1."""


@hookimpl
def mm_fusion(family: str, checkpoint: Checkpoint) -> Fusion:  # noqa: ARG001
    """Rows replace placeholders; positions count from 0."""
    return VilaFusion()
