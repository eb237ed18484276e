"""Qwen2-VL whose encoder fails in one way for each height of picture; all others are as they should be."""

from __future__ import annotations

import os
import time
from typing import Any

import mm_plugin_qwen2vl
from mm_core.hookspecs import BuildContext, Checkpoint, Encoder, hookimpl
from mm_plugin_qwen2vl import mm_families as mm_families
from mm_plugin_qwen2vl import mm_fusion as mm_fusion
from mm_plugin_qwen2vl import mm_processor as mm_processor

WIDTH, PATCH = 112, 14
EXITS, HANGS, BREAKS, SHORT, NOTHING, NO_NUMBERS, RAISES = range(448, 448 + 7 * 56, 56)  # heights in pixels


def height(feature: Any) -> int:
    _, rows, columns = feature.info["grid_thw"]
    return rows * PATCH if columns * PATCH == WIDTH else 0


@hookimpl
def mm_encoder(family: str, checkpoint: Checkpoint, context: BuildContext) -> Encoder:
    """The real one, with what comes before and behind its pass."""
    encoder: Any = mm_plugin_qwen2vl.mm_encoder(family=family, checkpoint=checkpoint, context=context)
    forward, cost = encoder.forward, encoder.cost

    def faulty(features: Any) -> Any:
        heights = {height(feature) for feature in features}
        if EXITS in heights:
            os._exit(9)
        if HANGS in heights:
            time.sleep(3600)
        if NOTHING in heights:
            return None
        if RAISES in heights:
            raise RuntimeError("secret of /etc/passwd at 0xdeadbeef00")
        rows = forward(features)
        if SHORT in heights:
            return [row[:-1] for row in rows]
        factors = [float("nan") if height(feature) == NO_NUMBERS else 1.0 for feature in features]
        return [row * factor for row, factor in zip(rows, factors, strict=True)]

    def priced(feature: Any) -> int:
        if height(feature) == BREAKS:
            raise RuntimeError("the scheduler's loop asks this")
        return int(cost(feature))

    encoder.forward, encoder.cost = faulty, priced
    return encoder  # type: ignore[no-any-return]
