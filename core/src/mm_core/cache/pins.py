"""Pins: blocks and encoder rows that stay because somebody pinned the name of what they were made of."""

from __future__ import annotations

from collections.abc import Iterable

from mm_core.cache.blocks import BlockPool
from mm_core.cache.encoder import EncoderCache
from mm_core.cache.host import HostTier
from mm_core.cache.prefix import BlockContent, PrefixCache
from mm_core.cache.tags import ItemNames, Name, TagIndex, names_in
from mm_core.errors import CacheFullError

_MORE_BLOCKS = "give the KV cache more room: KvCacheConfig(num_blocks=...), free_gpu_memory_fraction or cpu_cache_size"


class Pins:
    """What the pinned names hold: blocks in which their items lie and those before them in their chains, and the
    items' rows; at most half of the blocks and half of the rows, and of the slots of `host`, where parts of that have
    gone to. What is published or encoded later joins as long as that bound allows, and is an ordinary entry otherwise.
    So is what has to make way for a sequence that could not run beside it.
    """

    def __init__(
        self,
        pool: BlockPool,
        prefix: PrefixCache,
        rows: EncoderCache,
        items: ItemNames,
        host: HostTier | None = None,
    ) -> None:
        self._pool, self._prefix, self._rows, self._items, self._host = pool, prefix, rows, items, host
        self.index = TagIndex(prefix)
        self.names: set[Name] = set()
        self.left_out = 0  # blocks and items that came later and found no room among the pinned
        self._blocks: dict[int, set[Name]] = {}  # pinned block → for whom
        self._keys: dict[bytes, tuple[Name, int]] = {}  # pinned item → for whom, and its rows
        self._stored: dict[Name, set[bytes]] = {}  # pinned in the host's memory
        prefix.observers.append(self)
        rows.observers.append(self)
        rows.on_yield = self._yielded

    @property
    def num_slots(self) -> int:
        """Slots of the host's memory that are pinned."""
        return self._slots_of({key for keys in self._stored.values() for key in keys})

    @property
    def num_blocks(self) -> int:
        """Blocks that are pinned."""
        return len(self._blocks)

    @property
    def num_rows(self) -> int:
        """Rows that are pinned."""
        return sum(rows for _, rows in self._keys.values())

    def keys(self, name: Name) -> list[bytes]:
        """Items of that name whose rows are pinned."""
        return [key for key, (owner, _) in self._keys.items() if owner == name]

    def pin(self, name: Name) -> tuple[int, int, int]:
        """Pin all there is of a name, and what comes; how many blocks and rows it has now, and how many of either in
        the host's memory. Idempotent.

        Raises CacheFullError, and nothing is pinned then.
        """
        blocks, stored = self._reach(name)
        keys = {*self._items.keys(name), *self.keys(name)}
        rows = {key: self._rows.rows_of(key) for key in keys if key in self._rows}
        size = self._pool.block_size
        wanted = size * len(blocks | self._blocks.keys())
        _check("tokens of KV", wanted, size * (self._pool.num_blocks // 2), "the KV cache", _MORE_BLOCKS)
        wanted = self.num_rows + sum(count for key, count in rows.items() if key not in self._keys)
        _check("encoder rows", wanted, self._rows.capacity // 2, "the encoder cache", "raise encoder_cache_tokens")
        if self._host is not None:
            wanted = self._slots_of(stored.union(*self._stored.values()))
            limit = self._host.num_slots // 2
            _check("blocks in host memory", wanted, limit, "that", "raise KvCacheConfig(host_cache_size=...)")
        self.names.add(name)
        self._take(name, blocks)
        for key in rows:
            self._take_rows(name, key, rows[key])
        self._take_stored(name, stored)
        return len(blocks), sum(rows.values()), len(self._stored.get(name, ()))

    def _reach(self, name: Name) -> tuple[set[int], set[bytes]]:
        """Blocks in which a name's items lie and those before them, on the device, and keys of those that are in the
        host's memory only; of the items' rows there, too."""
        blocks: set[int] = set()
        stored: set[bytes] = set()
        begins = [self._prefix.content(block) for block in self.index.touching(name)]
        for entry in [] if self._host is None else self._host.entries():
            if entry.ready and entry.num_rows and self._items.name(entry.key) == name and entry.key not in self._rows:
                stored.add(entry.key)
            elif entry.ready and not entry.num_rows and name in names_in(entry.content):
                begins.append(entry.content)
        for begin in begins:
            at = begin
            while at is not None:
                block = self._prefix.find(at.key)
                if (at.key in stored) if block is None else (block in blocks):
                    break
                if block is None:
                    stored.add(at.key)
                else:
                    blocks.add(block)
                at = self._content(at.parent)
        return blocks, stored

    def _content(self, key: bytes) -> BlockContent | None:
        block = self._prefix.find(key)
        if block is not None:
            return self._prefix.content(block)
        entry = None if self._host is None else self._host.find(key)
        return None if entry is None else entry.content

    def _slots_of(self, keys: Iterable[bytes]) -> int:
        found = [] if self._host is None else [self._host.find(key) for key in keys]
        return sum(len(entry.slots) for entry in found if entry is not None)

    def _take_stored(self, name: Name, keys: set[bytes]) -> None:
        if self._host is None:
            return
        held = self._stored.get(name, set())
        held.update([key for key in keys - held if self._host.pin(key)])
        if held:
            self._stored[name] = held

    def unpin(self, name: Name) -> bool:
        """Undo `pin`; False if the name was not pinned."""
        if name not in self.names:
            return False
        self.names.discard(name)
        for block in [block for block, names in self._blocks.items() if name in names]:
            self._blocks[block].discard(name)
            if not self._blocks[block]:
                del self._blocks[block]
                self._pool.unpin(block)
        for key in self.keys(name):
            del self._keys[key]
            self._rows.unpin(key)
        for key in self._stored.pop(name, ()):
            if self._host is not None:
                self._host.unpin(key)
        return True

    def _take(self, name: Name, blocks: Iterable[int]) -> None:
        for block in blocks:
            if block not in self._blocks:
                self._pool.pin(block)
                self._blocks[block] = set()
            self._blocks[block].add(name)

    def _take_rows(self, name: Name, key: bytes, rows: int) -> None:
        if key not in self._keys:
            self._keys[key] = (name, rows)
            self._rows.pin(key)

    # -- what comes and goes ---------------------------------------------------------------

    def published(self, block: int, content: BlockContent) -> None:
        """See `PrefixObserver`."""
        for name in names_in(content) & self.names if self.names and content.touches else ():
            blocks = self.index.with_ancestors([block])
            if len(blocks | self._blocks.keys()) > self._pool.num_blocks // 2:
                self.left_out += 1
            else:
                self._take(name, blocks)

    def forgotten(self, block: int, content: BlockContent, evicted: bool) -> None:  # noqa: ARG002
        """See `PrefixObserver`: a block that is not findable any more has no pins either."""
        self._blocks.pop(block, None)

    def encoded(self, key: bytes, rows: int) -> None:
        """See `RowsObserver`."""
        name = self._items.name(key)
        if name is not None and name in self.names and key not in self._keys:
            if self.num_rows + rows > self._rows.capacity // 2:
                self.left_out += 1
            else:
                self._take_rows(name, key, rows)

    def dropped(self, key: bytes, rows: int, cost: int, evicted: bool) -> None:  # noqa: ARG002
        """See `RowsObserver`."""
        self._keys.pop(key, None)

    def _yielded(self, key: bytes) -> None:
        self._keys.pop(key, None)

    def check_integrity(self) -> None:
        """Raise RuntimeError where more is pinned than may be, or something that is not there."""
        self.index.check_integrity()
        if self._host is not None and self.num_slots > self._host.num_slots // 2:
            raise RuntimeError("more than half of the host's memory is pinned")
        if not self._stored.keys() <= self.names:
            raise RuntimeError("something in the host's memory is pinned for a name that is not")
        if self.num_blocks > self._pool.num_blocks // 2 or self.num_rows > self._rows.capacity // 2:
            raise RuntimeError("more than half of a cache is pinned")
        if any(self._prefix.content(block) is None for block in self._blocks):
            raise RuntimeError("a pinned block is not findable")
        if self._keys.keys() != {key for key in self._rows.keys() if self._rows.is_pinned(key)}:  # noqa: SIM118
            raise RuntimeError("rows are pinned for nobody, or not there though somebody pinned them")
        if any(not names or not names <= self.names for names in self._blocks.values()):
            raise RuntimeError("a block is pinned for a name that is not")


def _check(what: str, wanted: int, limit: int, cache: str, remedy: str) -> None:
    """Raise CacheFullError where more is wanted than may be pinned."""
    if wanted > limit:
        raise CacheFullError(
            f"With this item {wanted} {what} would be pinned; at most {limit} can be, half of {cache}. Unpin another "
            f"item, or {remedy}.",
            param="uuid",
        )
