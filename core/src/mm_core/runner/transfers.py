"""TransfersRunner: copies of KV blocks and encoder rows between the device, slots in the host's memory, and the disk.

On a GPU nothing here waits for the device but `poll(wait=True)`. What leaves is gathered into staging before anything
of the step overwrites it; what comes back is told of only when the host knows that it is there, so that whatever is
launched afterwards may read it, and no stream waits for another. Checksums are computed, and files read and written,
by threads that never call the device. Without a GPU a copy has ended when it was launched.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch
import xxhash
from torch import Tensor

from mm_core.runner.background import Workers
from mm_core.runner.copier import Copier, CpuCopier, GpuCopier, Rows, Ticket
from mm_core.runner.host_memory import Bytes, HostMemory
from mm_core.runner.slots import SlotLayout
from mm_core.runner.spans import DeviceSpans
from mm_core.scheduler.transfers import BlockCopy, BlockRestore, BlockStore, RowStore, Spill, TransferDone, Transfers

T = TypeVar("T")
Kind = Literal["store", "row_store", "restore"]

_WAIT_S = 0.05  # at most, for threads: the engine's messages are not to wait longer
_SUMMED_TOGETHER = 8  # slots whose checksums one job computes: 8 MB or so
_SUMMING_THREADS = 8  # at most; one computes the checksums of 7 GB a second
_READING_THREADS = 4  # at most; one reads and checks a gigabyte or two a second
_by_slot = attrgetter("slot")


class Disk(Protocol):
    """The file of a `cache.disk.DiskTier`, as threads use it."""

    def write(self, spill: Spill, contents: Sequence[Bytes]) -> bool:
        """The contents of a spill's slots to its places."""

    def read(self, place: int, into: Bytes) -> bool:
        """A place's content; False where it is damaged or cannot be read."""

    def close(self) -> None:
        """Let go of the file. Idempotent."""


@dataclass(frozen=True)
class TierOptions:
    """memory: the slots. checksums: each slot's is computed when a copy has landed there, and compared when it is
    read. disk: what is behind them. store_slots, restore_slots: of staging on a GPU."""

    memory: HostMemory
    checksums: bool = False
    disk: Disk | None = None
    store_slots: int = 64
    restore_slots: int = 64

    def close(self) -> None:
        """Give memory and file back. Idempotent."""
        if self.disk is not None:
            self.disk.close()
        self.memory.close()


class _Moving:
    """A ticket and whose it is. slots: of all keys together, one each but for rows. nbytes: of each key. before:
    seconds that each took so far, or none did. checks: jobs that compute checksums. bad: damaged slots."""

    def __init__(self, kind: Kind, ticket: Ticket, keys: Sequence[bytes], slots: Sequence[int], nbytes: int) -> None:
        self.kind = kind
        self.ticket = ticket
        self.keys = keys
        self.slots = slots
        self.nbytes = nbytes
        self.before: Sequence[float] = ()
        self.checks = 0
        self.bad: set[int] = set()

    def told(self) -> list[TransferDone]:
        """What is to be told when it has ended."""
        kind, ok, nbytes, share = self.kind, not self.ticket.failed, self.nbytes, self.ticket.seconds / len(self.keys)
        if not self.bad and not self.before:
            return [TransferDone(kind, key, ok, False, nbytes, share) for key in self.keys]
        before = self.before or [0.0] * len(self.keys)
        return [
            TransferDone(kind, key, ok and slot not in self.bad, slot in self.bad, nbytes, seconds + share)
            for key, slot, seconds in zip(self.keys, self.slots, before, strict=True)
        ]


class TransfersRunner:
    """Launches what the scheduler orders, and tells of each order once. pending: orders not told of yet.

    kv_stores: the KV cache's tensors. tier: None where there is no memory behind the device: then only copies
    within it can be ordered.
    """

    def __init__(
        self,
        kv_stores: Sequence[Tensor],
        rows: Rows,
        device: torch.device,
        spans: DeviceSpans,
        tier: TierOptions | None = None,
    ) -> None:
        self.pending = 0
        self.tier = tier
        layout = SlotLayout(kv_stores)
        self.slot_bytes = layout.slot_bytes
        memory = None if tier is None else tier.memory
        on_gpu = device.type == "cuda"
        self._copier: Copier = CpuCopier(layout, memory, spans)
        if on_gpu:
            sizes = (tier.store_slots, tier.restore_slots) if tier is not None else (0, 0)
            gpu = GpuCopier(layout, memory, device, spans, *sizes)
            gpu.warm()
            self._copier = gpu
        self._rows = rows
        self._done: list[TransferDone] = []
        self._storing: deque[_Moving] = deque()
        self._restoring: deque[_Moving] = deque()
        self._arrived: list[tuple[BlockRestore, float]] = []  # read from disk, not on their way to the device yet
        self._loaded: Ticket | None = None
        self._sums = np.zeros(0 if memory is None else memory.num_slots, np.uint64)
        self._news = threading.Event()
        self._checksums = tier is not None and tier.checksums
        disk = tier is not None and tier.disk is not None
        # Without a GPU the cores are the device: what a copy costs is paid where it is made.
        half = max((os.cpu_count() or 1) // 2, 1)
        summing = min(_SUMMING_THREADS, half) if on_gpu and self._checksums else 0
        self._sum_workers = Workers("checksums", summing, self._news)
        self._readers = Workers("disk-read", min(_READING_THREADS, half) if disk else 0, self._news)
        self._writers = Workers("disk-write", 1 if disk else 0, self._news)

    @property
    def _memory(self) -> HostMemory:
        assert self.tier is not None, "nothing is ordered where there is no host tier"
        return self.tier.memory

    @property
    def _disk(self) -> Disk:
        assert self.tier is not None, "nothing is ordered where there is no host tier"
        assert self.tier.disk is not None, "files are read and written where there is a disk tier"
        return self.tier.disk

    # -- launching ---------------------------------------------------------------------------

    def launch(self, transfers: Transfers) -> None:
        """Enqueue all copies of a step, on the decoder's stream; the step comes behind them. Raises what a copy
        within the device, or a lost device, raises: all others are on their way then, or told of as failed."""
        self.pending += sum(map(len, (transfers.stores, transfers.row_stores, transfers.restores, transfers.spills)))
        if transfers.stores:
            self._launch_stores(transfers.stores)
        for order in transfers.row_stores:
            self._launch_rows(order)
        try:
            if transfers.copies:
                self._copy(transfers.copies)
        finally:
            if transfers.restores:
                self._launch_restores(transfers.restores)
            for spill in transfers.spills:
                self._launch_spill(spill)

    def _launch_stores(self, stores: Sequence[BlockStore]) -> None:
        # By slot: those side by side take one copy.
        keys, blocks, slots = zip(*sorted(stores, key=_by_slot), strict=True)
        at = 0
        for ticket in self._copier.store(blocks, slots):
            end = at + ticket.count
            self._storing.append(_Moving("store", ticket, keys[at:end], slots[at:end], self.slot_bytes))
            at = end
        self._refuse("store", keys[at:])

    def _launch_rows(self, order: RowStore) -> None:
        key, slots = order
        tickets = self._copier.store_rows(self._rows, key, slots) if key in self._rows else []
        self._storing += [_Moving("row_store", t, (key,), slots, len(slots) * self.slot_bytes) for t in tickets]
        if not tickets:
            self._refuse("row_store", (key,))

    def _refuse(self, kind: Kind, keys: Iterable[bytes]) -> None:
        """There was no room for these."""
        self._done += [TransferDone(kind, key, False) for key in keys]

    def _copy(self, copies: Sequence[BlockCopy]) -> None:
        """Whole blocks: what lies behind a copy's tokens is written before it is read."""
        self._copier.copy([order.source for order in copies], [order.target for order in copies])

    def _launch_restores(self, restores: Sequence[BlockRestore]) -> None:
        there = sorted([order for order in restores if order.place is None], key=_by_slot)
        for moving in self._restore(there):
            if self._checksums:  # beside the copies: nobody reads a block before both have ended
                self._check(moving, self._damaged, partial(self._verified, moving), moving.slots)
        for order in restores if len(there) < len(restores) else ():
            if order.place is not None:
                self._readers.submit(partial(self._read, order), partial(self._on_read, order), (False, 0.0))

    def _restore(self, orders: Sequence[BlockRestore]) -> list[_Moving]:
        """Slots to blocks."""
        if not orders:
            return []
        keys, blocks, slots, _ = zip(*orders, strict=True)
        at, moving = 0, []
        for ticket in self._copier.restore(slots, blocks):
            end = at + ticket.count
            moving.append(_Moving("restore", ticket, keys[at:end], slots[at:end], self.slot_bytes))
            at = end
        self._restoring += moving
        self._refuse("restore", keys[at:])
        return moving

    def _launch_spill(self, spill: Spill) -> None:
        nbytes = len(spill.slots) * self.slot_bytes

        def tell(result: tuple[bool, bool]) -> None:
            ok, damaged = result
            self._done.append(TransferDone("spill", spill.key, ok, damaged, nbytes))

        self._writers.submit(lambda: self._write(spill), tell, (False, False))

    def load_rows(self, slots: Sequence[int], nbytes: int) -> Tensor | None:
        """The first bytes of an item's slots, uint8 [nbytes], on the device's current stream; None where they are
        damaged. This waits for the checksums: about half a millisecond for a picture of 2,304 rows."""
        if self._checksums and self._sum_workers.share(self._damaged, slots):
            return None
        loaded, self._loaded = self._copier.load(slots, nbytes)
        return loaded

    def take_loaded(self) -> Ticket | None:
        """Ends when the last slots that `load_rows` reads were read, since the last call."""
        loaded, self._loaded = self._loaded, None
        return loaded

    # -- in threads --------------------------------------------------------------------------

    def _sum_up(self, slots: Sequence[int]) -> bool:
        for slot in slots:
            self._sums[slot] = xxhash.xxh3_64_intdigest(self._memory.memory(slot))
        return True

    def _damaged(self, slots: Sequence[int]) -> list[int]:
        memory, sums = self._memory, self._sums
        return [slot for slot in slots if xxhash.xxh3_64_intdigest(memory.memory(slot)) != sums[slot]]

    def _read(self, order: BlockRestore) -> tuple[bool, float]:
        """From disk to the slot; whether that is what was written, and the seconds it took."""
        assert order.place is not None
        begin = time.perf_counter()
        ok = self._disk.read(order.place, self._memory.memory(order.slot))
        if ok and self._checksums:
            self._sum_up([order.slot])
        return ok, time.perf_counter() - begin

    def _write(self, spill: Spill) -> tuple[bool, bool]:
        """From slots to disk; whether that is done, and whether the slots are damaged."""
        if self._checksums and self._damaged(spill.slots):
            return False, True
        return self._disk.write(spill, [self._memory.memory(slot) for slot in spill.slots]), False

    # -- what ended --------------------------------------------------------------------------

    def poll(self, wait: bool = False) -> list[TransferDone]:
        """What ended since the last call. wait: until something has, but not for long where files are read or
        written: there may be nothing then."""
        if not self.pending:
            return []
        self._news.clear()
        self._advance()
        if wait and not self._done:
            self._wait()
            self._advance()
        done, self._done = self._done, []
        self.pending -= len(done)
        return done

    def _advance(self) -> None:
        while self._storing and self._storing[0].ticket.ended():
            self._landed(self._storing.popleft())
        for workers in (self._sum_workers, self._readers, self._writers):
            workers.take()
        if self._arrived:
            arrived, self._arrived = sorted(self._arrived, key=lambda entry: entry[0].slot), []
            at, before = 0, [seconds for _, seconds in arrived]
            for moving in self._restore([order for order, _ in arrived]):
                moving.before = before[at : at + len(moving.keys)]
                at += len(moving.keys)
        while self._restoring and not self._restoring[0].checks and self._restoring[0].ticket.ended():
            self._done += self._restoring.popleft().told()

    def _wait(self) -> None:
        if self._restoring and not self._restoring[0].checks:
            self._restoring[0].ticket.wait()
        elif self._sum_workers.pending or self._readers.pending or self._writers.pending:
            self._news.wait(_WAIT_S)
        elif self._storing:
            self._storing[0].ticket.wait()

    def _landed(self, moving: _Moving) -> None:
        """Slots hold what was stored, unless it failed."""
        if self._checksums and not moving.ticket.failed:
            self._check(moving, self._sum_up, partial(self._summed, moving), False)
        else:
            self._done += moving.told()

    def _summed(self, moving: _Moving, ok: bool) -> None:
        moving.checks -= 1
        moving.ticket.failed |= not ok
        if not moving.checks:
            self._done += moving.told()

    def _verified(self, moving: _Moving, bad: Sequence[int]) -> None:
        moving.checks -= 1
        moving.bad.update(bad)

    def _check(
        self, moving: _Moving, work: Callable[[Sequence[int]], T], tell: Callable[[T], None], otherwise: T
    ) -> None:
        for at in range(0, len(moving.slots), _SUMMED_TOGETHER):
            moving.checks += 1
            self._sum_workers.submit(partial(work, moving.slots[at : at + _SUMMED_TOGETHER]), tell, otherwise)

    def _on_read(self, order: BlockRestore, result: tuple[bool, float]) -> None:
        ok, seconds = result
        if ok:
            self._arrived.append((order, seconds))
        else:
            self._done.append(TransferDone("restore", order.key, False, True, seconds=seconds))

    # -- the end -----------------------------------------------------------------------------

    def contents(self, blocks: Sequence[int]) -> Iterator[Bytes]:
        """What blocks hold, in order, while nothing else runs."""
        return self._copier.contents(blocks)

    def slot_content(self, slot: int) -> Bytes | None:
        """What a slot holds, while nothing else runs; None where it is damaged."""
        damaged = self._checksums and self._damaged([slot])
        return None if damaged else self._memory.memory(slot)

    def close(self) -> None:
        """End the threads and let go of the memory. The device must be done."""
        for workers in (self._sum_workers, self._readers, self._writers):
            workers.close()
        self._copier.close()
        self._storing.clear()
        self._restoring.clear()
        if self.tier is not None:
            self.tier.close()
