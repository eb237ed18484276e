"""Slots in the host's memory, pinned where a GPU copies from and to them."""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mm_core.errors import OutOfMemoryError

SEGMENT_BYTES = 2**30  # is pinned at a time: a tenth of a second, so that Ctrl-C is heard and progress shown

_FILLERS = min(8, os.cpu_count() or 1)

Bytes = memoryview


class Run(NamedTuple):
    """Slots that lie one after another: first of them in the list that was asked for, and their memory, uint8
    [count, slot_bytes]."""

    first: int
    memory: Tensor


class HostMemory:
    """`num_slots` slots of `slot_bytes` in `nbytes` of memory. A GPU's is pinned; other memory takes no room before
    it is written.

    told: gets the bytes that are ready, now and then. Raises OutOfMemoryError where the host has too little.
    """

    def __init__(
        self, nbytes: int, slot_bytes: int, *, pinned: bool = False, told: Callable[[int], None] | None = None
    ) -> None:
        self.slot_bytes = slot_bytes
        self.num_slots = nbytes // slot_bytes
        self._pinned = pinned
        check_available(nbytes)
        self._segments: list[Tensor] = []
        self._bytes: list[np.ndarray[Any, Any]] = []
        each = max(SEGMENT_BYTES // slot_bytes, 1)
        self._begins = list(range(0, self.num_slots, each))  # of each segment, its first slot
        try:
            for begin in self._begins:
                self._add(min(each, self.num_slots - begin))
                if told is not None:
                    told(sum(segment.numel() for segment in self._segments))
        except BaseException:
            self.close()
            raise

    def _add(self, count: int) -> None:
        size = count * self.slot_bytes
        try:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise self._refused(size) from error
        with suppress(AttributeError, OSError):  # fewer pages are pinned, and copied from, in less time
            memory.madvise(mmap.MADV_HUGEPAGE)
        array = np.frombuffer(memory, np.uint8)
        if self._pinned:
            _touch(array)
            if not _pin(array):
                raise self._refused(size)
        self._bytes.append(array.reshape(count, self.slot_bytes))
        self._segments.append(torch.from_numpy(self._bytes[-1]))

    def _refused(self, size: int) -> OutOfMemoryError:
        pinned = ", pinned for the GPU" if self._pinned else ""
        return OutOfMemoryError(
            f"The host would not give {size / 2**30:.1f} GiB more of memory for the host cache{pinned}. Lower "
            "KvCacheConfig(host_cache_size=...), or end other programs."
        )

    def _place(self, slot: int) -> tuple[int, int]:
        segment = bisect_right(self._begins, slot) - 1
        return segment, slot - self._begins[segment]

    def slot(self, slot: int) -> Tensor:
        """uint8 [slot_bytes]."""
        segment, index = self._place(slot)
        return self._segments[segment][index]

    def memory(self, slot: int) -> Bytes:
        """The same for threads, which never call torch."""
        segment, index = self._place(slot)
        return memoryview(self._bytes[segment][index])

    def runs(self, slots: Sequence[int]) -> Iterator[Run]:
        """The slots in order, as few runs as they make."""
        first, count = 0, len(slots)
        while first < count:
            segment, index = self._place(slots[first])
            held = self._segments[segment]
            most = min(len(held) - index, count - first)
            length = 1
            while length < most and slots[first + length] == slots[first] + length:
                length += 1
            yield Run(first, held[index : index + length])
            first += length

    def close(self) -> None:
        """Give the memory back: no copy may be on its way. Idempotent."""
        if self._pinned:
            for array in self._bytes:
                unpin(array)
        self._segments.clear()
        self._bytes.clear()
        self.num_slots = 0


def _touch(array: np.ndarray[Any, Any]) -> None:
    """Have the system give the memory, by several threads: pinning then takes a third of the time."""
    with ThreadPoolExecutor(_FILLERS) as threads:
        list(threads.map(lambda part: part.fill(0), np.array_split(array, _FILLERS)))


def _pin(array: np.ndarray[Any, Any]) -> bool:
    """Whether the GPU may copy from and to it. torch's own pinned memory is of sizes that are powers of two, takes
    four times as long, and is not given back."""
    refused = int(torch.cuda.cudart().cudaHostRegister(array.ctypes.data, array.nbytes, 0))  # type: ignore[no-untyped-call]
    if refused:
        with suppress(RuntimeError):  # the refusal must not be taken for a later call's
            torch.zeros(1, device="cuda")
    return not refused


def pin(array: np.ndarray[Any, Any]) -> bool:
    """Take all of the memory, and let the GPU copy from and to it; whether the system allows that."""
    _touch(array)
    return _pin(array)


def unpin(array: np.ndarray[Any, Any]) -> None:
    """Undo `pin`: no copy may be on its way."""
    torch.cuda.cudart().cudaHostUnregister(array.ctypes.data)  # type: ignore[no-untyped-call]


def check_available(nbytes: int) -> None:
    """Raise OutOfMemoryError where the host has less memory to give: the system would end this process later."""
    available = available_bytes()
    if available is not None and nbytes > available:
        raise OutOfMemoryError(
            f"KvCacheConfig(host_cache_size={nbytes}) wants {nbytes / 2**30:.1f} GiB of the host's memory; "
            f"{available / 2**30:.1f} GiB are free. Lower it, or end other programs."
        )


def available_bytes() -> int | None:
    """Memory that the host, or this process' control group, has left; None where nobody says."""
    found = []
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        # What files take of it is given up when programs want it.
        stat = dict(line.split()[:2] for line in _read("/sys/fs/cgroup/memory.stat").splitlines() if " " in line)
        found.append(int(limit) - int(used) + int(stat.get("inactive_file", 0)))
    return min(found, default=None)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
