"""uint8 pictures to normalised float32 patches, in one pass, bit for bit as transformers' PIL path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Normalisation:
    """`(value × rescale - mean) / std` a channel, with the rounding of the reference.

    The product is taken in float64 and rounded to float32; the rest is float32.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale: float = 1 / 255

    def apply(
        self,
        pixels: np.ndarray[Any, Any],
        mean: np.ndarray[Any, Any],
        std: np.ndarray[Any, Any],
        out: np.ndarray[Any, Any],
    ) -> None:
        """Normalise uint8 `pixels` into float32 `out`; mean and std broadcast against them."""
        if self.rescale == 1 / 255:
            # For all 256 values float32(value × (1/255)) == float32(value) / float32(255); a test says so.
            np.divide(pixels, np.float32(255.0), out=out, dtype=np.float32)
        else:
            out[...] = pixels.astype(np.float64) * self.rescale
        out -= mean
        out /= std


@dataclass(frozen=True)
class PatchLayout:
    """Sides of a patch in pixels, its depth in frames, and how many patches a side are merged later."""

    patch: int = 14
    temporal: int = 2
    merge: int = 2

    @property
    def factor(self) -> int:
        """Pixels that each side of a picture must be a multiple of."""
        return self.patch * self.merge


def normalise(pixels: np.ndarray[Any, Any], norm: Normalisation) -> np.ndarray[Any, np.dtype[np.float32]]:
    """uint8 [..., channels] → float32 of the same shape."""
    out = np.empty(pixels.shape, np.float32)
    norm.apply(pixels, np.asarray(norm.mean, np.float32), np.asarray(norm.std, np.float32), out)
    return out


def patchify(
    frames: np.ndarray[Any, np.dtype[np.uint8]], layout: PatchLayout, norm: Normalisation
) -> tuple[np.ndarray[Any, np.dtype[np.float32]], tuple[int, int, int]]:
    """uint8 [frames, height, width, 3] → float32 [t·h·w, 3·temporal·patch·patch] and the grid (t, h, w).

    Order of rows: time, then blocks of merge × merge patches row by row, then the patches inside a
    block. Inside a row: channel, frame, y, x. Missing frames of the last step repeat the last one.
    """
    count, height, width, channels = frames.shape
    p, m, depth = layout.patch, layout.merge, layout.temporal
    steps, rows, cols = -(-count // depth), height // layout.factor, width // layout.factor
    out = np.empty((steps, rows, cols, m, m, channels, depth, p, p), np.float32)
    mean = np.tile(np.asarray(norm.mean, np.float32), width)
    std = np.tile(np.asarray(norm.std, np.float32), width)
    strip = np.empty((layout.factor, width * channels), np.float32)
    blocks = strip.reshape(m, p, cols, m, p, channels).transpose(2, 0, 3, 5, 1, 4)  # a view of strip
    # One strip of blocks at a time: it stays in the processor's cache between the two steps.
    for frame in range(count):
        strips = frames[frame].reshape(rows, layout.factor, width * channels)
        step, slot = divmod(frame, depth)
        last = depth if frame == count - 1 else slot + 1
        for row in range(rows):
            norm.apply(strips[row], mean, std, strip)
            out[step, row, :, :, :, :, slot:last] = blocks[:, :, :, :, None]
    patches = out.reshape(steps * rows * cols * m * m, channels * depth * p * p)
    return patches, (steps, rows * m, cols * m)
