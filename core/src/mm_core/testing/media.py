"""Pictures, clips and sounds for tests: noise over ramps, so that every patch and every window differs."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from mm_core.types import Modality

RATE = 16000
_IMAGE_SIZES = ((1, 1), (37, 211), (300, 20), (64, 64), (113, 90), (8, 120))
_CLIP_LENGTHS = (1, 2, 3, 6)
_SECONDS = (0.1, 0.5, 1.03, 2.5)


def picture(seed: int = 0, width: int = 112, height: int = 84) -> Image.Image:
    """An RGB picture."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 120, width)[None, :, None] + np.linspace(0, 60, height)[:, None, None]
    noise = rng.integers(0, 75, (height, width, 3))
    return Image.fromarray((ramp + noise + rng.integers(0, 60, 3)).clip(0, 255).astype(np.uint8))


def frames(seed: int = 0, count: int = 5, width: int = 84, height: int = 56) -> np.ndarray[Any, Any]:
    """[count, height, width, 3] uint8."""
    return np.stack([np.asarray(picture(1000 * seed + i, width, height)) for i in range(count)])


def clip(seed: int = 0, count: int = 5, width: int = 84, height: int = 56, fps: float = 2.0) -> dict[str, Any]:
    """A video as `multi_modal_data` takes it."""
    return {"frames": frames(seed, count, width, height), "fps": fps}


def sound(seed: int = 0, seconds: float = 1.0, rate: int = RATE) -> tuple[np.ndarray[Any, Any], int]:
    """(samples, rate): four tones that come and go, and some noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(max(1, round(seconds * rate))) / rate
    tones = [
        np.sin(2 * np.pi * rng.uniform(100, 3000) * time) * (np.sin(2 * np.pi * rng.uniform(0.5, 3) * time) > 0)
        for _ in range(4)
    ]
    return (0.15 * np.sum(tones, axis=0) + 0.02 * rng.standard_normal(len(time))).astype(np.float32), rate


def varied(modality: Modality, value: Any, seed: int = 1) -> Any:
    """Other content of the same shape. value: a PIL image, frames in one of their forms, or (samples, rate)."""
    if modality == "image":
        return picture(7919 * seed + 1, value.width, value.height)
    if modality == "audio":
        return sound(7919 * seed + 1, len(value[0]) / value[1], value[1])
    given = np.asarray(value["frames"] if isinstance(value, Mapping) else value[0] if _has_fps(value) else value)
    count, height, width, _ = given.shape
    new = frames(7919 * seed + 1, count, width, height)
    return {**value, "frames": new} if isinstance(value, Mapping) else (new, value[1]) if _has_fps(value) else new


def _has_fps(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and not hasattr(value[1], "shape")


def of_many_sizes(modality: Modality, seed: int) -> Iterator[Any]:
    """Items whose sizes, shapes or lengths differ; the last ones are drawn at random."""
    rng = random.Random(seed)
    if modality == "image":
        drawn = [(rng.randint(1, 400), rng.randint(20, 200)) for _ in range(4)]
        yield from (picture(seed + i, *size) for i, size in enumerate((*_IMAGE_SIZES, *drawn)))
    elif modality == "video":
        for i, count in enumerate(_CLIP_LENGTHS):
            yield clip(seed + i, count, rng.randint(30, 120), rng.randint(30, 120))
    else:
        for i, seconds in enumerate((*_SECONDS, rng.uniform(0.1, 4.0))):
            yield sound(seed + i, seconds)
