"""The family's image preprocessing, as transformers' PIL path does it: smart resize (bicubic), rescale, normalise."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from .config import MEAN, STD
from .layouts import CELL, MAX_PIXELS, MIN_PIXELS

PATCH, MERGE = 14, 2


def smart_resize(height: int, width: int) -> tuple[int, int]:
    """The size in pixels, multiples of 28, that a picture is resized to."""
    tall, wide = round(height / CELL) * CELL, round(width / CELL) * CELL
    if tall * wide > MAX_PIXELS:
        beta = math.sqrt(height * width / MAX_PIXELS)
        return max(CELL, math.floor(height / beta / CELL) * CELL), max(CELL, math.floor(width / beta / CELL) * CELL)
    if tall * wide < MIN_PIXELS:
        beta = math.sqrt(MIN_PIXELS / (height * width))
        return math.ceil(height * beta / CELL) * CELL, math.ceil(width * beta / CELL) * CELL
    return tall, wide


def resize(picture: Image.Image) -> np.ndarray:
    """RGB bytes [H, W, 3] of the smart size."""
    height, width = smart_resize(picture.height, picture.width)
    picture = picture.convert("RGB")
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def patches(picture: Image.Image) -> tuple[np.ndarray, tuple[int, int, int]]:
    """What the checkpoint takes: float32 patches [N, 1176] and the grid (1, rows, columns)."""
    pixels = (resize(picture).astype(np.float64) * (1 / 255)).astype(np.float32).transpose(2, 0, 1)
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (MEAN, STD))
    pixels = (pixels - mean) / std
    rows, columns = pixels.shape[1] // PATCH, pixels.shape[2] // PATCH
    view = pixels.reshape(3, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH)
    view = view.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
    frames = np.broadcast_to(view, (*view.shape[:5], 2, PATCH, PATCH))
    return np.ascontiguousarray(frames).reshape(rows * columns, -1), (1, rows, columns)
