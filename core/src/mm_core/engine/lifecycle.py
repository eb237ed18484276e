"""CacheKeeper: pins, evictions, lookups, counters and events of the core's caches, as users ask for them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from mm_core.cache.disk import DiskTier
from mm_core.cache.events import EventLog
from mm_core.cache.pins import Pins
from mm_core.cache.prefix import BlockContent
from mm_core.cache.tags import ItemNames, Name, names_in_chain
from mm_core.engine.messages import (
    AskLevels,
    CacheQuery,
    CacheReply,
    EvictItems,
    Held,
    LevelStats,
    LookUp,
    PinItem,
    UnpinItem,
    WatchCaches,
)
from mm_core.errors import EngineError, MMError
from mm_core.scheduler.sequence import Sequence
from mm_core.scheduler.tier_types import Stored
from mm_core.types import CacheEvent, CacheLookup, PreparedRequest

if TYPE_CHECKING:
    from mm_core.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)


class CacheKeeper:
    """Acts on the scheduler's caches between two steps. What it needs to know is kept only from the first time
    that somebody asks for it."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._prefix, self._rows = scheduler.prefix, scheduler.encoder_cache
        self.items = ItemNames()
        self.log = EventLog(self._prefix, self._rows, self.items, scheduler.pool.block_size)
        self._pins: Pins | None = None
        self.doomed: set[bytes] = set()  # evicted items whose rows somebody reads yet

    @property
    def pins(self) -> Pins:
        """Pins and the index they need, from now on."""
        if self._pins is None:
            tiers = self._scheduler.tiers
            host = None if tiers is None else tiers.host
            self._pins = Pins(self._scheduler.pool, self._prefix, self._rows, self.items, host)
        return self._pins

    def note(self, request: PreparedRequest) -> None:
        """A request came: remember whose its items are."""
        for r in request.media:
            if r.feature.uuid is not None or request.cache_salt is not None:
                self.items.note(r.feature.key, Name(request.cache_salt, r.feature.uuid))

    def answer(self, query: CacheQuery) -> CacheReply:
        """Do what a query asks; its errors are in the reply."""
        try:
            match query:
                case PinItem(number, uuid, salt):
                    return CacheReply(number, self._pin(Name(salt, uuid)))
                case UnpinItem(number, uuid, salt):
                    return CacheReply(number, self._pins is not None and self._pins.unpin(Name(salt, uuid)))
                case EvictItems(number):
                    return CacheReply(number, self._evict(query))
                case LookUp(number, request):
                    return CacheReply(number, self._look_up(request))
                case AskLevels(number):
                    return CacheReply(number, self._levels())
                case WatchCaches(number, on):
                    return CacheReply(number, self._watch(on))
            raise EngineError(f"The engine does not know the query {type(query).__name__}.")
        except MMError as error:
            return CacheReply(query.query_id, error=error)

    # -- pins and evictions ----------------------------------------------------------------

    def _pin(self, name: Name) -> Held:
        blocks, rows, stored = self.pins.pin(name)
        return Held(blocks, sum(key in self._rows for key in self.items.keys(name)), rows, stored)

    def _evict(self, query: EvictItems) -> Held:
        """Unpin, unpublish and drop. What requests that run or wait compute of it is not published either: they
        were asked before."""
        pins, keys = self.pins, list[bytes]()
        if query.everything:
            names, blocks = list(pins.names), [block for block, _ in self._prefix.contents()]
            keys = self._rows.keys()
        elif query.uuid is not None:
            names = [Name(query.salt, query.uuid)]
            blocks, keys = pins.index.of_name(names[0]), [*self.items.keys(names[0]), *pins.keys(names[0])]
        else:
            names = [name for name in pins.names if name.salt == query.salt]
            blocks, keys = pins.index.of_salt(query.salt), self.items.keys_of_salt(query.salt or "")
            keys += [key for name in names for key in pins.keys(name)]
        for name in names:
            pins.unpin(name)
        self._hide_live(query)
        stored = self._drop_stored(query, {*keys}, [c.key for b in blocks if (c := self._prefix.content(b))])
        self._prefix.drop(blocks)
        present = {key: self._rows.rows_of(key) for key in keys if key in self._rows}
        self.doomed.update(key for key in present if not self._rows.drop(key))
        return Held(len(blocks), len(present), sum(present.values()), stored)

    def _hide_live(self, query: EvictItems) -> None:
        for seq in (*self._scheduler.running, *self._scheduler.waiting):
            request = seq.request
            mine = query.everything or request.cache_salt == query.salt
            if query.uuid is not None:
                mine = mine and any(r.feature.uuid == query.uuid for r in request.media)
            if mine:
                self._scheduler.reuse.hide(seq)

    def _drop_stored(self, query: EvictItems, items: set[bytes], blocks: Iterable[bytes]) -> int:
        """Copies in the host's memory and on disk, those in flight included; how many there were."""
        tiers = self._scheduler.tiers
        if tiers is None:
            return 0
        if query.everything:
            count = tiers.forget(lambda _: True)
            tiers.clear()  # what an earlier process left on disk
            return count
        name = Name(query.salt, query.uuid)

        def is_meant(content: BlockContent) -> bool:
            if content.key in items:
                return True
            return content.salt == name.salt if name.uuid is None else name in names_in_chain(content)

        return tiers.forget(is_meant) + tiers.forget_keys(blocks)

    def sweep(self) -> None:
        """Drop the rows of evicted items that nobody reads any more."""
        self.doomed = {key for key in self.doomed if key in self._rows and not self._rows.drop(key)}

    # -- questions -------------------------------------------------------------------------

    def _look_up(self, request: PreparedRequest) -> CacheLookup:
        """Asks the books only: nothing is held, moved or counted."""
        scheduler, seq = self._scheduler, Sequence(-1, request)
        size, tiers, hits = scheduler.pool.block_size, scheduler.tiers, scheduler.reuse.look_up(seq)
        usable = seq.contents[hits : (seq.num_tokens - 1) // size]
        stored = Stored() if tiers is None else tiers.lookup(usable)
        alike = None if any(stored) else scheduler.reuse.partly_found(seq, hits)
        keys = [r.feature.key for r in request.media]
        elsewhere = [key for key in keys if key not in self._rows]
        count = 0 if request.source is None else request.source.num_tokens
        return CacheLookup(
            prompt_tokens=len(request.token_ids),
            device_tokens=(hits + stored.device) * size + (alike[1] if alike else 0),
            host_tokens=stored.host * size,
            disk_tokens=stored.disk * size,
            media=len(keys),
            encoded_media=len(keys) - len(elsewhere),
            restorable_media=0 if tiers is None else sum(tiers.host.find(key) is not None for key in elsewhere),
            source_tokens=count,
            cached_source_tokens=count if count and self._has_source(seq) else 0,
        )

    def _has_source(self, seq: Sequence) -> bool:
        tiers, reuse = self._scheduler.tiers, self._scheduler.reuse
        if reuse.find_source(seq) or tiers is None or seq.source is None:
            return bool(reuse.find_source(seq))
        count = self._scheduler.pool.blocks_for(seq.source.num_tokens)
        stored = tiers.lookup(reuse.source_contents(seq, count))
        return stored.host + stored.disk + stored.device == count

    # -- counters --------------------------------------------------------------------------

    def _levels(self) -> tuple[LevelStats, ...]:
        return (self._encoder_level(), self._device_level(), *self._tier_levels())

    def _encoder_level(self) -> LevelStats:
        rows, stats, tiers = self._rows, self._scheduler.stats, self._scheduler.tiers
        items, restored = (0, 0) if tiers is None else (tiers.stats.restored_items, tiers.stats.restored_rows)
        return LevelStats(
            level="encoder",
            unit="rows",
            size_unit="rows",
            capacity=rows.capacity,
            used=rows.used,
            entries=len(rows),
            queries=rows.hit_rows + stats.encoded_rows + restored,
            hits=rows.hit_rows,
            stored=stats.encoded_items,
            stored_tokens=stats.encoded_rows,
            evicted=rows.evicted_items,
            evicted_tokens=rows.evicted_rows,
            restored=items,
            restored_tokens=restored,
            pinned=self._pins.num_rows if self._pins else 0,
        )

    def _device_level(self) -> LevelStats:
        pool, stats, size = self._scheduler.pool, self._scheduler.stats, self._scheduler.pool.block_size
        return LevelStats(
            level="device",
            unit="tokens",
            size_unit="tokens",
            capacity=pool.num_blocks * size,
            used=len(self._prefix) * size,
            entries=len(self._prefix),
            queries=stats.prompt_tokens,
            hits=stats.cached_tokens - self._tier_hits(),
            stored=self._prefix.published,
            stored_tokens=self._prefix.published * size,
            evicted=pool.evictions,
            evicted_tokens=pool.evictions * size,
            pinned=self._pins.num_blocks * size if self._pins else 0,
        )

    def _tier_hits(self) -> int:
        tiers = self._scheduler.tiers
        return 0 if tiers is None else tiers.stats.host_hits + tiers.stats.disk_hits

    def _tier_levels(self) -> tuple[LevelStats, LevelStats]:
        """What the device did not have is looked for in the host's memory, and the rest on disk."""
        tiers, stats, size = self._scheduler.tiers, self._scheduler.stats, self._scheduler.pool.block_size
        if tiers is None:
            return LevelStats("host", "tokens", "bytes", 0, 0, 0), LevelStats("disk", "tokens", "bytes", 0, 0, 0)
        moved, slot, counts = tiers.stats, tiers.config.slot_bytes, tiers.host.counts()
        missed = stats.prompt_tokens - stats.cached_tokens + self._tier_hits()
        host = LevelStats(
            level="host",
            unit="tokens",
            size_unit="bytes",
            capacity=counts["slots"] * slot,
            used=counts["ready"] * slot,
            entries=counts["entries"],
            queries=missed,
            hits=moved.host_hits,
            pinned=self._pins.num_slots * slot if self._pins else 0,
            evicted=counts["evicted"],
            evicted_tokens=tiers.host.evicted_tokens,
            offloaded=moved.offloaded,
            offloaded_tokens=moved.offloaded_tokens,
            restored=moved.restored + moved.restored_items,
            restored_tokens=moved.restored_tokens,
        )
        places = {"places": 0, "ready": 0, "entries": 0, "evicted": 0}
        places.update({} if tiers.disk is None else tiers.disk.counts())
        disk = LevelStats(
            level="disk",
            unit="tokens",
            size_unit="bytes",
            capacity=places["places"] * slot,
            used=places["ready"] * slot,
            entries=places["entries"],
            queries=(missed - moved.host_hits) if tiers.disk is not None else 0,
            hits=moved.disk_hits,
            evicted=places["evicted"],
            evicted_tokens=places["evicted"] * size,
            offloaded=moved.spilled,
            offloaded_tokens=moved.spilled * size,
            restored_tokens=moved.disk_hits,
        )
        return host, disk

    # -- events ----------------------------------------------------------------------------

    def _watch(self, on: bool) -> tuple[CacheEvent, ...]:
        tiers, was_on = self._scheduler.tiers, self.log.on
        if on:
            self.log.start()
        else:
            self.log.stop()
        if tiers is not None and on is not was_on:
            (tiers.observers.append if on else tiers.observers.remove)(self.log)
            if isinstance(tiers.disk, DiskTier):
                tiers.disk.on_gone = self.log.gone_from_disk if on else None
        if not on:
            return ()
        return (*self.log.snapshot(), *self._snapshot_of_tiers())

    def _snapshot_of_tiers(self) -> Iterator[CacheEvent]:
        tiers = self._scheduler.tiers
        for entry in [] if tiers is None else tiers.host.entries():
            if entry.ready:
                yield self.log.as_event("offloaded", "host", entry.content, entry.num_rows)
        if tiers is not None and isinstance(tiers.disk, DiskTier):
            yield from (self.log.of_disk("offloaded", entry) for entry in tiers.disk.entries())

    def check_integrity(self) -> None:
        """Raise RuntimeError where pins and index do not fit the caches."""
        if self._pins is not None:
            self._pins.check_integrity()
