"""Which items go through the tower together on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from mm_plugin_qwen2vl.layout import Grid

REPEATED = 16384
"""Patches of a pass of equal items, which are a power of two, so that there are few graphs. Smaller passes run
as fast, but a host that launches waits once about a thousand kernels are queued, and a pass has 400."""
LARGEST = 16384
"""Patches of any other pass, unless one item alone has more: it bounds the memory that a pass takes."""


def equal_packs(grids: Sequence[Grid]) -> list[list[int]]:
    """Indexes of items with one grid, a power of two together, of at most REPEATED patches. Items of
    more than LARGEST patches are left out."""
    by_grid: dict[Grid, list[int]] = {}
    for index, grid in enumerate(grids):
        by_grid.setdefault(grid, []).append(index)
    packs = []
    for grid, indexes in by_grid.items():
        if prod(grid) > LARGEST:
            continue
        count = 1 << (max(REPEATED // prod(grid), 1).bit_length() - 1)
        while indexes:
            while count > len(indexes):
                count //= 2
            packs.append(indexes[:count])
            indexes = indexes[count:]
    return packs


def mixed_packs(indexes: Sequence[int], grids: Sequence[Grid]) -> list[list[int]]:
    """These items in order, as many together as LARGEST patches allow."""
    packs: list[list[int]] = []
    room = 0
    for index in indexes:
        size = prod(grids[index])
        if size > room or not packs:
            packs.append([])
            room = LARGEST
        packs[-1].append(index)
        room -= size
    return packs
