"""How the rows of an item's tiles are put together: sizes in rows, known on the host."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

Size = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """kind "tile": one tile as it is. "base": one tile and a newline. "grid": a whole picture as one tile, then
    `grid` (down, across) tiles as one map of rows, without `trim` of them on either side (of padding), resized to
    `size` where that is not None, a newline after every line. "frames": tiles pooled to `size`, one newline.
    """

    kind: str
    tiles: int
    grid: Size = (1, 1)
    trim: Size = (0, 0)
    size: Size | None = None

    def num_rows(self, tile_rows: int) -> int:
        """Rows of the item; tile_rows: of a tile."""
        if self.kind == "frames":
            height, width = self.size or (0, 0)
            return self.tiles * height * width + 1
        if self.kind == "grid":
            height, width = self.size or self.trimmed(math.isqrt(tile_rows))
            return tile_rows + height * (width + 1)
        return tile_rows + (self.kind == "base")

    def trimmed(self, side: int) -> Size:
        """Lines and columns of the map that are left; side: of a tile."""
        return self.grid[0] * side - 2 * self.trim[0], self.grid[1] * side - 2 * self.trim[1]

    def as_info(self) -> dict[str, Any]:
        """For `MediaFeature.info`."""
        return asdict(self)


def grid_layout(picture: Size, grid: Size, side: int, most_tiles: int) -> Layout:
    """Layout of a picture of (height, width) pixels in `grid` tiles of side² rows (transformers' `unpad_image`).

    most_tiles: a map of more rows than so many tiles have, by a tenth a side, is shrunk to them; 0: never.
    """
    rows, columns = grid[0] * side, grid[1] * side
    if picture[1] / picture[0] > columns / rows:
        trim = ((rows - int(round(picture[0] * (columns / picture[1]), 7))) // 2, 0)
    else:
        trim = (0, (columns - int(round(picture[1] * (rows / picture[0]), 7))) // 2)
    layout = Layout("grid", 1 + grid[0] * grid[1], grid, trim)
    if most_tiles:
        rows, columns = layout.trimmed(side)
        ratio = math.sqrt(rows * columns / (most_tiles * side**2))
        if ratio > 1.1:
            return Layout("grid", layout.tiles, grid, trim, (int(rows // ratio), int(columns // ratio)))
    return layout


def frames_layout(frames: int, side: int) -> Layout:
    """Layout of a video whose frames have side² rows each."""
    pooled = math.ceil(side / 2)
    return Layout("frames", frames, size=(pooled, pooled))
