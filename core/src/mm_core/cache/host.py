"""HostTier: which blocks and encoder rows lie in the host's memory, and in which slots. Bookkeeping only.

Every slot is in exactly one state:

    free       holds nothing
    storing    a copy into it is in flight: its entry is not findable yet
    ready      its entry is findable; what is least worth leaves first, but for what is held or pinned
    leaving    its entry was dropped while a copy was in flight: free when that has ended
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass

from mm_core.cache.prefix import BlockContent


@dataclass(slots=True, eq=False)
class HostEntry:
    """A block, or the rows of an item (num_rows > 0; its content has no token ids). ready: findable. holds: copies
    and steps that read it. hits: how often it was of use. num_tokens: that need not be computed where it is found; 0
    for rows."""

    content: BlockContent
    slots: tuple[int, ...]
    num_tokens: int
    num_rows: int = 0
    ready: bool = False
    gone: bool = False  # dropped while something used it
    holds: int = 0
    pins: int = 0
    hits: int = 0
    priority: float = 0.0
    stamp: int = 0  # of its place in the heap

    @property
    def key(self) -> bytes:
        """Of the block, or of the item."""
        return self.content.key

    @property
    def evictable(self) -> bool:
        """Whether it may leave for another."""
        return self.ready and not self.holds and not self.pins


# Of (tokens, encoder's cost, slots, hits, clock, stamp): what has the least leaves first. clock: the worth of what
# left last.
Worth = Callable[[int, float, int, int, float, int], float]


def _recompute_for_size(tokens: int, cost: float, slots: int, hits: int, clock: float, _: int) -> float:
    return clock + (1 + hits) * (tokens + cost) / slots


class HostTier:
    """`num_slots` slots, each as large as a KV block. Free ones are given out lowest first, so that what is stored
    together lies together. on_evict: told of each entry that leaves for want of room; on_drop: of each findable one
    that is dropped."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.worth: Worth = _recompute_for_size
        self.on_evict: Callable[[HostEntry], None] | None = None
        self.on_drop: Callable[[HostEntry], None] | None = None
        self.evicted = 0
        self.evicted_tokens = 0
        self._entries: dict[bytes, HostEntry] = {}  # storing or ready
        self._leaving: dict[bytes, HostEntry] = {}
        self._free = list(range(num_slots))  # a heap
        self._evictable = 0  # slots of evictable entries
        self._heap: list[tuple[float, int, bytes]] = []  # (priority, stamp, key), with stale ones
        self._stamps = itertools.count(1)
        self._clock = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self) -> list[HostEntry]:
        """All that were not dropped, oldest first; those that are not ready are on their way."""
        return list(self._entries.values())

    def __contains__(self, key: bytes) -> bool:
        """Whether anything lies, or is on its way, under a key: `reserve` refuses that key."""
        return key in self._entries or key in self._leaving

    @property
    def room(self) -> int:
        """Slots that `reserve` could give out."""
        return len(self._free) + self._evictable

    def find(self, key: bytes) -> HostEntry | None:
        """A findable entry."""
        entry = self._entries.get(key)
        return entry if entry is not None and entry.ready else None

    # -- in and out ------------------------------------------------------------------------

    def make_room(self, count: int) -> None:
        """Evict what is least worth until so many slots are free, as far as that goes: entries reserved one after
        the other then lie together."""
        while len(self._free) < count and self._evictable:
            self._evict_one()

    def reserve(self, content: BlockContent, num_tokens: int, count: int = 1, num_rows: int = 0) -> HostEntry | None:
        """Slots for a new entry, evicting others; None where that cannot be, or its key is taken. `land` follows."""
        if count > self.room or content.key in self:
            return None
        self.make_room(count)
        slots = tuple(heapq.heappop(self._free) for _ in range(count))
        entry = self._entries[content.key] = HostEntry(content, slots, num_tokens, num_rows)
        return entry

    def land(self, key: bytes, ok: bool) -> HostEntry | None:
        """The copy into an entry has ended; the entry, if it is findable from now on."""
        entry = self._leaving.get(key) or self._entries[key]
        if entry.ready:
            raise RuntimeError("a host entry was stored twice")
        entry.ready = True
        if not ok and not entry.gone:
            self._forget(entry)
        self._settle(entry)
        return None if entry.gone else entry

    def hold(self, key: bytes) -> HostEntry:
        """A findable entry is read from now on: its slots stay until `release`."""
        entry = self._entries[key]
        if entry.evictable:
            self._evictable -= len(entry.slots)
        entry.holds += 1
        return entry

    def release(self, key: bytes) -> None:
        """Undo one `hold`."""
        entry = self._leaving.get(key) or self._entries[key]
        if entry.holds <= 0:
            raise RuntimeError("a host entry was released twice")
        entry.holds -= 1
        self._settle(entry)

    def pin(self, key: bytes) -> bool:
        """Keep a findable entry until it was unpinned as often; False if there is none."""
        entry = self.find(key)
        if entry is None:
            return False
        if entry.evictable:
            self._evictable -= len(entry.slots)
        entry.pins += 1
        return True

    def unpin(self, key: bytes) -> None:
        """Undo one `pin`; nothing if the entry was dropped since."""
        entry = self._entries.get(key)
        if entry is not None and entry.pins:
            entry.pins -= 1
            if entry.evictable:
                self._offer(entry)

    def drop(self, key: bytes) -> bool:
        """Forget an entry, pinned or not; what a copy in flight uses stays until that has ended. False if none."""
        entry = self._entries.get(key)
        if entry is None:
            return False
        if entry.evictable:
            self._evictable -= len(entry.slots)
        self._forget(entry)
        if entry.ready:
            self._settle(entry)
            if self.on_drop is not None:
                self.on_drop(entry)
        return True

    def clear(self) -> None:
        """Drop all that is not pinned."""
        for key in [key for key, entry in self._entries.items() if not entry.pins]:
            self.drop(key)

    def _forget(self, entry: HostEntry) -> None:
        entry.gone = True
        self._leaving[entry.key] = self._entries.pop(entry.key)

    def _settle(self, entry: HostEntry) -> None:
        """Nothing may use the entry any more."""
        if entry.holds:
            return
        if entry.gone:
            del self._leaving[entry.key]
            self._give_back(entry)
        elif not entry.pins:
            self._offer(entry)

    def _give_back(self, entry: HostEntry) -> None:
        for slot in entry.slots:
            heapq.heappush(self._free, slot)

    # -- eviction --------------------------------------------------------------------------

    def _offer(self, entry: HostEntry) -> None:
        """The entry is evictable again."""
        self._evictable += len(entry.slots)
        if len(self._heap) > 2 * len(self._entries) + 64:  # mostly stale
            self._heap = [item for item in self._heap if self._is_current(item)]
            heapq.heapify(self._heap)
        entry.stamp = next(self._stamps)
        cost, slots = entry.content.encoder_cost, len(entry.slots)
        entry.priority = self.worth(entry.num_tokens, cost, slots, entry.hits, self._clock, entry.stamp)
        heapq.heappush(self._heap, (entry.priority, entry.stamp, entry.key))

    def _is_current(self, item: tuple[float, int, bytes]) -> bool:
        entry = self._entries.get(item[2])
        return entry is not None and entry.evictable and entry.stamp == item[1]

    def _evict_one(self) -> None:
        item = heapq.heappop(self._heap)
        if not self._is_current(item):
            return
        self._clock = max(self._clock, item[0])
        entry = self._entries.pop(item[2])
        self._evictable -= len(entry.slots)
        self._give_back(entry)
        self.evicted += 1
        self.evicted_tokens += entry.num_tokens
        if self.on_evict is not None:
            self.on_evict(entry)

    # -- checks ----------------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        """Slots in each state, which sum to `slots`, and entries."""
        storing = sum(len(e.slots) for e in self._entries.values() if not e.ready)
        leaving = sum(len(e.slots) for e in self._leaving.values())
        free = len(self._free)
        ready = self.num_slots - free - storing - leaving
        return {
            "slots": self.num_slots,
            "free": free,
            "storing": storing,
            "ready": ready,
            "leaving": leaving,
            "entries": len(self._entries),
            "evicted": self.evicted,
        }

    def check_integrity(self, holds: dict[bytes, int], storing: set[bytes]) -> None:
        """Raise RuntimeError unless every slot is in one state, and `holds` and `storing` are those that copies and
        steps in flight account for."""
        entries = [*self._entries.values(), *self._leaving.values()]
        slots = [*self._free, *(slot for entry in entries for slot in entry.slots)]
        if sorted(slots) != list(range(self.num_slots)):
            raise RuntimeError("a host slot is lost, or in two states")
        if {e.key: e.holds for e in entries if e.holds} != {key: n for key, n in holds.items() if n}:
            raise RuntimeError("host entries are held that nothing reads, or read without being held")
        if {e.key for e in entries if not e.ready} != storing:
            raise RuntimeError("a host entry is storing though no copy is in flight, or the reverse")
        if any(e.gone for e in self._entries.values()) or not all(e.gone for e in self._leaving.values()):
            raise RuntimeError("a host entry is findable though it was dropped, or the reverse")
        if any(e.ready and not e.holds for e in self._leaving.values()):
            raise RuntimeError("a host entry has left, its slots have not")
        evictable = [e for e in self._entries.values() if e.evictable]
        if self._evictable != sum(len(e.slots) for e in evictable):
            raise RuntimeError("evictable host slots are miscounted")
        if len(evictable) != sum(map(self._is_current, self._heap)):
            raise RuntimeError("an evictable host entry cannot be evicted")
