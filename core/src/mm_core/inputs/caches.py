"""Bounded host memory of the pipeline: aliases, names, and preprocessed media. All thread-safe."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from mm_core.errors import CacheFullError
from mm_core.types import MediaFeature, MediaItem, Modality

K = TypeVar("K")
V = TypeVar("V")

MAX_NAME_BYTES = 2**27
TENANT = 32  # characters of a salt
_NAME_BYTES = 1024  # of a name, its item, and their places in the maps
_PART_BYTES = 32  # of a number in a sequence


class LruMap(Generic[K, V]):
    """A map of at most `capacity` entries that drops the least recently used one."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K) -> V | None:
        """The entry, now the most recently used one, or None."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key]

    def put(self, key: K, value: V) -> None:
        """Set the entry; it becomes the most recently used one."""
        with self._lock:
            self._entries[key] = value
            self._entries.move_to_end(key)
            while len(self._entries) > self._capacity:
                self._entries.popitem(last=False)

    def drop(self, wanted: Callable[[K, V], bool]) -> int:
        """Forget the entries for which that holds; how many there were."""
        with self._lock:
            gone = [key for key, value in self._entries.items() if wanted(key, value)]
            for key in gone:
                del self._entries[key]
            return len(gone)

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)


class Owner(NamedTuple):
    """Whose an item is: the salt of its request, and its uuid there."""

    salt: str | None
    uuid: str | None


class MediaName(NamedTuple):
    """What a uuid can stand for: an item of that modality; of a video, the frames that `sampling` picks."""

    owner: Owner
    modality: Modality
    sampling: str = ""


class NameRegistry:
    """The latest item given under each name. Of more than `capacity`, or `max_bytes`, the least recently used one goes,
    pinned ones never; where one tenant's are more than half, of these. Tenant: a salt's first half, which is that of
    the server's key."""

    def __init__(self, capacity: int, max_bytes: int = MAX_NAME_BYTES) -> None:
        self._capacity = capacity
        self._max_bytes = max_bytes
        self._items: OrderedDict[MediaName, MediaItem] = OrderedDict()
        self._tenants: dict[str, OrderedDict[MediaName, int]] = {}  # bytes of each name's item
        self._nbytes: Counter[str] = Counter()
        self._total = 0
        self._largest = ""  # the tenant that had more than half last
        self._by_owner: dict[Owner, set[MediaName]] = {}
        self._pinned: dict[MediaName, MediaItem] = {}
        self._pins: set[Owner] = set()
        self._lock = threading.Lock()

    def get(self, name: MediaName, *, touch: bool = True) -> MediaItem | None:
        """The item, or None. touch: it is the most recently used one now."""
        with self._lock:
            if name in self._pinned:
                return self._pinned[name]
            if touch and name in self._items:
                self._items.move_to_end(name)
                self._tenants[_tenant(name)].move_to_end(name)
            return self._items.get(name)

    def put(self, name: MediaName, item: MediaItem) -> None:
        """The name stands for this item from now on."""
        with self._lock:
            self._by_owner.setdefault(name.owner, set()).add(name)
            if name.owner in self._pins:
                self._pinned[name] = item
                return
            self._insert(name, item)
            self._shrink()

    def _insert(self, name: MediaName, item: MediaItem) -> None:
        if name in self._items:
            self._take_out(name)
        tenant, nbytes = _tenant(name), _item_bytes(name, item)
        self._items[name] = item
        self._tenants.setdefault(tenant, OrderedDict())[name] = nbytes
        self._nbytes[tenant] += nbytes
        self._total += nbytes
        if self._has_most(tenant):
            self._largest = tenant

    def _take_out(self, name: MediaName) -> MediaItem:
        tenant = _tenant(name)
        nbytes = self._tenants[tenant].pop(name)
        self._nbytes[tenant] -= nbytes
        self._total -= nbytes
        if not self._tenants[tenant]:
            del self._tenants[tenant], self._nbytes[tenant]
        return self._items.pop(name)

    def _has_most(self, tenant: str) -> bool:
        count = len(self._tenants.get(tenant, ()))
        return 2 * count > self._capacity or 2 * self._nbytes[tenant] > self._max_bytes

    def _shrink(self) -> None:
        while len(self._items) > self._capacity or self._total > self._max_bytes:
            most = self._tenants[self._largest] if self._has_most(self._largest) else self._items
            name = next(iter(most))
            self._take_out(name)
            self._disown(name)

    def _disown(self, name: MediaName) -> None:
        names = self._by_owner[name.owner]
        names.discard(name)
        if not names:
            del self._by_owner[name.owner]

    def pin(self, owner: Owner) -> bool:
        """Keep an owner's names, present and future; False where there are none."""
        with self._lock:
            if owner not in self._by_owner:
                return False
            self._pins.add(owner)
            for name in self._by_owner[owner]:
                if name in self._items:
                    self._pinned[name] = self._take_out(name)
            return True

    def unpin(self, owner: Owner) -> None:
        """Undo `pin`."""
        with self._lock:
            if owner in self._pins:
                self._pins.discard(owner)
                for name in self._by_owner.get(owner, ()):
                    self._insert(name, self._pinned.pop(name))
                self._shrink()

    def knows(self, owner: Owner) -> bool:
        """Whether anything was given under that name and not forgotten."""
        with self._lock:
            return owner in self._by_owner

    def drop(self, wanted: Callable[[Owner], bool]) -> list[MediaItem]:
        """Forget the names, pins included, of the owners for which that holds; what they stood for."""
        with self._lock:
            gone: list[MediaItem] = []
            for owner in [owner for owner in self._by_owner if wanted(owner)]:
                self._pins.discard(owner)
                for name in self._by_owner.pop(owner):
                    gone.append(self._pinned.pop(name) if name in self._pinned else self._take_out(name))
            return gone


def _tenant(name: MediaName) -> str:
    return (name.owner.salt or "")[:TENANT]


def _item_bytes(name: MediaName, item: MediaItem) -> int:
    """About what a kept item takes: a video's times are most of it."""
    parts = sum(len(value) for value in item.info.values() if isinstance(value, tuple | list))
    return _NAME_BYTES + len(name.owner.uuid or "") + _PART_BYTES * parts


@dataclass(frozen=True)
class ProcessorCacheStats:
    """hits: served from the cache or from work already in flight; misses: prepared anew; entries and nbytes: held
    now, pinned_bytes of them pinned; evicted: dropped for want of room; capacity: in bytes."""

    hits: int = 0
    misses: int = 0
    entries: int = 0
    nbytes: int = 0
    evicted: int = 0
    pinned_bytes: int = 0
    capacity: int = 0


class ProcessorCache:
    """Preprocessed media by media key, at most `capacity` bytes, least recently used ones dropped.

    Work in flight is shared: of several requests that want one new key, one prepares and the rest
    wait. A failure is not kept, and reaches everybody who waited for it. Features of pinned owners are not
    dropped, as long as they are no more than half of the capacity.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._features: OrderedDict[bytes, MediaFeature] = OrderedDict()
        self._pinned: dict[bytes, MediaFeature] = {}
        self._owners: dict[bytes, Owner] = {}
        self._pins: set[Owner] = set()
        self._in_flight: dict[bytes, Future[MediaFeature]] = {}
        self._nbytes = self._pinned_bytes = self._hits = self._misses = self._evicted = 0
        self._lock = threading.Lock()

    def get(self, key: bytes) -> MediaFeature | Future[MediaFeature] | None:
        """The feature if it is held, its future if it is in flight, else None."""
        with self._lock:
            return self._find(key)

    def peek(self, key: bytes) -> MediaFeature | Future[MediaFeature] | None:
        """As `get`, but nothing is counted, and the feature is no more recently used for it."""
        with self._lock:
            return self._pinned.get(key) or self._features.get(key) or self._in_flight.get(key)

    def find_or_claim(
        self, key: bytes, owner: Owner
    ) -> tuple[MediaFeature | Future[MediaFeature], Future[MediaFeature] | None]:
        """The feature held under `key`, or its future if it is in flight; and that same future to
        whoever asked first, who must `fill` or `fail` it."""
        with self._lock:
            found = self._find(key)
            if found is not None:
                return found, None
            self._misses += 1
            self._owners[key] = owner
            mine = self._in_flight[key] = Future()
            return mine, mine

    def fill(
        self,
        key: bytes,
        mine: Future[MediaFeature],
        prepare: Callable[[], MediaFeature],
        hand_out: Callable[[MediaFeature], MediaFeature],
    ) -> None:
        """Make what was claimed, keep it, and hand it out, as a copy maybe, to everybody who waits."""
        try:
            feature = prepare()
            given = hand_out(feature)
        except BaseException as error:
            self.fail(key, mine, error)
            return
        with self._lock:
            if self._in_flight.get(key) is mine:  # else it was evicted before it was there
                del self._in_flight[key]
                self._insert(key, feature)
        mine.set_result(given)

    def fail(self, key: bytes, mine: Future[MediaFeature], error: BaseException) -> None:
        """Give up what was claimed; the error reaches everybody who waits."""
        with self._lock:
            if self._in_flight.get(key) is mine:
                del self._in_flight[key]
                del self._owners[key]
        mine.set_exception(error)

    def stats(self) -> ProcessorCacheStats:
        """Counters since the start, and what is held now."""
        with self._lock:
            entries = len(self._features) + len(self._pinned)
            counts = self._hits, self._misses, entries, self._nbytes, self._evicted
            return ProcessorCacheStats(*counts, self._pinned_bytes, self._capacity)

    def pin(self, owner: Owner) -> int:
        """Keep an owner's features, and those to come while there is room; how many there are. With none nothing is
        pinned. Raises CacheFullError where all pinned ones would be more than half of the capacity."""
        with self._lock:
            held = [key for key, o in self._owners.items() if o == owner and key not in self._in_flight]
            moved = {key: self._features[key] for key in held if key in self._features}
            wanted, limit = self._pinned_bytes + sum(f.nbytes for f in moved.values()), self._capacity // 2
            if wanted > limit:
                raise CacheFullError(
                    f"With this item {wanted} bytes of preprocessed media would be pinned; at most {limit} can be, "
                    "half of the processor cache. Unpin another item, or raise processor_cache_size.",
                    param="uuid",
                )
            if held:
                self._pins.add(owner)
            for key in moved:
                self._pinned[key] = self._features.pop(key)
            self._pinned_bytes = wanted
            return len(held)

    def unpin(self, owner: Owner) -> bool:
        """Undo `pin`; False where the owner was not pinned."""
        with self._lock:
            if owner not in self._pins:
                return False
            self._pins.discard(owner)
            for key in [key for key in self._pinned if self._owners[key] == owner]:
                self._features[key] = self._pinned.pop(key)
                self._pinned_bytes -= self._features[key].nbytes
            self._shrink()
            return True

    def count(self, owner: Owner) -> int:
        """Features held of an owner."""
        with self._lock:
            return sum(o == owner and key not in self._in_flight for key, o in self._owners.items())

    def drop(self, wanted: Callable[[Owner], bool]) -> int:
        """Forget the features, pins included, of the owners for which that holds; how many were held. Those that are
        being prepared are handed out to who waits for them, and not kept."""
        with self._lock:
            self._pins = {owner for owner in self._pins if not wanted(owner)}
            gone = [key for key, owner in self._owners.items() if wanted(owner)]
            held = 0
            for key in gone:
                del self._owners[key]
                if self._in_flight.pop(key, None) is None:
                    self._forget(key)
                    held += 1
            return held

    def _forget(self, key: bytes) -> None:
        """Under the lock: of a held feature."""
        pinned = self._pinned.pop(key, None)
        feature = pinned or self._features.pop(key)
        self._nbytes -= feature.nbytes
        self._pinned_bytes -= feature.nbytes if pinned else 0

    def _find(self, key: bytes) -> MediaFeature | Future[MediaFeature] | None:
        """Under the lock."""
        if key in self._features:
            self._hits += 1
            self._features.move_to_end(key)
            return self._features[key]
        found = self._pinned.get(key) or self._in_flight.get(key)
        self._hits += found is not None
        return found

    def _insert(self, key: bytes, feature: MediaFeature) -> None:
        """Under the lock. An item larger than the whole cache is not kept."""
        owner, limit = self._owners[key], self._capacity // 2
        if owner in self._pins and self._pinned_bytes + feature.nbytes <= limit:
            self._pinned[key] = feature
            self._pinned_bytes += feature.nbytes
        elif feature.nbytes > self._capacity - self._pinned_bytes:
            del self._owners[key]
            return
        else:
            self._features[key] = feature
        self._nbytes += feature.nbytes
        self._shrink()

    def _shrink(self) -> None:
        while self._nbytes > self._capacity:
            key = next(iter(self._features))
            del self._owners[key]
            self._nbytes -= self._features.pop(key).nbytes
            self._evicted += 1
