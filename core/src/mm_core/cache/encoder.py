"""EncoderCache: which items' encoder rows are on the device. Bookkeeping only, no tensors.

Every item is in exactly one state:

    held     a sequence reads it, a step in flight may read or write it, or it is pinned: it stays
    kept     waiting for a sequence that will need it: it leaves only for one that needs room now
    loose    nobody needs it; evicted first

Of the loose ones goes first what is worth least: by itself the cache weighs what making it again costs for the room
it takes, with recency as in GreedyDual-Size (Cao and Irani, 1997); the scheduler puts its policy's word for that. Of
the kept ones the newest goes first.

So rows are given to another item only after the last step that reads them has completed, and what
is encoded ahead of need never keeps a running sequence from its own media.
"""

from __future__ import annotations

import enum
import heapq
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

# Worth of an item that nobody needs: of its cost, its rows, how often it was found, the worth of what was evicted
# last, and a number that grows with every use.
RowsWorth = Callable[[float, int, int, float, int], float]


def by_cost_for_room(cost: float, rows: int, hits: int, clock: float, stamp: int) -> float:  # noqa: ARG001
    """GreedyDual-Size."""
    return clock + cost / max(rows, 1)


class _State(enum.IntEnum):
    HELD = 0
    KEPT = 1
    LOOSE = 2


@dataclass(slots=True)
class EncoderEntry:
    """One item's rows. holders: ids of sequences that read them; keepers: of those that will."""

    rows: int
    cost: int
    holders: set[int] = field(default_factory=set)
    keepers: set[int] = field(default_factory=set)
    state: _State = _State.LOOSE
    hits: int = 0
    stamp: int = 0  # of its place among the loose ones
    pinned: bool = False  # stays as if somebody held it


class RowsObserver(Protocol):
    """Told of the items whose rows come and go, in the engine's loop."""

    def encoded(self, key: bytes, rows: int) -> None:
        """The step that made an item's rows is done (and may have failed: then `dropped` follows)."""

    def dropped(self, key: bytes, rows: int, cost: int, evicted: bool) -> None:
        """The rows are not there any more. evicted: for want of room; no step in flight touches them, and the step
        that is being scheduled can read them before it drops them. Else they were given up, or never came."""


class EncoderCache:
    """`capacity` rows of encoder output, keyed by media key. observers: told of what comes and goes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.hits = 0
        self.misses = 0
        self.hit_rows = 0
        self.evicted_items = 0
        self.evicted_rows = 0
        self.observers: list[RowsObserver] = []
        self.on_yield: Callable[[bytes], None] | None = None  # told of an item that is not pinned any more
        self.worth: RowsWorth = by_cost_for_room
        self._clock = 0.0
        self._entries: dict[bytes, EncoderEntry] = {}  # in order of their encoding
        self._rows = [0, 0, 0]  # by state
        self._pinned_rows = 0
        self._busy: dict[bytes, int] = {}  # item → the step that must complete before it may go
        self._last_step = 0  # the newest in flight, 0 if none is
        self._loose: list[tuple[float, int, bytes]] = []  # heap of (worth, stamp, key), with stale ones
        self._stamps = itertools.count(1)
        self._evicted: list[bytes] = []

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def used(self) -> int:
        """Rows taken."""
        return sum(self._rows)

    @property
    def room(self) -> int:
        """Rows that a sequence which runs now can have beside what is held."""
        return self.capacity - self._rows[_State.HELD]

    def is_held(self, key: bytes) -> bool:
        """Whether an item is there and stays: another holder takes no room."""
        entry = self._entries.get(key)
        return entry is not None and entry.state is _State.HELD

    # -- who needs what --------------------------------------------------------------------

    def acquire(self, key: bytes, holder: int) -> None:
        """One more holder of a present item (idempotent for the same holder)."""
        entry = self._entries[key]
        if holder not in entry.holders:
            self._count_hit(entry, holder)
            entry.holders.add(holder)
            entry.keepers.discard(holder)
            self._settle(key, entry)

    def keep(self, key: bytes, keeper: int) -> None:
        """One more sequence that will need a present item (idempotent)."""
        entry = self._entries[key]
        if keeper not in entry.holders and keeper not in entry.keepers:
            self._count_hit(entry, keeper)
            entry.keepers.add(keeper)
            self._settle(key, entry)

    def _count_hit(self, entry: EncoderEntry, who: int) -> None:
        if who not in entry.keepers:
            self.hits += 1
            self.hit_rows += entry.rows
            entry.hits += 1

    def release(self, key: bytes, holder: int) -> None:
        """A holder or keeper needs the item no more, and no step in flight reads it for that one."""
        entry = self._entries.get(key)
        if entry is not None:
            entry.holders.discard(holder)
            entry.keepers.discard(holder)
            self._settle(key, entry)

    def abandon(self, key: bytes, holder: int) -> None:
        """As `release`, but a step in flight may still read the item: it stays until that completes."""
        entry = self._entries.get(key)
        if entry is not None and self._last_step and holder in entry.holders:
            self._busy[key] = self._last_step
        self.release(key, holder)

    def _settle(self, key: bytes, entry: EncoderEntry) -> None:
        """Put an entry into the state that follows from who needs it."""
        state = self._state_of(key, entry)
        if state is not entry.state:
            self._rows[entry.state] -= entry.rows
            self._rows[state] += entry.rows
            entry.state = state
            if state is _State.LOOSE:
                self._push_loose(key, entry)

    def _state_of(self, key: bytes, entry: EncoderEntry) -> _State:
        if entry.holders or entry.pinned or key in self._busy:
            return _State.HELD
        return _State.KEPT if entry.keepers else _State.LOOSE

    def keys(self) -> list[bytes]:
        """All items, in order of their encoding."""
        return list(self._entries)

    def rows_of(self, key: bytes) -> int:
        """Rows of a present item."""
        return self._entries[key].rows

    def ready(self) -> list[bytes]:
        """Items whose rows no step in flight makes any more."""
        return [key for key in self._entries if key not in self._busy]

    def pin(self, key: bytes) -> None:
        """Keep a present item until it is unpinned, whoever needs room. The caller bounds this. Idempotent."""
        self._set_pinned(key, True)

    def unpin(self, key: bytes) -> None:
        """Undo `pin`."""
        self._set_pinned(key, False)

    def is_pinned(self, key: bytes) -> bool:
        """Whether an item is there and pinned."""
        entry = self._entries.get(key)
        return entry is not None and entry.pinned

    def make_way(self, wanted: Mapping[bytes, int]) -> None:
        """Unpin others, the oldest first, until these items (key → rows) could be held together beside what is
        pinned: whoever needs them would wait for ever otherwise. Nothing is evicted for it yet."""
        limit = self.capacity - sum(rows for key, rows in wanted.items() if not self.is_pinned(key))
        if self._pinned_rows <= limit:
            return
        for key in [key for key, entry in self._entries.items() if entry.pinned and key not in wanted]:
            self._set_pinned(key, False)
            if self.on_yield is not None:
                self.on_yield(key)
            if self._pinned_rows <= limit:
                return

    def _set_pinned(self, key: bytes, pinned: bool) -> None:
        entry = self._entries[key]
        self._pinned_rows += entry.rows * (pinned - entry.pinned)
        entry.pinned = pinned
        self._settle(key, entry)

    def _push_loose(self, key: bytes, entry: EncoderEntry) -> None:
        if len(self._loose) > 2 * len(self._entries) + 64:  # mostly stale
            self._loose = [item for item in self._loose if self._is_current(item)]
            heapq.heapify(self._loose)
        entry.stamp = next(self._stamps)
        worth = self.worth(entry.cost, entry.rows, entry.hits, self._clock, entry.stamp)
        heapq.heappush(self._loose, (worth, entry.stamp, key))

    def _is_current(self, item: tuple[float, int, bytes]) -> bool:
        entry = self._entries.get(item[2])
        return entry is not None and entry.state is _State.LOOSE and entry.stamp == item[1]

    # -- room ------------------------------------------------------------------------------

    def allocate(self, key: bytes, rows: int, cost: int, holder: int, step: int) -> bool:
        """Room for a new item that `step` encodes and reads, evicting loose and kept ones; False if too little."""
        if rows > self.room:
            return False
        self._insert(key, EncoderEntry(rows, cost, holders={holder}), step)
        return True

    def allocate_ahead(self, key: bytes, rows: int, cost: int, keeper: int, step: int) -> bool:
        """Room for a new item that `step` encodes for later, evicting loose ones; False if too little."""
        if rows > self.room - self._rows[_State.KEPT]:
            return False
        self._insert(key, EncoderEntry(rows, cost, keepers={keeper}), step)
        return True

    def _insert(self, key: bytes, entry: EncoderEntry, step: int) -> None:
        while self.used + entry.rows > self.capacity:
            self._evict_one()
        self.misses += 1
        entry.state = _State.HELD
        self._rows[_State.HELD] += entry.rows
        self._entries[key] = entry
        self._busy[key] = step

    def _evict_one(self) -> None:
        while self._loose:
            item = heapq.heappop(self._loose)
            if self._is_current(item):
                self._clock = max(self._clock, item[0])
                self._remove(item[2], evicted=True)
                return
        self._remove(next(k for k in reversed(self._entries) if self._entries[k].state is _State.KEPT), evicted=True)

    def discard(self, key: bytes) -> None:
        """Forget an item now (its encoding failed), whoever holds it."""
        self._remove(key, evicted=False)

    def drop(self, key: bytes) -> bool:
        """Forget an item that nobody holds; False if it is not there, or held."""
        if key not in self._entries or self._entries[key].state is _State.HELD:
            return False
        self._remove(key, evicted=False)
        return True

    def _remove(self, key: bytes, *, evicted: bool) -> None:
        entry = self._entries.pop(key)
        self._rows[entry.state] -= entry.rows
        self._pinned_rows -= entry.rows * entry.pinned
        self._busy.pop(key, None)
        self._evicted.append(key)
        if evicted:
            self.evicted_items += 1
            self.evicted_rows += entry.rows
        for observer in self.observers:
            observer.dropped(key, entry.rows, entry.cost, evicted)

    def take_evicted(self) -> list[bytes]:
        """Keys evicted since the last call: the runner drops their rows."""
        evicted, self._evicted = self._evicted, []
        return evicted

    # -- steps -----------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        """A step that may read any held item was launched."""
        self._last_step = step

    def complete_step(self, step: int) -> None:
        """The step and all before it are done."""
        if step >= self._last_step:
            self._last_step = 0
        for key in [key for key, last in self._busy.items() if last <= step]:
            del self._busy[key]
            self._settle(key, self._entries[key])
            for observer in self.observers:
                observer.encoded(key, self._entries[key].rows)

    def check_integrity(self, holders: set[int]) -> None:
        """Raise RuntimeError if the room is miscounted or a holder is not among the live `holders`."""
        rows = [sum(e.rows for e in self._entries.values() if e.state is state) for state in _State]
        if rows != self._rows or self.used > self.capacity:
            raise RuntimeError(f"encoder cache counts {self._rows} rows by state, holds {rows} of {self.capacity}")
        if self._pinned_rows != sum(e.rows for e in self._entries.values() if e.pinned):
            raise RuntimeError("pinned encoder rows are miscounted")
        for key, entry in self._entries.items():
            if entry.state is not self._state_of(key, entry):
                raise RuntimeError(f"an encoder cache entry is in state {entry.state.name} by mistake")
        loose = sum(e.state is _State.LOOSE for e in self._entries.values())
        if loose != sum(map(self._is_current, self._loose)):
            raise RuntimeError("a loose encoder cache entry cannot be evicted")
        stray = {h for e in self._entries.values() for h in e.holders | e.keepers} - holders
        if stray:
            raise RuntimeError(f"encoder cache entries held by sequences that are gone: {sorted(stray)[:8]}")
