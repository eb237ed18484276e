"""TierPlanner: what leaves the device for the host's memory and the disk, what comes back, and when."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from mm_core.cache.host import HostTier
from mm_core.cache.prefix import BlockContent
from mm_core.errors import EngineError
from mm_core.scheduler.plan import Outcome
from mm_core.scheduler.policy import Candidate, Restorable, Retained
from mm_core.scheduler.restores import Part, RestoreGroup, Restores
from mm_core.scheduler.sequence import Sequence as SequenceState
from mm_core.scheduler.stock import Found, Stock
from mm_core.scheduler.stores import Stores
from mm_core.scheduler.tier_types import Disk, Level, Move, Stored, TierConfig, TierObserver, TierStats
from mm_core.scheduler.transfers import (
    NO_TRANSFERS,
    BlockCopy,
    BlockRestore,
    TransferDone,
    Transfers,
)
from mm_core.types import MediaFeature

if TYPE_CHECKING:
    from mm_core.scheduler.scheduler import Scheduler

LOOK_EVERY = 32  # steps between two looks at what a waiting sequence might have copied back, for the order of waiting


class TierPlanner:
    """Orders the copies of each step, and keeps the books of those in flight.

    What the device evicts is stored in the host's memory; what is there goes to disk in the background; what a waiting
    sequence wants next comes back, if the policy says that this is faster than to compute it.
    """

    def __init__(self, scheduler: Scheduler, host: HostTier, config: TierConfig, disk: Disk | None = None) -> None:
        self.config = config
        self.host = host
        self.disk = disk
        self.stats = TierStats()
        self.observers: list[TierObserver] = []
        self.in_flight = 0  # copies ordered and not told of yet
        self._scheduler = scheduler
        self._pool, self._prefix, self._rows = scheduler.pool, scheduler.prefix, scheduler.encoder_cache
        self.stores = Stores(host, disk, config, self._pool.block_size, self.stats, self._tell)
        self.restores = Restores(self._pool, self._prefix, self._on_restored)
        self.stock = Stock(self._prefix, host, disk, self.restores.fills)
        self._tries: dict[int, int] = {}  # by sequence
        self._declined: set[int] = set()  # sequences that compute what could be restored
        self._crowded = False  # nothing more is to be copied back until some of it has landed
        self._orders: list[BlockRestore] = []
        self._loading: set[bytes] = set()  # from disk, by way of the host's memory
        self._read_rows: deque[tuple[int, bytes]] = deque()  # items that steps in flight copy back
        host.worth = self._worth
        self._prefix.observers.append(self.stores)
        self._rows.observers.append(self.stores)

    def _worth(self, tokens: int, cost: float, slots: int, hits: int, clock: float, stamp: int) -> float:
        weight = self._scheduler.costs.weight(tokens, cost)
        return self._scheduler.policy.worth(Retained(weight, slots, hits, clock, stamp))

    def _on_restored(self, part: Part) -> None:
        self.stats.restored += 1
        self.stats.restored_tokens += self.stores.tokens_of(part.content)
        self._tell("restored", part.level, part.content, 0)

    def _tell(self, move: Move, level: Level, content: BlockContent, num_rows: int) -> None:
        for observer in self.observers:
            observer.moved(move, level, content, num_rows)

    # -- orders ----------------------------------------------------------------------------

    def take_orders(self, copies: Sequence[BlockCopy] = ()) -> Transfers:
        """All copies of the step that has been scheduled, `copies` within the device among them."""
        stores, row_stores = self.stores.order_blocks(), self.stores.order_rows()
        spills = self.stores.order_spills()
        restores, self._orders = self._orders, []
        count = len(stores) + len(row_stores) + len(spills) + len(restores)
        if not count and not copies:
            return NO_TRANSFERS
        self.in_flight += count
        return Transfers(tuple(stores), tuple(row_stores), tuple(copies), tuple(restores), tuple(spills))

    # -- what comes of them ----------------------------------------------------------------

    def take(self, done: Iterable[TransferDone]) -> bool:
        """Copies have ended; whether any to the device has."""
        filling, nbytes, seconds = self.restores.filling, 0, 0.0
        for told in done:
            self.in_flight -= 1
            self.stats.damaged += told.damaged
            if told.kind == "restore":
                self._take_restore(told)
                if told.ok and told.seconds:
                    nbytes, seconds = nbytes + told.nbytes, seconds + told.seconds
            elif told.kind == "spill":
                self.stores.take_spill(told)
            else:
                self.stores.take_store(told)
        if nbytes:
            self._scheduler.costs = self._scheduler.costs.observe_restore(nbytes, seconds)
        self._crowded &= self.restores.filling == filling
        return self.restores.filling < filling

    def _take_restore(self, told: TransferDone) -> None:
        key = told.key
        if key in self._loading and self.disk is not None:
            self._loading.remove(key)
            self.disk.release(key)
            if told.damaged:
                self.disk.drop(key)
            entry = self.host.land(key, told.ok)
            if entry is not None:
                self._tell("offloaded", "host", entry.content, 0)
        else:
            self.host.release(key)
            if told.damaged:
                self.host.drop(key)
        self.restores.land(key, told.ok)

    # -- blocks that come back -------------------------------------------------------------

    def awaits(self, seq: SequenceState) -> bool:
        """Whether what a waiting sequence needs next is on its way to the device."""
        group = self.restores.group_of(seq)
        if group is not None:
            return bool(group.pending)
        if not self.restores.filling:
            return False
        next_one = seq.contents[seq.seen_hits : seq.seen_hits + 1] if seq.seen_hits < self._usable(seq) else []
        return any(self.restores.fills(content.key) for content in (*next_one, *seq.source_contents))

    def measure(self, sequences: Sequence[SequenceState], step: int, found: list[Candidate]) -> list[Candidate]:
        """Waiting sequences as a policy sees them, with what may come back; looked for now and then only."""
        if not len(self.host) and self.disk is None:
            return found
        for index, seq in enumerate(sequences):
            then, tokens = seq.seen_behind
            if not 0 <= step - then < LOOK_EVERY or then < seq.waiting_since:
                tokens = self._tokens_behind(seq)
                seq.seen_behind = step, tokens
            if tokens and seq.seq_id not in self._declined:
                found[index] = found[index]._replace(restorable_tokens=tokens)
        return found

    def _tokens_behind(self, seq: SequenceState) -> int:
        """Tokens that might come back, as far as halving the blocks in question tells."""
        low, high = seq.seen_hits, min(self._usable(seq), len(seq.contents))
        if low >= high or self.stock.find(seq.contents[low]) is None:
            return 0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.stock.find(seq.contents[middle]) is None else (middle, high)
        return (low + 1 - seq.seen_hits) * self._pool.block_size

    def foresees(self, seq: SequenceState) -> bool:
        """Whether what a waiting sequence needs next may be copied back: then nothing is encoded ahead for it."""
        if seq.seq_id in self._declined:
            return False
        group = self.restores.group_of(seq)
        if group is not None:
            return bool(group.pending)
        hits = seq.seen_hits
        if hits < min(self._usable(seq), len(seq.contents)) and self.stock.find(seq.contents[hits]) is not None:
            return True
        found = self.stock.find(seq.source_contents[0]) if seq.source_contents else None
        return found is not None and found.block is None

    def _usable(self, seq: SequenceState) -> int:
        """Full blocks that may be reused: the last token is always computed, it gives the logits."""
        return (seq.num_tokens - 1) // self._pool.block_size

    def _source_run(self, seq: SequenceState) -> list[Found]:
        """All of its source's blocks, or none."""
        count = 0 if seq.source is None else self._pool.blocks_for(seq.source.num_tokens)
        reuse = self._scheduler.reuse
        if not count or not self.stock.run(reuse.source_contents(seq, 1)):
            return []  # the usual case: the other keys are not needed
        run = self.stock.run(reuse.source_contents(seq, count))
        return run if len(run) == count else []

    def restore(self, seq: SequenceState, shared: list[int], source: list[int]) -> Outcome | None:
        """Copy back what a waiting sequence, for which there is room, would compute behind the blocks that it
        shares. None: it may start as it is. FULL: there is too little room for that after all."""
        if seq.seq_id in self._declined or self.restores.group_of(seq) is not None:
            return None
        if self._crowded and self.restores.filling:
            return Outcome.RESTORES if self.foresees(seq) else None
        run = self.stock.run(seq.contents[len(shared) : self._usable(seq)])
        cross = [] if source or seq.source is None else self._source_run(seq)
        run, cross = self.stock.by_way_of_host(run, cross)
        missing = [found for found in (*run, *cross) if found.block is None]
        if not missing:
            return None
        tries = self._tries.get(seq.seq_id, 0)
        if tries >= self.config.max_tries or not self._pays(seq, len(shared), run, cross, len(missing)):
            self._declined.add(seq.seq_id)
            self.stats.declined += 1
            return None
        coming = (self.restores.filling + len(missing)) * self.config.slot_bytes
        if self.restores.filling and coming > self.config.max_filling:
            self._crowded = True
            return Outcome.RESTORES
        table = [*shared, *source, *(found.block for found in (*run, *cross) if found.block is not None)]
        if self._pool.num_available - self._pool.num_cached(table) < len(missing):
            return Outcome.FULL
        self._tries[seq.seq_id] = tries + 1
        self._order(seq, table, run, cross)
        return Outcome.RESTORES

    def _pays(self, seq: SequenceState, hits: int, run: list[Found], cross: list[Found], missing: int) -> bool:
        size, tokens = self._pool.block_size, len(run) * self._pool.block_size
        start, end = hits * size, hits * size + tokens
        saved = [r.feature for r in seq.ranges if r.end > start and r.end <= end]
        if cross and seq.source is not None:
            tokens += seq.source.num_tokens
            saved += [r.feature for r in seq.media]
        features = {feature.key: feature for feature in saved if feature.key not in self._rows}
        cost = sum(self._scheduler.media.budget_cost(feature) for feature in features.values())
        restorable = Restorable(tokens, cost, missing * self.config.slot_bytes)
        return self._scheduler.policy.restores(restorable, self._scheduler.costs)

    def _order(self, seq: SequenceState, table: list[int], run: list[Found], cross: list[Found]) -> None:
        """Hold all that takes part before anything is evicted for it."""
        self._pool.share(table)
        for found in (*run, *cross):
            if found.in_host:
                self.host.hold(found.content.key).hits += 1
        group = RestoreGroup(seq, table, [], [])
        blocks = iter(self._pool.allocate(sum(found.block is None for found in (*run, *cross))) or ())
        for parts, part_run in ((group.parts, run), (group.source_parts, cross)):
            for found in part_run:
                if found.block is None:
                    parts.append(self._order_one(found, next(blocks, None)))
        group.table += [part.block for part in (*group.parts, *group.source_parts)]
        self.restores.open(group)

    def _order_one(self, found: Found, block: int | None) -> Part:
        content, place = found.content, found.place
        if place is not None and self.disk is not None:
            entry = self.host.reserve(content, self.stores.tokens_of(content))
            self.disk.hold(content.key)
            self._loading.add(content.key)
        else:
            entry = self.host.find(content.key)
        if block is None or entry is None:
            raise EngineError("room for what is copied back vanished within a step")
        self._orders.append(BlockRestore(content.key, block, entry.slots[0], place))
        return Part(content, block, "host" if place is None else "disk")

    def started(self, seq: SequenceState, first: bool) -> None:
        """A sequence shares what was copied back for it. first: it never ran before."""
        group = self.restores.leave(seq)
        if group is not None and first:
            self.stats.host_hits += group.tokens["host"]
            self.stats.disk_hits += group.tokens["disk"]
        self._declined.discard(seq.seq_id)
        self._tries.pop(seq.seq_id, None)

    def gone(self, seq: SequenceState) -> None:
        """A sequence has ended, or waits anew."""
        group = self.restores.leave(seq)
        self.stats.orphaned += group is not None and group.orphan
        self._declined.discard(seq.seq_id)
        self._tries.pop(seq.seq_id, None)

    def give_up(self) -> bool:
        """Let go of blocks that were copied back for a sequence which still waits; False if there are none."""
        given_up = self.restores.give_up()
        self.stats.given_up += given_up
        return given_up

    # -- encoder rows ----------------------------------------------------------------------

    def has_rows(self, feature: MediaFeature, cost: int) -> bool:
        """Whether an item's rows are to be copied back rather than encoded."""
        entry = self.host.find(feature.key)
        if entry is None or entry.num_rows != feature.num_tokens:
            return False
        costs = replace(self._scheduler.costs, restore_seconds=0.0)  # they come within the step that needs them
        return self._scheduler.policy.restores(Restorable(0, cost, len(entry.slots) * self.config.slot_bytes), costs)

    def read_rows(self, key: bytes, step: int) -> tuple[int, ...]:
        """The slots that `step` copies an item's rows back from."""
        entry = self.host.hold(key)
        entry.hits += 1
        self._read_rows.append((step, key))
        self.stats.restored_items += 1
        self.stats.restored_rows += entry.num_rows
        self._tell("restored", "host", entry.content, entry.num_rows)
        return entry.slots

    def complete_step(self, step: int, damaged: Iterable[bytes]) -> None:
        """The step and all before it are done. damaged: items that were encoded although stored."""
        for key in damaged:
            self.stats.damaged += 1
            self.host.drop(key)
        while self._read_rows and self._read_rows[0][0] <= step:
            self.host.release(self._read_rows.popleft()[1])

    # -- forgetting ------------------------------------------------------------------------

    def lookup(self, contents: Iterable[BlockContent]) -> Stored:
        """Of a run of blocks behind those found on the device: how many lie where. Nothing is moved or counted."""
        return self.stock.count(contents)

    def forget(self, is_meant: Callable[[BlockContent], bool]) -> int:
        """Drop what is stored of certain blocks and items (whose content has the item's key and no token ids),
        copies in flight included; how many there were."""
        return self.forget_keys(self.stores.find_keys(is_meant))

    def forget_keys(self, keys: Iterable[bytes]) -> int:
        """As `forget`, by key."""
        wanted = set(keys)
        self.restores.forget(wanted.__contains__)
        return sum(self.stores.forget(key) for key in wanted)

    def clear(self) -> None:
        """Drop all that is stored, but for what is pinned in the host's memory."""
        self.restores.clear()
        self.stores.clear()

    # -- checks ----------------------------------------------------------------------------

    def counters(self) -> dict[str, dict[str, int]]:
        """For `stats`."""
        found = {"host_cache": {**self.host.counts(), **asdict(self.stats)}}
        if self.disk is not None:
            found["disk_cache"] = self.disk.counts()
        return found

    def check_integrity(self) -> None:
        """Raise RuntimeError where the books of the levels and of the copies in flight differ."""
        self.restores.check_integrity()
        holds = Counter(key for _, key in self._read_rows)
        holds.update(self.stores.spilling)
        holds.update(key for key in self.restores.keys if key not in self._loading)
        self.host.check_integrity(holds, self.stores.storing | self._loading)
        if self.disk is not None:
            self.disk.check_integrity()
        moving = len(self.stores.storing) + len(list(self.stores.spilling)) + self.restores.filling
        if self.in_flight != moving:
            raise RuntimeError("copies in flight are miscounted")
        if not self._loading <= set(self.restores.keys):
            raise RuntimeError("a block is read from disk for nobody")
        self.stores.check_integrity()
        if self._orders:
            raise RuntimeError("copies to the device were not ordered")
