"""Bounded host memory of the pipeline: aliases, names, and preprocessed media. All thread-safe."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

from mm_core.types import MediaFeature

K = TypeVar("K")
V = TypeVar("V")


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

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)


@dataclass(frozen=True)
class ProcessorCacheStats:
    """hits: served from the cache or from work already in flight; misses: prepared anew; now held."""

    hits: int = 0
    misses: int = 0
    entries: int = 0
    nbytes: int = 0


class ProcessorCache:
    """Preprocessed media by media key, at most `capacity` bytes, least recently used ones dropped.

    Work in flight is shared: of several requests that want one new key, one prepares and the rest
    wait. A failure is not kept, and reaches everybody who waited for it.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._features: OrderedDict[bytes, MediaFeature] = OrderedDict()
        self._in_flight: dict[bytes, Future[MediaFeature]] = {}
        self._nbytes = self._hits = self._misses = 0
        self._lock = threading.Lock()

    def get(self, key: bytes) -> MediaFeature | Future[MediaFeature] | None:
        """The feature if it is held, its future if it is in flight, else None."""
        with self._lock:
            return self._find(key)

    def find_or_claim(self, key: bytes) -> tuple[MediaFeature | Future[MediaFeature], Future[MediaFeature] | None]:
        """The feature held under `key`, or its future if it is in flight; and that same future to
        whoever asked first, who must `fill` or `fail` it."""
        with self._lock:
            found = self._find(key)
            if found is not None:
                return found, None
            self._misses += 1
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
            del self._in_flight[key]
            self._insert(key, feature)
        mine.set_result(given)

    def fail(self, key: bytes, mine: Future[MediaFeature], error: BaseException) -> None:
        """Give up what was claimed; the error reaches everybody who waits."""
        with self._lock:
            self._in_flight.pop(key, None)
        mine.set_exception(error)

    def stats(self) -> ProcessorCacheStats:
        """Counters since the start, and what is held now."""
        with self._lock:
            return ProcessorCacheStats(self._hits, self._misses, len(self._features), self._nbytes)

    def _find(self, key: bytes) -> MediaFeature | Future[MediaFeature] | None:
        """Under the lock."""
        if key in self._features:
            self._hits += 1
            self._features.move_to_end(key)
            return self._features[key]
        found = self._in_flight.get(key)
        self._hits += found is not None
        return found

    def _insert(self, key: bytes, feature: MediaFeature) -> None:
        """Under the lock. An item larger than the whole cache is not kept."""
        if feature.nbytes > self._capacity:
            return
        self._features[key] = feature
        self._nbytes += feature.nbytes
        while self._nbytes > self._capacity:
            _, dropped = self._features.popitem(last=False)
            self._nbytes -= dropped.nbytes
