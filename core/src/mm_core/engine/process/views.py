"""The engine's side of the arena: tensors that lie in shared memory, and word to the parent when they are gone."""

from __future__ import annotations

import mmap
import os
import queue
import threading
import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm_core.engine.process.arena import PlacedTensor
from mm_core.engine.process.wire import ProtocolError, WireFeature
from mm_core.runner.host_memory import pin, unpin

Bytes = np.ndarray[Any, Any]


class _Viewed:
    """A slot that something here reads, or read: `memory` dies with the last tensor made of it."""

    def __init__(self) -> None:
        self.memory: weakref.ref[Bytes] | None = None
        self.seen = 0


class ArenaViews:
    """Tensors of slots. What is held of a slot is one array; every tensor of it keeps that alive, however it was
    copied on, so no slot is given back that anything in this process can still read on the host.

    gone: gets a slot's number when its array dies, in whatever thread that is; then call `released`.
    """

    def __init__(self, descriptor: int, nbytes: int, gone: queue.SimpleQueue[int]) -> None:
        os.set_inheritable(descriptor, False)
        self._memory = mmap.mmap(descriptor, nbytes)
        self._all: Bytes = np.frombuffer(self._memory, np.uint8)
        self._gone = gone
        self._slots: dict[int, _Viewed] = {}
        self._lock = threading.Lock()
        self._pinned = False

    def tensors(self, feature: WireFeature) -> Mapping[str, Tensor]:
        """The item's tensors, where it came with any. Raises ProtocolError for a slot outside the arena."""
        if not feature.number:
            return {}
        if feature.offset < 0 or feature.nbytes < 0 or feature.offset + feature.nbytes > len(self._all):
            raise ProtocolError("a slot outside the arena")
        with self._lock:
            viewed = self._slots.setdefault(feature.number, _Viewed())
            viewed.seen += 1
            memory = None if viewed.memory is None else viewed.memory()
            if memory is None:
                memory = self._all[feature.offset : feature.offset + feature.nbytes]
                # A queue may be put to from anywhere, a finaliser that interrupts its own thread included.
                viewed.memory = weakref.ref(memory, partial(_tell, self._gone, feature.number))
        # torch holds `memory` itself, and all that is cut from `flat` holds what torch made of it.
        flat = torch.from_numpy(memory)
        return {t.name: _cut(flat, PlacedTensor(t.name, t.dtype, tuple(t.shape), t.offset)) for t in feature.tensors}

    def released(self, number: int) -> tuple[int, int] | None:
        """(number, requests since the last word that named it) of a slot that nothing is held of; None where
        something is again."""
        with self._lock:
            viewed = self._slots.get(number)
            if viewed is None or (viewed.memory is not None and viewed.memory() is not None):
                return None
            del self._slots[number]
            return number, viewed.seen

    def pin(self) -> bool:
        """Let the GPU copy from the arena by itself; whether the system allowed it. Takes all of its memory."""
        self._pinned = pin(self._all)
        return self._pinned

    def close(self) -> None:
        """Undo `pin`: no copy may be on its way. Idempotent."""
        if self._pinned:
            self._pinned = False
            unpin(self._all)


def _tell(gone: queue.SimpleQueue[int], number: int, _: object) -> None:
    gone.put(number)


def _cut(flat: Tensor, place: PlacedTensor) -> Tensor:
    dtype = getattr(torch, place.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ProtocolError(f"no dtype {place.dtype[:20]}")
    count = 1
    for size in place.shape:
        count *= size
    end = place.offset + count * dtype.itemsize
    if min((place.offset, count, *place.shape)) < 0 or end > flat.numel():
        raise ProtocolError("a tensor outside its slot")
    return flat[place.offset : end].view(dtype).view(place.shape)
