"""An engine's world without tensors: every KV slot tells what it holds, and every read is checked.

The KV of a token is a chain: a number that depends on the token and on all before it. A next token
depends on the chain of the last. At launch the runner checks every slot and every encoder row that
a step reads, as a device would see them at that place of its queue; what it sampled is told only by
`wait`. Blocks and rows that a step in flight reads or writes must not be written by another.

What an item's failure spoils without anybody knowing at launch is poison: KV made of it is, and so are
tokens drawn from that. No such token may come out.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import chain
from types import SimpleNamespace
from typing import Any

from mm_core.cache import BlockPool, EncoderCache
from mm_core.cache.host import HostTier
from mm_core.engine.core import EngineCore
from mm_core.engine.messages import Submit
from mm_core.errors import EngineError, MMError
from mm_core.hashing import get_hasher
from mm_core.runner.step import LaunchedStep
from mm_core.scheduler import (
    EncodeItem,
    SampledToken,
    ScheduledBatch,
    ScheduledSequence,
    Scheduler,
    SchedulerConfig,
    Sequence,
    StepResult,
)
from mm_core.scheduler.policy import POLICIES, SchedulingPolicy
from mm_core.scheduler.tier_types import TierConfig
from mm_core.types import PreparedRequest
from support.fake_requests import Truth
from support.fake_tiers import CopyFaults, FakeDisk, FakeTransfers

POISON = -1
POISONED_TOKEN = 1  # no healthy token is below 8


def make_scheduler(
    num_blocks: int = 32,
    block_size: int = 4,
    max_num_seqs: int = 8,
    max_tokens: int = 16,
    encoder_budget: int = 64,
    encoder_rows: int = 64,
    reuse: bool = True,
    source_budget: int = 0,
    expected: float = 0.0,
    policy: SchedulingPolicy = POLICIES["reuse"],
    copy_tokens: int = 0,
) -> Scheduler:
    """expected: output tokens that admission counts on; none, so that sequences are preempted in a small pool."""
    max_len = num_blocks * block_size
    config = SchedulerConfig(max_num_seqs, max_tokens, encoder_budget, max_len, reuse, source_budget, copy_tokens)
    scheduler = Scheduler(
        config,
        BlockPool(num_blocks, block_size),
        EncoderCache(encoder_rows),
        get_hasher("xxh3_128"),
        lambda f: f.info["cost"],
        policy,
    )
    scheduler.outlook.expected = expected
    return scheduler


@dataclass(frozen=True)
class Faults:
    """What goes wrong in a step. nan: sequences without usable logits. media: items that give no rows;
    late: that is not known at launch. dies: the launch raises; lost: `wait` does."""

    nan: frozenset[int] = frozenset()
    media: frozenset[bytes] = frozenset()
    late: bool = False
    dies: BaseException | None = None
    lost: BaseException | None = None


class _InFlight:
    """What a launched step reads and writes."""

    def __init__(self, batch: ScheduledBatch) -> None:
        self.blocks: dict[int, set[tuple[int, int]]] = {}
        for s in batch.sequences:
            for block in chain.from_iterable(s.tables.values()):
                self.blocks.setdefault(block, set()).add((s.seq.seq_id, s.epoch))
        self.media = {item.key for item in batch.encode}.union(*(media_of(s, batch) for s in batch.sequences))


def media_of(s: ScheduledSequence, batch: ScheduledBatch) -> set[bytes]:
    """Items whose rows a sequence reads in a step."""
    if s.seq in batch.sources:
        return {r.feature.key for r in s.seq.media}
    return {r.feature.key for r in s.seq.ranges if r.offset < s.start + s.length and r.end > s.start}


class _Rows(dict[bytes, list[int]]):
    """Places of items' rows in the slab."""

    calls = 0
    clock = SimpleNamespace(seconds=lambda: 0.0)


class FakeRunner:
    """A device with a queue: what is launched later sees what was launched before.

    broken: the first fault of the scheduler that was seen; the engine takes it for a step's failure.
    """

    def __init__(self, block_size: int, encoder_rows: int = 64, host_slots: int = 0, seed: int = 0) -> None:
        self.block_size = block_size
        self.slots: dict[int, int | tuple[bytes, int]] = {}  # KV slot → chain; of a source, its key and a row
        self.last_ids: dict[int, tuple[int, int, int, int]] = {}  # slot → seq_id, epoch, position, token
        self.slab: list[tuple[bytes, int] | None] = [None] * encoder_rows
        self.rows = _Rows()
        self.kv = SimpleNamespace(bytes=0)
        self.encoded: list[bytes] = []
        self.sources: list[bytes] = []  # computed, by key
        self.computed_tokens = 0
        self.in_flight: list[_InFlight] = []
        self.most_in_flight = 0
        self.broken: BaseException | None = None
        self.faults: Callable[[ScheduledBatch], Faults] = lambda batch: Faults()
        self.transfers = FakeTransfers(self, host_slots, seed=seed)
        self._truths: dict[int, Truth] = {}
        self._spoilt: set[bytes] = set()

    def launch(self, batch: ScheduledBatch) -> LaunchedStep:
        try:
            return self._launch(batch)
        except (AssertionError, LookupError) as error:
            self.broken = self.broken or error
            raise

    def execute(self, batch: ScheduledBatch) -> StepResult:
        return self.launch(batch).wait()

    def _launch(self, batch: ScheduledBatch) -> LaunchedStep:
        self._check_order(batch)
        self.transfers.launch(batch.transfers)
        filling = self.transfers.filling
        assert not any(filling & {*t} for s in batch.sequences for t in s.tables.values()), "a block is used too early"
        for key in batch.evicted_media:
            if key not in self._spoilt:  # what reads a spoilt item is void
                assert not any(key in other.media for other in self.in_flight), "evicted under a step in flight"
            self.rows.pop(key, None)
            self._spoilt.discard(key)
        faults = self.faults(batch)
        if faults.dies is not None:
            raise faults.dies
        damaged = {item.key for item in batch.encode if item.stored and not self._read_back(item)}
        for item in batch.encode:
            made = not item.stored or item.key in damaged
            if made and (item.key not in faults.media or faults.late):
                self._encode(item, spoilt=item.key in faults.media)
        if faults.lost is not None:  # nobody can tell what became of their rows
            self._spoilt.update(item.key for item in batch.encode)
        failed: dict[int, MMError] = {
            s.seq.seq_id: EngineError("its item could not be encoded")
            for s in batch.sequences
            if media_of(s, batch) & faults.media
        }
        good = [s for s in batch.sequences if faults.late or s.seq.seq_id not in failed]
        assert {id(seq) for seq in batch.sources} <= {id(s.seq) for s in batch.sequences}
        for s in good:
            if s.seq in batch.sources:
                self._write_source(s)
        for s in good:
            self._write(s)
        for s in good:
            self._check_reads(s)
        sampled = {s.seq.seq_id: self._sample(s) for s in good if s.samples}
        sampled |= {seq_id: SampledToken(0, finite=False) for seq_id in faults.nan & sampled.keys()}
        step = _InFlight(batch)
        self.in_flight.append(step)
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))

        def wait() -> StepResult:
            assert self.in_flight[0] is step, "taken in out of order"
            self.in_flight.remove(step)
            if faults.lost is not None:
                raise faults.lost
            return StepResult(sampled, failed, faults.media, frozenset(damaged))

        return LaunchedStep(wait, bool(failed or faults.media) and not faults.late)

    def _check_order(self, batch: ScheduledBatch) -> None:
        lengths = [s.length for s in batch.sequences]
        assert lengths == sorted(lengths, key=lambda n: n > 1), "decodes come first"
        assert batch.num_decodes == lengths.count(1)
        assert min(lengths, default=1) > 0
        slots = [s.seq.slot for s in batch.sequences]
        assert len(set(slots)) == len(slots)
        assert min(slots, default=0) >= 0

    def _read_back(self, item: EncodeItem) -> bool:
        rows = self.transfers.read_rows(item.key, item.stored)
        if rows is not None:
            for place, row in zip(self._take_places(item), rows, strict=True):
                self.slab[place] = row
        return rows is not None

    def _take_places(self, item: EncodeItem) -> list[int]:
        assert item.key not in self.rows, "encoded although present"
        count, taken = item.feature.num_tokens, {place for places in self.rows.values() for place in places}
        free = [place for place in range(len(self.slab)) if place not in taken]
        assert len(free) >= count, "more rows than the slab has"
        self.rows[item.key] = free[:count]
        return free[:count]

    def _encode(self, item: EncodeItem, *, spoilt: bool) -> None:
        if spoilt:
            self._spoilt.add(item.key)
        for row, place in enumerate(self._take_places(item)):
            self.slab[place] = None if spoilt else (item.key, row)
        self.encoded.append(item.key)
        self.rows.calls += 1

    def _place(self, s: ScheduledSequence, position: int) -> int:
        return s.tables["self"][position // self.block_size] * self.block_size + position % self.block_size

    def _write_source(self, s: ScheduledSequence) -> None:
        source, table = s.seq.request.source, s.tables["cross"]
        assert source is not None
        assert len(table) == -(-source.num_tokens // self.block_size)
        self._check_writable(s, table)
        spoilt = False
        for feature in (r.feature for r in source.ranges):
            assert feature.key in s.seq.held_media
            for row, place in enumerate(self.rows[feature.key]):
                assert self.slab[place] in (None, (feature.key, row)), "the row of another item is read"
                spoilt |= self.slab[place] is None
        for row in range(source.num_tokens):
            place = table[row // self.block_size] * self.block_size + row % self.block_size
            self.slots[place] = POISON if spoilt else (source.key, row)
        self.sources.append(source.key)

    def _check_writable(self, s: ScheduledSequence, blocks: Iterable[int]) -> None:
        for block in blocks:
            for other in self.in_flight:
                users = other.blocks.get(block, set())
                assert users <= {(s.seq.seq_id, s.epoch)}, "a block is written that a step in flight uses"

    def _reads_poisoned_source(self, s: ScheduledSequence) -> bool:
        """Check that all of the sequence's source is there by now; whether it is spoilt."""
        source = s.seq.request.source
        found = set()
        for row in range(0 if source is None else source.num_tokens):
            place = s.tables["cross"][row // self.block_size] * self.block_size + row % self.block_size
            assert self.slots[place] in (POISON, (source.key, row)), "another source is read, or one not computed"
            found.add(self.slots[place] == POISON)
        return True in found

    def _truth(self, seq: Sequence) -> Truth:
        return self._truths.setdefault(seq.seq_id, Truth(seq.request))

    def _write(self, s: ScheduledSequence) -> None:
        self.computed_tokens += s.length
        spoilt_source = self._reads_poisoned_source(s)
        first, last = s.start // self.block_size, (s.start + s.length - 1) // self.block_size
        self._check_writable(s, s.tables["self"][first : last + 1])
        for position in range(s.start, s.start + s.length):
            spoilt = spoilt_source or (position > 0 and self.slots[self._place(s, position - 1)] == POISON)
            spoilt |= self._reads_poison(s, position)
            self.slots[self._place(s, position)] = POISON if spoilt else self._truth(s.seq).chain(position)

    def _reads_poison(self, s: ScheduledSequence, position: int) -> bool:
        """Check that the token's id, or encoder row, is there by now; whether that one is spoilt."""
        seq = s.seq
        for r in seq.ranges:
            if r.offset <= position < r.end:
                row = position - r.offset
                found = self.slab[self.rows[r.feature.key][row]]
                assert found in (None, (r.feature.key, row)), "the row of another item is read"
                return found is None
        if position < seq.prompt_len:
            return False
        wanted = self._truth(seq).token(position - seq.prompt_len)
        if position < len(seq.token_ids):
            assert seq.token_ids[position] == wanted
            return False
        token = self.last_ids[seq.slot][3]
        assert self.last_ids[seq.slot][:3] == (seq.seq_id, s.epoch, position), "no id for this token"
        assert token in (wanted, POISONED_TOKEN)
        return token == POISONED_TOKEN

    def _check_reads(self, s: ScheduledSequence) -> None:
        truth = self._truth(s.seq)
        for position in range(s.start + s.length):
            read = self.slots[self._place(s, position)]
            assert read in (truth.chain(position), POISON), "the KV of another token is read"

    def _sample(self, s: ScheduledSequence) -> SampledToken:
        end = s.start + s.length
        spoilt = self.slots[self._place(s, end - 1)] == POISON
        token = POISONED_TOKEN if spoilt else self._truth(s.seq).token(end - s.seq.prompt_len)
        self.last_ids[s.seq.slot] = (s.seq.seq_id, s.epoch, end, token)
        return SampledToken(token)


@dataclass(frozen=True)
class Tiers:
    """What a world has behind the device. always: whatever the policy says of its cost, what can be is copied back.
    max_filling: blocks."""

    slots: int
    places: int = 0
    faults: CopyFaults = field(default_factory=CopyFaults)
    always: bool = True
    max_filling: int = 1024
    max_spills: int = 4
    seed: int = 0


class World:
    """Engine core and fake runner, with the books checked whenever they change."""

    def __init__(
        self, *, overlap: bool = False, tiers: Tiers | None = None, policy: str = "reuse", **settings: Any
    ) -> None:
        found = POLICIES[policy]
        if tiers is not None and tiers.always:
            found = replace(found, restores=lambda what, costs: True)
        self.scheduler = make_scheduler(policy=found, **settings)
        seed, slots = (0, 0) if tiers is None else (tiers.seed, tiers.slots)
        capacity = self.scheduler.encoder_cache.capacity
        self.runner = FakeRunner(self.scheduler.pool.block_size, capacity, slots, seed)
        self.disk: FakeDisk | None = None
        if tiers is not None:
            self.disk = FakeDisk(tiers.places) if tiers.places else None
            config = TierConfig(8, 2, max_filling=8 * tiers.max_filling, max_spills=tiers.max_spills)
            self.scheduler.add_tiers(HostTier(slots), config, self.disk)
            self.runner.transfers.faults = tiers.faults
        ticks = itertools.count()
        self.core = EngineCore(self.scheduler, self.runner, 0, overlap, lambda: next(ticks) * 1e-3)  # type: ignore[arg-type]
        self.sequences: list[Sequence] = []
        self.errors: dict[str, MMError] = {}
        self._check("schedule")
        self._check("update")
        self._check("take_transfers")

    def _check(self, name: str) -> None:
        real = getattr(self.scheduler, name)

        def checked(*args: Any) -> Any:
            done = real(*args)
            self.check()
            if name == "update":
                assert all(event.token_id != POISONED_TOKEN for event in done), "a poisoned token came out"
            if isinstance(done, ScheduledBatch):
                assert done.num_tokens <= self.scheduler.config.max_num_batched_tokens
            return done

        setattr(self.scheduler, name, checked)

    def check(self) -> None:
        """Whether the books balance."""
        self.scheduler.check_integrity()
        self.core.keeper.check_integrity()

    def add(self, request: PreparedRequest) -> list[Sequence]:
        before = len(self.scheduler.waiting)
        self.errors |= {o.request_id: o.error for o in self.core.handle(Submit(request)) if o.error}
        new = list(self.scheduler.waiting)[before:]
        self.sequences += new
        return new

    def step(self) -> None:
        if self.core.has_work:
            outputs = self.core.step()
            if self.runner.broken:
                raise self.runner.broken
            self.errors |= {o.request_id: o.error for o in outputs if o.error}

    def run(self, limit: int = 3000) -> None:
        for _ in range(limit):
            if not self.core.has_work:
                assert not self.runner.in_flight
                self.core.drain()
                self.scheduler.check_integrity()
                assert not self.runner.transfers.pending
                return
            self.step()
        raise AssertionError("the engine did not finish")


def random_faults(seed: int, rate: float) -> Callable[[ScheduledBatch], Faults]:
    """NaN logits, items that cannot be encoded and steps that fail, now and then."""
    dice = random.Random(seed)

    def odd(batch: ScheduledBatch) -> Faults:
        if dice.random() >= rate:
            return Faults()
        kind = dice.choice(["nan", "media", "late", "dies", "lost"])
        if kind == "dies":
            return Faults(dies=RuntimeError("not launched"))
        if kind == "lost":
            return Faults(lost=RuntimeError("failed on the device"))
        if kind == "nan" and batch.sequences:
            return Faults(nan=frozenset({dice.choice(batch.sequences).seq.seq_id}))
        made = [item.key for item in batch.encode if not item.stored]
        return Faults(media=frozenset({dice.choice(made)}), late=kind == "late") if made else Faults()

    return odd
