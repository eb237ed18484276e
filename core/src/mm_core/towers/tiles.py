"""Equal tiles of any number of pictures through one function, in packs whose sizes repeat."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mm_core.hookspecs import BuildContext
from mm_core.layers import CapturedPasses, Patchify
from mm_core.media import Normalisation, PatchLayout
from mm_core.towers.base import TowerConfig

LARGEST = 32
"""Tiles of a pack at most: it bounds the memory that a pass takes."""


def packs(count: int) -> list[int]:
    """Powers of two up to LARGEST that add up to `count`: few sizes, so few CUDA graphs."""
    sizes = []
    while count:
        sizes.append(min(LARGEST, 1 << (count.bit_length() - 1)))
        count -= sizes[-1]
    return sizes


class TilePasses:
    """Normalises uint8 tiles on the device and runs `encode` over them, on a GPU as CUDA graphs where
    packs of a size come again. Always the same `encode`: graphs know it by the number of tiles alone.

    config: of the tower that reads the patches. norm: how pixels become numbers.
    """

    def __init__(self, config: TowerConfig, norm: Normalisation, context: BuildContext) -> None:
        self._patches = config.num_patches
        self._device = context.device
        self._patchify = Patchify(PatchLayout(config.patch_size, 1, 1), norm, context.device, context.dtype)
        self._captured = CapturedPasses(LARGEST.bit_length())

    def use_graphs(self) -> None:
        """From now on packs that repeat are captured."""
        self._captured.enabled = True

    def __call__(self, pixels: Sequence[Tensor], encode: Callable[[Tensor], Tensor]) -> Tensor:
        """uint8 [k, S, S, 3] each, S = config.pixels → [all tiles, …], what `encode` makes of the patches
        [n · patches of a tile, 3 · patch²] of n tiles: [n, …]."""
        patches = self._patchify([p.to(self._device, non_blocking=True) for p in pixels])
        if self._device.type == "cuda":
            sizes = packs(len(patches) // self._patches)
            parts = [self._pass(part, encode) for part in torch.split(patches, [n * self._patches for n in sizes])]
        else:
            parts = [encode(part) for part in torch.split(patches, LARGEST * self._patches)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _pass(self, patches: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        key = len(patches)
        return self._captured.run(key, encode, patches) if self._captured.repeats(key) else encode(patches)
