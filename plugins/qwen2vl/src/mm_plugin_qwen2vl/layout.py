"""Where the patches of packed images and videos lie: pure functions of their grids, in numpy.

A frame is h × w patches. The processor orders them by merge groups (merge × merge neighbours that
become one token). Windowed attention reorders whole groups, so that those of one window follow
each other. Orders, positions and lengths agree with `vision_utils` of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class FrameLayout:
    """One frame. order: [groups] int64, the group that stands at each place. positions:
    [patches, 2] int32, row and column of the patch at each place. windows: [windows] int64, the
    patches of each, in order."""

    order: Array
    positions: Array
    windows: Array


@dataclass(frozen=True)
class PackedLayout:
    """All frames of all items one after another.

    order, inverse: [groups] int64 to the window order and back. positions: [patches, 2] int32.
    frames, windows: int32 bounds of the attention segments, from 0, with the longest of each.
    """

    order: Array
    inverse: Array
    positions: Array
    frames: Array
    windows: Array
    max_frame: int
    max_window: int


@lru_cache(maxsize=128)
def frame_layout(height: int, width: int, merge: int, window: int) -> FrameLayout:
    """The layout of one frame of height × width patches, window × window groups a window (0: none)."""
    rows, cols = height // merge, width // merge
    groups = np.arange(rows * cols).reshape(rows, cols)
    windows = np.array([height * width])
    order = groups.reshape(-1)
    if window:
        padded = np.full((-(-rows // window) * window, -(-cols // window) * window), -1)
        padded[:rows, :cols] = groups
        split = padded.reshape(padded.shape[0] // window, window, padded.shape[1] // window, window)
        tiles = split.transpose(0, 2, 1, 3).reshape(-1, window * window)
        windows = (tiles >= 0).sum(axis=1) * merge * merge
        order = tiles[tiles >= 0]
    places = np.moveaxis(np.indices((height, width), dtype=np.int32), 0, -1)
    places = places.reshape(rows, merge, cols, merge, 2).transpose(0, 2, 1, 3, 4)
    positions = places.reshape(rows * cols, merge * merge, 2)[order].reshape(-1, 2)
    for array in (order, positions, windows):
        array.setflags(write=False)  # they are shared by every caller
    return FrameLayout(order, positions, windows)


def packed_layout(grids: Sequence[Grid], merge: int, window: int) -> PackedLayout:
    """The layout of items with the given (frames, height, width) in patches, packed in order."""
    frames = [frame_layout(h, w, merge, window) for t, h, w in grids for _ in range(t)]
    starts = np.cumsum([0] + [len(f.order) for f in frames])
    order = np.concatenate([f.order + start for f, start in zip(frames, starts, strict=False)])
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    lengths = np.array([len(f.positions) for f in frames])
    windows = np.concatenate([f.windows for f in frames])
    return PackedLayout(
        order=order,
        inverse=inverse,
        positions=np.concatenate([f.positions for f in frames]),
        frames=_bounds(lengths),
        windows=_bounds(windows),
        max_frame=int(lengths.max()),
        max_window=int(windows.max()),
    )


def _bounds(lengths: Array) -> Array:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
