"""Stores: what the device evicts goes to the host's memory, and from there to disk in the background."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from mm_core.cache.host import HostEntry, HostTier
from mm_core.cache.prefix import BlockContent, MediaTag
from mm_core.scheduler.tier_types import Disk, Level, Move, TierConfig, TierStats
from mm_core.scheduler.transfers import BlockStore, RowStore, Spill, TransferDone

Tell = Callable[[Move, Level, BlockContent, int], None]


class Stores:
    """Observes the device's caches. An entry is findable when the copy of it has landed; one that could not be stored
    costs time only."""

    def __init__(
        self, host: HostTier, disk: Disk | None, config: TierConfig, block_size: int, stats: TierStats, tell: Tell
    ) -> None:
        self._host = host
        self._disk = disk
        self._config = config
        self._block_size = block_size
        self._stats = stats
        self._tell = tell
        self._evicted: list[tuple[int, BlockContent]] = []  # in the step that is being scheduled
        self._evicted_rows: list[tuple[bytes, int, int]] = []
        self._storing: set[bytes] = set()
        self._spilling: dict[bytes, BlockContent | None] = {}  # None: forgotten meanwhile
        self._unspilled: OrderedDict[bytes, None] = OrderedDict()
        self._on_disk: dict[bytes, BlockContent] = {}  # what this process wrote, some of it evicted since
        host.on_evict = self._on_host_evict
        host.on_drop = self._on_host_drop

    @property
    def storing(self) -> set[bytes]:
        """Keys on their way to the host's memory."""
        return self._storing

    @property
    def spilling(self) -> Iterable[bytes]:
        """Keys on their way to disk."""
        return self._spilling.keys()

    def tokens_of(self, content: BlockContent) -> int:
        """Of a block; a source's has no ids."""
        return len(content.token_ids) or self._block_size

    # -- what the caches tell --------------------------------------------------------------

    def published(self, block: int, content: BlockContent) -> None:  # noqa: ARG002
        """See `PrefixObserver`. What an earlier process left on disk is known by more than its key from now on."""
        if self._disk is not None and content.key not in self._on_disk and self._disk.find(content.key) is not None:
            self._note_on_disk(content)

    def forgotten(self, block: int, content: BlockContent, evicted: bool) -> None:
        """See `PrefixObserver`."""
        if evicted:
            self._evicted.append((block, content))

    def encoded(self, key: bytes, rows: int) -> None:
        """See `RowsObserver`."""

    def dropped(self, key: bytes, rows: int, cost: int, evicted: bool) -> None:
        """See `RowsObserver`."""
        if evicted:
            self._evicted_rows.append((key, rows, cost))

    def _on_host_evict(self, entry: HostEntry) -> None:
        self._unspilled.pop(entry.key, None)
        self._tell("evicted", "host", entry.content, entry.num_rows)

    def _on_host_drop(self, entry: HostEntry) -> None:
        self._tell("evicted", "host", entry.content, entry.num_rows)

    # -- orders ----------------------------------------------------------------------------

    def order_blocks(self) -> list[BlockStore]:
        """Blocks that were evicted while the step was scheduled and are not in the host's memory yet."""
        if not self._evicted:
            return []
        wanted = [(block, content) for block, content in self._evicted if content.key not in self._host]
        self._evicted = []
        self._host.make_room(len(wanted))
        orders = []
        for block, content in wanted:
            entry = self._host.reserve(content, self.tokens_of(content))
            if entry is None:
                self._stats.dropped += 1
            else:
                self._storing.add(content.key)
                orders.append(BlockStore(content.key, block, entry.slots[0]))
        return orders

    def order_rows(self) -> list[RowStore]:
        """As `order_blocks`, for encoder rows."""
        if not self._evicted_rows:
            return []
        orders = []
        for key, rows, cost in self._evicted_rows:
            if key in self._host or not self._config.row_bytes:
                continue
            content = BlockContent(key, (), media=(MediaTag(key),), touches=1, encoder_cost=cost)
            entry = self._host.reserve(content, 0, -(-rows * self._config.row_bytes // self._config.slot_bytes), rows)
            if entry is None:
                self._stats.dropped += 1
            else:
                self._storing.add(key)
                orders.append(RowStore(key, entry.slots))
        self._evicted_rows = []
        return orders

    def order_spills(self) -> list[Spill]:
        """What the host's memory holds and the disk does not, as many as may be in flight."""
        orders = []
        while self._unspilled and len(self._spilling) < self._config.max_spills and self._disk is not None:
            key, _ = self._unspilled.popitem(last=False)
            entry = self._host.find(key)
            if entry is None or key in self._spilling:
                continue
            places = self._disk.reserve(key, len(entry.slots), entry.content.token_ids, entry.num_rows)
            if places is not None:
                self._host.hold(key)
                self._spilling[key] = entry.content
                orders.append(Spill(key, entry.slots, tuple(places), entry.content.token_ids, entry.num_rows))
        return orders

    # -- what comes of them ----------------------------------------------------------------

    def take_store(self, done: TransferDone) -> None:
        """A copy to the host's memory has ended."""
        self._storing.remove(done.key)
        entry = self._host.land(done.key, done.ok)
        if not done.ok:
            self._stats.dropped += 1
        if entry is None:
            return
        self._stats.offloaded += 1
        self._stats.offloaded_tokens += entry.num_tokens
        self._stats.offloaded_rows += entry.num_rows
        self._tell("offloaded", "host", entry.content, entry.num_rows)
        if self._disk is not None and not entry.num_rows and self._disk.find(done.key) is None:
            self._unspilled[done.key] = None

    def take_spill(self, done: TransferDone) -> None:
        """A copy to disk has ended."""
        content = self._spilling.pop(done.key)
        self._host.release(done.key)
        if self._disk is None:
            return
        if done.damaged:
            self._host.drop(done.key)
        if not done.ok or content is None:
            self._disk.drop(done.key)
            return
        self._disk.commit(done.key)
        self._stats.spilled += 1
        self._note_on_disk(content)
        self._tell("offloaded", "disk", content, 0)

    def _note_on_disk(self, content: BlockContent) -> None:
        self._on_disk[content.key] = content
        if self._disk is not None and len(self._on_disk) > 2 * self._disk.counts()["entries"] + 64:
            self._on_disk = {key: c for key, c in self._on_disk.items() if self._disk.find(key) is not None}

    # -- forgetting ------------------------------------------------------------------------

    def find_keys(self, is_meant: Callable[[BlockContent], bool]) -> set[bytes]:
        """Of what is stored, or on its way."""
        keys = {entry.key for entry in self._host.entries() if is_meant(entry.content)}
        return keys.union(key for key, content in self._on_disk.items() if is_meant(content))

    def forget(self, key: bytes) -> bool:
        """Drop what is stored under a key, or on its way; whether there was any."""
        self._unspilled.pop(key, None)
        self._on_disk.pop(key, None)
        there = self._host.drop(key)
        if key in self._spilling:
            self._spilling[key] = None
        elif self._disk is not None and self._disk.find(key) is not None:
            self._disk.drop(key)
            there = True
        return there

    def clear(self) -> None:
        """Drop all that is stored, but for what is pinned in the host's memory."""
        self._host.clear()
        self._unspilled.clear()
        self._on_disk.clear()
        self._spilling = dict.fromkeys(self._spilling)
        if self._disk is not None:
            self._disk.clear()

    def check_integrity(self) -> None:
        """Raise RuntimeError where something left the device without an order."""
        if self._evicted or self._evicted_rows:
            raise RuntimeError("something left the device without being asked where to")
