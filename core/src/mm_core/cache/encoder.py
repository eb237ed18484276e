"""EncoderCache: which items' encoder rows are on the device. Bookkeeping only, no tensors.

An item some sequence still needs is never evicted. Of the others the one goes first that is
cheapest to make again for the room it takes, with recency as in GreedyDual-Size (Cao and Irani,
1997): priority = clock + cost / rows, the clock being the priority of the last one evicted.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field


@dataclass
class EncoderEntry:
    """One item's rows; `holders` are the ids of sequences that still need them."""

    rows: int
    cost: int
    priority: float
    holders: set[int] = field(default_factory=set)


class EncoderCache:
    """`capacity` rows of encoder output, keyed by media key."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self.hits = 0
        self.misses = 0
        self._clock = 0.0
        self._entries: dict[bytes, EncoderEntry] = {}
        self._evicted: list[bytes] = []

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def acquire(self, key: bytes, holder: int) -> None:
        """One more holder of a present item (idempotent for the same holder)."""
        entry = self._entries[key]
        if holder not in entry.holders:
            self.hits += 1
            entry.holders.add(holder)
            entry.priority = self._clock + entry.cost / entry.rows

    def has_room(self, rows: int, keep: Set[bytes]) -> bool:
        """Whether `rows` more fit beside what is held and the items in `keep`."""
        fixed = sum(e.rows for k, e in self._entries.items() if e.holders or k in keep)
        return rows <= self.capacity - fixed

    def allocate(self, key: bytes, rows: int, cost: int, holder: int) -> bool:
        """Room for a new item, evicting unheld ones; False if even that does not make enough."""
        if not self.has_room(rows, frozenset()):
            return False
        while self.used + rows > self.capacity:
            self._evict_one()
        self.misses += 1
        self.used += rows
        self._entries[key] = EncoderEntry(rows, cost, self._clock + cost / max(rows, 1), {holder})
        return True

    def _evict_one(self) -> None:
        key = min((k for k, e in self._entries.items() if not e.holders), key=lambda k: self._entries[k].priority)
        self._clock = self._entries[key].priority
        self.discard(key)

    def release(self, key: bytes, holder: int) -> None:
        """The holder needs the item no more; it stays until room is wanted."""
        entry = self._entries.get(key)
        if entry is not None:
            entry.holders.discard(holder)

    def discard(self, key: bytes) -> None:
        """Forget an item now (evicted, or its encoding failed)."""
        self.used -= self._entries.pop(key).rows
        self._evicted.append(key)

    def take_evicted(self) -> list[bytes]:
        """Keys evicted since the last call: the runner drops their rows."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def check_integrity(self, holders: set[int]) -> None:
        """Raise RuntimeError if the room is miscounted or a holder is not among the live `holders`."""
        if self.used != sum(e.rows for e in self._entries.values()) or self.used > self.capacity:
            raise RuntimeError(f"encoder cache counts {self.used} rows of {self.capacity}")
        stray = {h for e in self._entries.values() for h in e.holders} - holders
        if stray:
            raise RuntimeError(f"encoder cache entries held by sequences that are gone: {sorted(stray)[:8]}")
