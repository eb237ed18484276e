"""Where the content of a KV block lies in a slot, and copies between blocks and slots of one device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGN = 64  # bytes: of a slot and of its parts


@dataclass(frozen=True)
class _Part:
    """words: a store as [layers, 2, num_blocks, W]. begin: of its share of a slot, in words."""

    words: Tensor
    begin: int

    def of(self, slots: Tensor) -> Tensor:
        """[layers, 2, n, W]: the part in slots, [n, slot words]."""
        layers, kinds, _, width = self.words.shape
        mine = slots[:, self.begin : self.begin + layers * kinds * width]
        return mine.view(-1, layers, kinds, width).permute(1, 2, 0, 3)


class SlotLayout:
    """One block of every store, [layers, 2, num_blocks, ...] each, one after another.

    Copies are of words of eight bytes, where all are so long: few operations take an fp8 tensor.
    """

    def __init__(self, stores: Sequence[Tensor]) -> None:
        rows = [math.prod(store.shape[3:]) * store.element_size() for store in stores]
        self._word = torch.uint8 if any(row % 8 for row in rows) else torch.int64
        self._parts: list[_Part] = []
        at = 0
        for store, row in zip(stores, rows, strict=True):
            self._parts.append(_Part(store.flatten(3).view(self._word), at // self._word.itemsize))
            at += _aligned(store.shape[0] * store.shape[1] * row)
        self.slot_bytes = at

    def gather(self, blocks: Tensor, slots: Tensor) -> None:
        """Blocks' contents to slots. blocks: [n] int64; slots: uint8 [n, slot_bytes], on the stores' device."""
        words = slots.view(self._word)
        for part in self._parts:
            torch.index_select(part.words, 2, blocks, out=part.of(words))

    def scatter(self, slots: Tensor, blocks: Tensor) -> None:
        """Slots' contents to blocks, as `gather`."""
        words = slots.view(self._word)
        for part in self._parts:
            part.words.index_copy_(2, blocks, part.of(words))

    def read(self, block: int, slot: Tensor) -> None:
        """One block's content to a slot, uint8 [slot_bytes], in the host's memory."""
        words = slot.view(1, -1).view(self._word)
        for part in self._parts:
            part.of(words)[:, :, 0].copy_(part.words[:, :, block])

    def write(self, slot: Tensor, block: int) -> None:
        """A slot's content to one block, as `read`."""
        words = slot.view(1, -1).view(self._word)
        for part in self._parts:
            part.words[:, :, block].copy_(part.of(words)[:, :, 0])

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        """Whole blocks to other blocks of the same device, [n] int64 each; no target is a source."""
        for part in self._parts:
            part.words.index_copy_(2, targets, part.words.index_select(2, sources))


def _aligned(count: int) -> int:
    return -(-count // ALIGN) * ALIGN
