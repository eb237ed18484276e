"""What crosses the border of the engine core: plain frozen values, nothing else.

The core may run in a thread of the caller or in another process; only these types, and what
they hold, travel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from mm_core.errors import MMError
from mm_core.types import CacheEvent, CacheLookup, Logprob, PreparedRequest


@dataclass(frozen=True)
class Submit:
    """Run a prepared request; its `n` answers become as many sequences."""

    request: PreparedRequest


@dataclass(frozen=True)
class Abort:
    """End a request (index None) or one of its answers, and free all it holds.

    stopped: the answer is complete (a stop string was found), nothing went wrong.
    """

    request_id: str
    index: int | None = None
    stopped: bool = False


@dataclass(frozen=True)
class ClearCache:
    """Forget every reusable KV block that nobody uses."""


@dataclass(frozen=True)
class CacheQuery:
    """Something about the caches that is answered by a `CacheReply` of the same number."""

    query_id: int


@dataclass(frozen=True)
class PinItem(CacheQuery):
    """Keep what was and will be computed from an item; answered by `Held`."""

    uuid: str
    salt: str | None


@dataclass(frozen=True)
class UnpinItem(CacheQuery):
    """Undo `PinItem`; answered by whether it was pinned."""

    uuid: str
    salt: str | None


@dataclass(frozen=True)
class EvictItems(CacheQuery):
    """Forget what was computed from an item (uuid and its salt), for a salt (uuid None), or all there is
    (everything); answered by `Held`."""

    uuid: str | None = None
    salt: str | None = None
    everything: bool = False


@dataclass(frozen=True)
class LookUp(CacheQuery):
    """What of a request would be found now; answered by `CacheLookup`."""

    request: PreparedRequest


@dataclass(frozen=True)
class AskLevels(CacheQuery):
    """The counters of the core's caches; answered by a tuple of `LevelStats`."""


@dataclass(frozen=True)
class WatchCaches(CacheQuery):
    """Tell of what comes and goes from now on, or cease to; answered by events that make what there is."""

    on: bool = True


@dataclass(frozen=True)
class Held:
    """What the core's caches hold, or held, of an item. blocks: of KV on the device; items: encoded on the
    device; stored: blocks and items in the host's memory and on disk."""

    blocks: int = 0
    items: int = 0
    rows: int = 0
    stored: int = 0


@dataclass(frozen=True)
class LevelStats:
    """One level of the caches. unit: what `queries`, `hits` and the `…_tokens` count: "tokens" of KV, "rows" of
    encoder output, "items" prepared. capacity and used: in `size_unit`. entries: blocks or items held.

    queries: what requests looked for; hits: what of that was found. stored, evicted, offloaded, restored: entries
    that were computed into this level, that left it for want of room, that were copied to it, and from it.
    """

    level: str
    unit: str
    size_unit: str
    capacity: int
    used: int
    entries: int
    queries: int = 0
    hits: int = 0
    stored: int = 0
    stored_tokens: int = 0
    evicted: int = 0
    evicted_tokens: int = 0
    offloaded: int = 0
    offloaded_tokens: int = 0
    restored: int = 0
    restored_tokens: int = 0
    pinned: int = 0

    @property
    def hit_rate(self) -> float:
        """hits / queries; 0 where nothing was asked for."""
        return self.hits / self.queries if self.queries else 0.0


@dataclass(frozen=True)
class CacheReply:
    """Answers the query of that number: with a result, or the error that it ended with."""

    query_id: int
    result: Held | CacheLookup | bool | tuple[LevelStats, ...] | tuple[CacheEvent, ...] | None = None
    error: MMError | None = None


@dataclass(frozen=True)
class CacheNews:
    """What came and went in the caches, in order."""

    events: tuple[CacheEvent, ...]


class TokenOutput(NamedTuple):  # one a sequence and step: half the cost of a dataclass
    """One token, or the end, of one answer.

    cached_tokens and encoded_rows count for the request so far. error is set where the request
    failed; finish_reason ends the answer. started: `time.perf_counter()` when it was first scheduled.
    """

    request_id: str
    index: int  # type: ignore[assignment]  # tuple.index is nothing anybody wants of an output
    token_id: int | None
    logprobs: Mapping[int, Logprob] | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None
    cached_tokens: int = 0
    encoded_rows: int = 0
    error: MMError | None = None
    started: float | None = None


Message = Submit | Abort | ClearCache | CacheQuery
Notice = CacheReply | CacheNews
