"""How pictures are cut into tiles, with Pillow on 8-bit values, as the original does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from mm_core.errors import MediaDecodeError
from mm_core.media import resize_image

MAX_PIXELS = 2**26  # that a picture smaller than this may become on the way

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Block = tuple[int, int]


@cache
def candidates(low: int, high: int) -> tuple[Block, ...]:
    """(columns, rows) of low to high tiles, by their product.

    Equal products stand in the order in which Python iterates over the set, as it is built here: the original
    does so, and of two equally good candidates the first one counts.
    """
    ratios = {
        (i, j) for n in range(low, high + 1) for i in range(1, n + 1) for j in range(1, n + 1) if low <= i * j <= high
    }
    return tuple(sorted(ratios, key=lambda ratio: ratio[0] * ratio[1]))


def closest(size: tuple[int, int], ratios: Sequence[Block], tile: int) -> Block:
    """(columns, rows) of the candidate with the nearest aspect ratio; of equals, a later and larger one if the
    picture fills more than half of it."""
    width, height = size
    best, distance, aspect = (1, 1), float("inf"), width / height
    for ratio in ratios:
        difference = abs(aspect - ratio[0] / ratio[1])
        if difference < distance:
            best, distance = ratio, difference
        elif difference == distance and width * height > 0.5 * tile * tile * ratio[0] * ratio[1]:
            best = ratio
    return best


def cut(image: Image.Image, columns: int, rows: int, tile: int) -> Pixels:
    """Resized (bicubic) to columns × rows tiles; uint8 [rows · columns, tile, tile, 3], row by row."""
    grid = resized(image, columns * tile, rows * tile)
    return grid.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)


def dynamic_s2(image: Image.Image, sides: Sequence[int], max_tiles: int, tile: int) -> tuple[Pixels, Block]:
    """Tiles of every scale, and (rows, columns) of the last one. sides: tiles a side of each scale; the last one
    takes the picture's shape."""
    columns, rows = closest(image.size, candidates(sides[-1] ** 2, max_tiles), tile)
    parts = [cut(image, side, side, tile) for side in sides[:-1]]
    return np.concatenate([*parts, cut(image, columns, rows, tile)]), (rows, columns)


def dynamic(image: Image.Image, min_tiles: int, max_tiles: int, tile: int) -> Pixels:
    """Tiles, then the whole picture as one, where there is more than one."""
    columns, rows = closest(image.size, candidates(min_tiles, max_tiles), tile)
    tiles = cut(image, columns, rows, tile)
    return tiles if len(tiles) == 1 else np.concatenate([tiles, cut(image, 1, 1, tile)])


def resized(image: Image.Image, width: int, height: int, resample: int = Image.Resampling.BICUBIC) -> Pixels:
    """uint8 [height, width, 3]."""
    _check(image, width * image.height)  # Pillow resizes the lines first
    return resize_image(image, height, width, resample)


def _check(image: Image.Image, pixels: int) -> None:
    """Raise MediaDecodeError (code "image_aspect") for a picture that takes so many pixels of memory."""
    if pixels > max(MAX_PIXELS, image.width * image.height):
        raise MediaDecodeError(
            f"The picture is {image.width}×{image.height}, so elongated that this model's preprocessing would make "
            f"{pixels} pixels of it. Crop it, or scale it down.",
            code="image_aspect",
        )


def padded(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """The picture in the middle of a square of the mean colour."""
    side = max(image.size)
    _check(image, side * side)
    square = Image.new("RGB", (side, side), tuple(int(m * 255) for m in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
