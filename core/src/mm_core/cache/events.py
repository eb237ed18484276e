"""EventLog: what came and went in the caches, for listeners outside. Nothing is noted while nobody listens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from mm_core.cache.disk import DiskEntry
from mm_core.cache.encoder import EncoderCache
from mm_core.cache.prefix import BlockContent, PrefixCache
from mm_core.cache.tags import ItemNames
from mm_core.types import CacheEvent, CacheLevel

Kind = Literal["stored", "offloaded", "restored", "evicted"]
Move = Literal["offloaded", "restored", "evicted"]
TierLevel = Literal["host", "disk"]


class EventLog:
    """Notes events of blocks and rows, in order, until `take` gives them away.

    Replaying them on what `snapshot` told gives what can be found: per level, the keys stored, restored or offloaded
    and not evicted since.
    """

    def __init__(self, prefix: PrefixCache, rows: EncoderCache, items: ItemNames, block_size: int) -> None:
        self.on = False
        self._block_size = block_size
        self._prefix, self._rows, self._items = prefix, rows, items
        self._coming_back: set[bytes] = set()  # on their way from the host's memory or disk
        self._told: dict[bytes, int] = {}  # items whose rows were told of
        self._events: list[CacheEvent] = []

    def start(self) -> None:
        """Begin to note."""
        if not self.on:
            self.on = True
            self._told = {key: self._rows.rows_of(key) for key in self._rows.ready()}
            self._prefix.observers.append(self)
            self._rows.observers.append(self)

    def stop(self) -> None:
        """Note nothing any more."""
        if self.on:
            self.on = False
            self._prefix.observers.remove(self)
            self._rows.observers.remove(self)
            self._told, self._events, self._coming_back = {}, [], set()

    def take(self) -> tuple[CacheEvent, ...]:
        """The events since the last call."""
        events, self._events = self._events, []
        return tuple(events)

    def snapshot(self) -> Iterator[CacheEvent]:
        """Events that make what is on the device, once started."""
        for _, content in self._prefix.contents():
            yield self._of_block("stored", "device", content)
        for key, rows in self._told.items():
            yield self._of_rows("stored", "device", key, rows)

    def block(self, kind: Kind, level: CacheLevel, content: BlockContent) -> None:
        """Note what happened to a block."""
        if self.on:
            self._events.append(self._of_block(kind, level, content))

    def rows(self, kind: Kind, level: CacheLevel, key: bytes, rows: int) -> None:
        """Note what happened to an item's rows."""
        if self.on:
            self._events.append(self._of_rows(kind, level, key, rows))

    def _of_block(self, kind: Kind, level: CacheLevel, content: BlockContent) -> CacheEvent:
        touched = content.media[len(content.media) - content.touches :]
        uuids = tuple(dict.fromkeys(tag.uuid for tag in touched if tag.uuid is not None))
        ids = content.token_ids
        return CacheEvent(kind, "kv", level, content.key, self._block_size, content.parent, ids, uuids)

    def _of_rows(self, kind: Kind, level: CacheLevel, key: bytes, rows: int) -> CacheEvent:
        name = self._items.name(key)
        uuids = () if name is None or name.uuid is None else (name.uuid,)
        return CacheEvent(kind, "encoder", level, key, rows, uuids=uuids)

    # -- what comes and goes ---------------------------------------------------------------

    def published(self, block: int, content: BlockContent) -> None:  # noqa: ARG002
        """See `PrefixObserver`."""
        self.block(self._kind(content.key), "device", content)

    def forgotten(self, block: int, content: BlockContent, evicted: bool) -> None:  # noqa: ARG002
        """See `PrefixObserver`."""
        self.block("evicted", "device", content)

    def encoded(self, key: bytes, rows: int) -> None:
        """See `RowsObserver`."""
        if key not in self._told:
            self._told[key] = rows
            self.rows(self._kind(key), "device", key, rows)

    def dropped(self, key: bytes, rows: int, cost: int, evicted: bool) -> None:  # noqa: ARG002
        """See `RowsObserver`."""
        if self._told.pop(key, None) is not None:
            self.rows("evicted", "device", key, rows)
        self._coming_back.discard(key)

    def moved(self, move: Move, level: TierLevel, content: BlockContent, num_rows: int) -> None:
        """See `TierObserver`."""
        if move == "restored":
            self._coming_back.add(content.key)  # it is told of when it is there
        else:
            self._events.append(self.as_event(move, level, content, num_rows))

    def as_event(self, kind: Kind, level: CacheLevel, content: BlockContent, num_rows: int) -> CacheEvent:
        """Of a block, or of the rows of the item that `content` stands for."""
        if num_rows:
            return self._of_rows(kind, level, content.key, num_rows)
        return self._of_block(kind, level, content)

    def of_disk(self, kind: Kind, entry: DiskEntry) -> CacheEvent:
        """Of an entry on disk, where only key and token ids are known, as of those that an earlier process left."""
        if entry.num_rows:
            return self._of_rows(kind, "disk", entry.key, entry.num_rows)
        return CacheEvent(kind, "kv", "disk", entry.key, self._block_size, token_ids=entry.token_ids)

    def gone_from_disk(self, entry: DiskEntry) -> None:
        """Note that it is not findable there any more."""
        self._events.append(self.of_disk("evicted", entry))

    def _kind(self, key: bytes) -> Kind:
        if key not in self._coming_back:
            return "stored"
        self._coming_back.remove(key)
        return "restored"
