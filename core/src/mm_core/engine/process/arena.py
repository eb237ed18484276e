"""Media in memory that two processes share: who has which bytes, and since when nobody reads them."""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mm_core.config import EngineConfig
from mm_core.types import MediaFeature

if TYPE_CHECKING:
    from torch import Tensor

PAGE = 4096
_ALIGN = 64  # of each tensor in its slot
_BYTES_PER_SEQUENCE = 2**21
_LEAST = 2**26


def arena_bytes(config: EngineConfig) -> int:
    """Room for media of requests in the engine: as much as preprocessed media are kept, and 2 MiB a sequence. Where
    there is no GPU, only what is used takes memory."""
    wanted = config.processor_cache_size + _BYTES_PER_SEQUENCE * config.max_num_seqs
    return -(-max(wanted, _LEAST) // PAGE) * PAGE


class Allocator:
    """Pieces of [0, capacity), the first that fits; in units of PAGE. Not thread-safe."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity // PAGE * PAGE
        self._free: list[tuple[int, int]] = [(0, self.capacity)] if self.capacity else []  # (offset, size), by offset
        self._taken: dict[int, int] = {}

    @property
    def used(self) -> int:
        """Bytes taken."""
        return sum(self._taken.values())

    def allocate(self, nbytes: int) -> int | None:
        """Offset of a piece, or None where no room in one piece is left."""
        size = max(-(-nbytes // PAGE), 1) * PAGE
        for place, (offset, room) in enumerate(self._free):
            if room >= size:
                self._free[place : place + 1] = [(offset + size, room - size)] if room > size else []
                self._taken[offset] = size
                return offset
        return None

    def free(self, offset: int) -> None:
        """Give a piece back. Raises KeyError where none begins there."""
        size = self._taken.pop(offset)
        place = bisect_left(self._free, (offset, 0))
        if place < len(self._free) and offset + size == self._free[place][0]:
            size += self._free.pop(place)[1]
        if place and sum(self._free[place - 1]) == offset:
            place -= 1
            offset, before = self._free.pop(place)
            size += before
        self._free.insert(place, (offset, size))

    def check_integrity(self) -> None:
        """Raise RuntimeError where pieces overlap, are lost, or lie unmerged side by side."""
        pieces = sorted([(o, s, True) for o, s in self._free] + [(o, s, False) for o, s in self._taken.items()])
        end, was_free = 0, False
        for offset, size, is_free in pieces:
            if offset != end or size <= 0 or (is_free and was_free):
                raise RuntimeError(f"the arena's books are wrong at {offset}")
            end, was_free = offset + size, is_free
        if end != self.capacity:
            raise RuntimeError(f"the arena's books end at {end}, not {self.capacity}")


@dataclass(frozen=True)
class PlacedTensor:
    """One tensor of a slot. offset: in bytes from the slot's begin. dtype: torch's name of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(eq=False)
class Slot:
    """One item's tensors in the arena. mentions: requests that name it and of which the reader has not said that
    nothing of them is held."""

    number: int
    key: bytes
    offset: int
    nbytes: int
    tensors: tuple[PlacedTensor, ...]
    mentions: int = 0


def lay_out(tensors: Mapping[str, Tensor]) -> tuple[tuple[PlacedTensor, ...], int]:
    """Where each tensor lies in its slot, and the slot's bytes."""
    placed, end = [], 0
    for name, tensor in tensors.items():
        placed.append(PlacedTensor(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), end))
        end += -(-tensor.numel() * tensor.element_size() // _ALIGN) * _ALIGN
    return tuple(placed), end


def open_memory(nbytes: int) -> int:
    """A file that only its descriptor names, of nbytes that take no memory before they are written."""
    try:
        descriptor = os.memfd_create("mm-core-media", os.MFD_CLOEXEC)
    except (AttributeError, OSError):
        with tempfile.TemporaryFile(prefix="mm-core-media-") as file:
            descriptor = os.dup(file.fileno())
    try:
        os.ftruncate(descriptor, nbytes)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


class Arena:
    """The parent's side: copies items in, once for all requests that use them, and frees what nobody reads.

    A slot is freed when the engine's process says that it holds nothing of it any more, and has seen every request
    that names it. Thread-safe; one thread at a time may `place`.
    """

    def __init__(self, nbytes: int) -> None:
        self.descriptor = open_memory(nbytes)
        self.nbytes = nbytes
        self._memory = mmap.mmap(self.descriptor, nbytes)
        self._bytes: npt.NDArray[np.uint8] | None = np.frombuffer(self._memory, np.uint8)
        self._allocator = Allocator(nbytes)
        self._slots: dict[bytes, Slot] = {}
        self._by_number: dict[int, Slot] = {}
        self._next = 0
        self._lock = threading.Lock()

    def place(self, features: Iterable[MediaFeature]) -> dict[bytes, Slot] | None:
        """A slot for each item, by key, mentioned once more; None, and nothing changed, where they do not fit now."""
        placed: dict[bytes, Slot] = {}
        fresh: list[tuple[Slot, MediaFeature]] = []
        with self._lock:
            for feature in features:
                if feature.key in placed:
                    continue
                slot = self._slots.get(feature.key)
                if slot is None:
                    slot = self._reserve(feature)
                    if slot is None:
                        for mine, _ in fresh:
                            self._drop(mine)
                        return None
                    fresh.append((slot, feature))
                placed[feature.key] = slot
            for slot in placed.values():
                slot.mentions += 1  # from here on nobody frees it before this request was seen
        try:
            for slot, feature in fresh:
                self._copy(slot, feature)
        except BaseException:
            with self._lock:  # nobody may find what was not filled
                for slot in placed.values():
                    slot.mentions -= 1
                for slot, _ in fresh:
                    self._drop(slot)
            raise
        return placed

    def fits(self, features: Iterable[MediaFeature]) -> bool:
        """Whether they would fit if nobody else had anything here."""
        sizes = {f.key: max(-(-lay_out(f.tensors)[1] // PAGE), 1) * PAGE for f in features}
        return sum(sizes.values()) <= self._allocator.capacity

    def released(self, number: int, seen: int) -> bool:
        """The engine's process holds nothing of a slot and, since it last said so, has seen so many requests that
        name it; whether it is free now. Raises KeyError for a slot that is not there."""
        with self._lock:
            slot = self._by_number[number]
            slot.mentions -= seen
            if slot.mentions > 0:
                return False
            self._drop(slot)
            return True

    def counts(self) -> dict[str, int]:
        """Bytes there are and bytes taken, and items."""
        with self._lock:
            return {"bytes": self.nbytes, "used": self._allocator.used, "items": len(self._slots)}

    def close(self) -> None:
        """Give the memory back. Idempotent."""
        with self._lock:
            if self._bytes is None:
                return
            self._bytes = None
            with suppress(BufferError):  # a copy is under way: the memory goes with it
                self._memory.close()
            os.close(self.descriptor)

    def check_integrity(self) -> None:
        """Raise RuntimeError where the books do not fit the slots."""
        with self._lock:
            self._allocator.check_integrity()
            if {s.number for s in self._slots.values()} != set(self._by_number):
                raise RuntimeError("the arena's slots do not fit each other")

    def _reserve(self, feature: MediaFeature) -> Slot | None:
        tensors, nbytes = lay_out(feature.tensors)
        offset = self._allocator.allocate(nbytes)
        if offset is None:
            return None
        self._next += 1
        slot = Slot(self._next, feature.key, offset, nbytes, tensors)
        self._slots[feature.key] = self._by_number[slot.number] = slot
        return slot

    def _drop(self, slot: Slot) -> None:
        self._allocator.free(slot.offset)
        del self._slots[slot.key], self._by_number[slot.number]

    def _copy(self, slot: Slot, feature: MediaFeature) -> None:
        import torch

        target = self._bytes
        if target is None:  # closed
            return
        for place in slot.tensors:
            tensor = feature.tensors[place.name].detach().contiguous().reshape(-1)
            if tensor.numel():
                content = tensor.view(torch.uint8).numpy()
                begin = slot.offset + place.offset
                target[begin : begin + len(content)] = content
