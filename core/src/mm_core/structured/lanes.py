"""Lanes: what waits, by who waits for it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Lanes(Generic[K]):
    """Keys in lanes, which take turns; within a lane the first comes first. A key may be in several lanes, and is
    taken once. All is of constant cost but `take`, which is that of the key's lanes. Not thread-safe."""

    def __init__(self) -> None:
        self._lanes: OrderedDict[str | None, dict[K, None]] = OrderedDict()
        self._of: dict[K, set[str | None]] = {}

    def __len__(self) -> int:
        return len(self._of)

    def count(self, lane: str | None) -> int:
        """Keys that wait in a lane."""
        return len(self._lanes.get(lane, ()))

    def add(self, lane: str | None, key: K) -> None:
        """Put a key behind those of the lane, if it is not there."""
        self._lanes.setdefault(lane, {})[key] = None
        self._of.setdefault(key, set()).add(lane)

    def remove(self, lane: str | None, key: K) -> None:
        """Take a key out of one lane, if it is there."""
        keys = self._lanes.get(lane)
        if keys is None or key not in keys:
            return
        del keys[key]
        if not keys:
            del self._lanes[lane]
        lanes = self._of[key]
        lanes.discard(lane)
        if not lanes:
            del self._of[key]

    def take(self) -> K | None:
        """The first key of the lane whose turn it is, out of all its lanes; None: nothing waits."""
        if not self._lanes:
            return None
        lane, keys = next(iter(self._lanes.items()))
        key = next(iter(keys))
        self._lanes.move_to_end(lane)
        for each in tuple(self._of[key]):
            self.remove(each, key)
        return key
