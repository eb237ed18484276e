"""DiskTier: which blocks and encoder rows lie on disk, and where. The books of one `DiskFile`.

Every place is in exactly one state:

    free      holds nothing
    writing   its entry is reserved: not findable before `commit`
    ready     its entry is findable; what was not used for longest leaves first, but for what is held
    leaving   its entry was dropped while it was read: free with `release`
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mm_core.cache.disk_file import MAX_KEY, DiskFile, DiskIdentity, Record


@dataclass(slots=True, eq=False)
class DiskEntry:
    """A block, or an item's rows (num_rows > 0). holds: reads on their way."""

    key: bytes
    places: tuple[int, ...]
    token_ids: tuple[int, ...]
    num_rows: int
    stamp: int
    holds: int = 0


class Spilled(Protocol):
    """An entry that is written (`scheduler.transfers.Spill`)."""

    @property
    def key(self) -> bytes:
        """Of the block, or of the item."""

    @property
    def places(self) -> tuple[int, ...]:
        """Reserved for it."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of a block."""

    @property
    def num_rows(self) -> int:
        """Of an item."""


class DiskTier:
    """Called by the engine's loop, but for `write` and `read`, which threads call, on places of their own."""

    def __init__(self, file: DiskFile) -> None:
        self.evicted = 0
        self.on_gone: Callable[[DiskEntry], None] | None = None  # told of what is not findable any more
        self._file = file
        self._writing: dict[bytes, DiskEntry] = {}
        self._ready: OrderedDict[bytes, DiskEntry] = OrderedDict()  # least recently used first
        self._leaving: dict[bytes, list[DiskEntry]] = {}
        self._refused = False  # the disk takes no more
        self._stamp = 0
        self._load()
        taken = {place for entry in self._ready.values() for place in entry.places}
        self._free = [place for place in reversed(range(file.num_places)) if place not in taken]  # a stack

    @classmethod
    def open(cls, directory: str, size: int, identity: DiskIdentity, slot_bytes: int) -> DiskTier | None:
        """See `DiskFile.open`."""
        file = DiskFile.open(directory, size, identity, slot_bytes)
        return None if file is None else cls(file)

    def _load(self) -> None:
        """Entries whose parts are all there, and of the same writing."""
        parts: dict[tuple[bytes, int], dict[int, tuple[int, Record]]] = {}
        for place, record in self._file.records().items():
            parts.setdefault((record.key, record.stamp), {})[record.part] = (place, record)
        for (key, stamp), found in sorted(parts.items(), key=lambda entry: entry[0][1]):
            first = next(iter(found.values()))[1]
            same = all(r[2:] == first[2:] for _, r in found.values())
            if not same or len(found) != first.parts or set(found) != set(range(first.parts)):
                continue
            places = tuple(found[part][0] for part in range(first.parts))
            self._ready.pop(key, None)  # written again later
            self._ready[key] = DiskEntry(key, places, first.token_ids, first.num_rows, stamp)
            self._stamp = max(self._stamp, stamp)

    def __len__(self) -> int:
        return len(self._ready)

    @property
    def num_places(self) -> int:
        """All there are."""
        return self._file.num_places

    def keys(self) -> list[bytes]:
        """Of findable entries, least recently used first."""
        return list(self._ready)

    def entries(self) -> list[DiskEntry]:
        """Findable ones, least recently used first."""
        return list(self._ready.values())

    def find(self, key: bytes) -> DiskEntry | None:
        """A findable entry."""
        return self._ready.get(key)

    # -- in and out ------------------------------------------------------------------------

    def reserve(
        self, key: bytes, count: int, token_ids: tuple[int, ...] = (), num_rows: int = 0
    ) -> tuple[int, ...] | None:
        """Places for a new entry, evicting others; None where that cannot be, or the key is there. `commit` or `drop`
        follows."""
        if self._refused or key in self._ready or key in self._writing or not 0 < len(key) <= MAX_KEY:
            return None
        if not self._make_room(count):
            return None
        self._stamp += 1
        places = tuple(self._free.pop() for _ in range(count))
        self._writing[key] = DiskEntry(key, places, token_ids, num_rows, self._stamp)
        return places

    def _make_room(self, count: int) -> bool:
        if len(self._free) >= count:
            return True
        leaving, room = [], len(self._free)
        for key, entry in self._ready.items():
            if room >= count:
                break
            if not entry.holds:
                leaving.append(key)
                room += len(entry.places)
        if room < count:
            return False
        for key in leaving:  # their records stay until their places are written: what they say is true until then
            entry = self._ready.pop(key)
            self._free += entry.places
            self.evicted += 1
            if self.on_gone is not None:
                self.on_gone(entry)
        return True

    def commit(self, key: bytes) -> None:
        """A reserved entry was written: findable from now on."""
        self._ready[key] = self._writing.pop(key)

    def drop(self, key: bytes) -> None:
        """Forget an entry, or give a reserved one up that nothing writes any more."""
        writing = self._writing.pop(key, None)
        entry = writing or self._ready.pop(key, None)
        if entry is None:
            return
        if writing is None and self.on_gone is not None:
            self.on_gone(entry)
        self._file.erase(entry.places)
        if entry.holds:
            self._leaving.setdefault(key, []).append(entry)
        else:
            self._free += entry.places

    def touch(self, key: bytes) -> None:
        """A findable entry was of use: it leaves later."""
        self._ready.move_to_end(key)

    def hold(self, key: bytes) -> None:
        """A findable entry is about to be read: its places stay until `release`."""
        self._ready[key].holds += 1
        self.touch(key)

    def release(self, key: bytes) -> None:
        """Undo one `hold`."""
        left = self._leaving.get(key)
        entry = left[0] if left else self._ready[key]
        if entry.holds <= 0:
            raise RuntimeError("a disk entry was released twice")
        entry.holds -= 1
        if left and not entry.holds:
            self._free += left.pop(0).places
            if not left:
                del self._leaving[key]

    def clear(self) -> None:
        """Drop all findable entries."""
        for key in list(self._ready):
            self.drop(key)

    # -- in threads ------------------------------------------------------------------------

    def write(self, spill: Spilled, contents: Sequence[Any]) -> bool:
        """A reserved entry's contents, one a place. False where the disk refuses: no more is reserved then."""
        entry = self._writing.get(spill.key)
        stamp = 0 if entry is None else entry.stamp
        count = len(spill.places)
        records = [
            Record(spill.key, part, count, spill.token_ids, spill.num_rows, stamp) for part in range(count)
        ]  # fmt: skip
        done = self._file.write(spill.places, records, contents)
        self._refused |= not done
        return done

    def read(self, place: int, into: Any) -> bool:
        """A held entry's content at one of its places; False where it is damaged."""
        return self._file.read(place, into)

    # -- the rest --------------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        """Places in each state, which sum to `places`, and entries."""
        writing = sum(len(e.places) for e in self._writing.values())
        leaving = sum(len(e.places) for left in self._leaving.values() for e in left)
        ready = self.num_places - len(self._free) - writing - leaving
        return {
            "places": self.num_places,
            "free": len(self._free),
            "writing": writing,
            "ready": ready,
            "leaving": leaving,
            "entries": len(self._ready),
            "evicted": self.evicted,
        }

    def check_integrity(self) -> None:
        """Raise RuntimeError where a place is lost or in two states."""
        entries = [
            *self._writing.values(),
            *self._ready.values(),
            *(e for left in self._leaving.values() for e in left),
        ]
        places = [*self._free, *(place for entry in entries for place in entry.places)]
        if sorted(places) != list(range(self.num_places)):
            raise RuntimeError("a place on disk is lost, or in two states")
        if any(entry.holds <= 0 for left in self._leaving.values() for entry in left):
            raise RuntimeError("a disk entry has left, its places have not")

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        self._file.close()
