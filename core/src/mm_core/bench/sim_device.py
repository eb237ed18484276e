"""VirtualDevice: a device that computes nothing and copies nothing, but says when it would have."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Sequence

from mm_core.bench.sim_costs import SimCosts
from mm_core.cache.disk_file import DiskFile, Record
from mm_core.scheduler.sequence import ScheduledBatch
from mm_core.scheduler.transfers import TransferDone, Transfers


class NoFile(DiskFile):
    """A disk tier's file that holds nothing and takes everything: its books are the real ones."""

    def __init__(self, num_places: int) -> None:
        self.num_places = num_places

    def records(self) -> dict[int, Record]:
        """None."""
        return {}

    def erase(self, places: Sequence[int]) -> None:
        """Nothing is there."""

    def close(self) -> None:
        """Nothing is open."""


class _Lane:
    """Copies one after another."""

    def __init__(self, bandwidth: float, latency: float) -> None:
        self._bandwidth = bandwidth
        self._latency = latency
        self._free = 0.0

    def copy(self, start: float, nbytes: int) -> float:
        """When a copy ends that is asked for at `start`. Those that wait for others have no latency of their own."""
        begin = start + self._latency if start >= self._free else self._free
        self._free = begin + nbytes / self._bandwidth
        return self._free


class VirtualDevice:
    """Steps run one after another; copies beside them, each direction and the disk by itself.

    staging_slots: that may be on their way to the host; what is stored while there is no room for it is lost, as in
    the engine. Encoder and decoder share the device: the step waits for what it encodes.
    """

    def __init__(self, costs: SimCosts, block_size: int, staging_slots: int) -> None:
        self.costs = costs
        self.busy_seconds = 0.0
        self.encoder_seconds = 0.0
        self.copied = {"store": 0, "restore": 0, "disk_read": 0, "disk_write": 0}  # bytes
        self.slot_bytes = costs.kv_bytes * block_size
        self.free_at = 0.0
        self._stores = _Lane(costs.store_bandwidth, costs.copy_latency)
        self._restores = _Lane(costs.restore_bandwidth, costs.copy_latency)
        self._reads = _Lane(costs.disk_read_bandwidth, costs.disk_latency)
        self._writes = _Lane(costs.disk_write_bandwidth, costs.disk_latency)
        self._staging = staging_slots * self.slot_bytes
        self._staged = 0  # bytes on their way to the host
        self._pending: list[tuple[float, int, TransferDone]] = []
        self._numbers = itertools.count()

    @property
    def pending(self) -> int:
        """Copies that have not been told of."""
        return len(self._pending)

    @property
    def next_end(self) -> float:
        """When the next of them ends."""
        return self._pending[0][0]

    def poll(self, now: float) -> list[TransferDone]:
        """Copies that have ended by now."""
        done = []
        while self._pending and self._pending[0][0] <= now:
            told = heapq.heappop(self._pending)[2]
            if told.kind in ("store", "row_store") and told.ok:
                self._staged -= told.nbytes
            done.append(told)
        return done

    def launch(self, batch: ScheduledBatch, now: float) -> float:
        """When the step ends."""
        start = max(now, self.free_at)
        self._order(batch.transfers, now, start)
        stored = sum(len(item.stored) for item in batch.encode) * self.slot_bytes
        self.copied["restore"] += stored
        encode = sum(self.costs.encode(item.feature.info["cost"]) for item in batch.encode if not item.stored)
        seconds = self.costs.step(batch) + encode + stored / self.costs.restore_bandwidth
        self.busy_seconds += seconds
        self.encoder_seconds += encode
        self.free_at = start + seconds
        return self.free_at

    def _order(self, transfers: Transfers, now: float, start: float) -> None:
        """Stores are read when the step starts, restores begin at once: their blocks are nobody's."""
        self._store("store", ((s.key, 1) for s in transfers.stores), start)
        self._store("row_store", ((s.key, len(s.slots)) for s in transfers.row_stores), start)
        size = self.slot_bytes
        share = self.costs.copy_latency / max(len(transfers.restores), 1)
        for key, _, _, place in transfers.restores:
            ready, seconds = now, share + size / self.costs.restore_bandwidth
            if place is not None:
                ready = self._reads.copy(now, size)
                seconds += size / self.costs.disk_read_bandwidth
                self.copied["disk_read"] += size
            self.copied["restore"] += size
            # Each tells of its own share of the time, as in the engine: not of those before it.
            self._tell(self._restores.copy(ready, size), TransferDone("restore", key, nbytes=size, seconds=seconds))
        for spill in transfers.spills:
            nbytes = size * len(spill.slots)
            self.copied["disk_write"] += nbytes
            self._tell(self._writes.copy(now, nbytes), TransferDone("spill", spill.key, nbytes=nbytes))

    def _store(self, kind: str, items: Iterable[tuple[bytes, int]], start: float) -> None:
        for key, slots in items:
            nbytes = slots * self.slot_bytes
            fits = self._staged + nbytes <= self._staging
            done = TransferDone("store" if kind == "store" else "row_store", key, ok=fits, nbytes=nbytes)
            if not fits:
                self._tell(start, done)
                continue
            self._staged += nbytes
            self.copied["store"] += nbytes
            self._tell(self._stores.copy(start, nbytes), done)

    def _tell(self, at: float, done: TransferDone) -> None:
        heapq.heappush(self._pending, (at, next(self._numbers), done))
