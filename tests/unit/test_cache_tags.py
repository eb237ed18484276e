"""Who owns what is cached, what pins keep, what events tell: against plain models of the same, over random runs."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from mm_core.cache.blocks import BlockPool
from mm_core.cache.encoder import EncoderCache
from mm_core.cache.events import EventLog
from mm_core.cache.pins import Pins
from mm_core.cache.prefix import BlockContent, MediaTag, PrefixCache
from mm_core.cache.tags import ItemNames, Name, TagIndex, names_in, names_in_chain
from mm_core.errors import CacheFullError
from mm_core.hashing import ROOT
from mm_core.types import CacheEvent

SIZE = 16
SALTS = (None, "alice", "bob")
UUIDS = (None, "a", "b", "c")


def media_key(salt: str | None, uuid: str | None, number: int) -> bytes:
    return f"{salt}/{uuid}/{number}".encode()


@dataclass
class Caches:
    """The device's books, driven as the scheduler does: chains are published, freed and evicted."""

    num_blocks: int = 24
    capacity: int = 60
    pool: BlockPool = field(init=False)
    prefix: PrefixCache = field(init=False)
    rows: EncoderCache = field(init=False)
    items: ItemNames = field(init=False)
    step: int = 0

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.num_blocks, SIZE)
        self.prefix = PrefixCache(self.pool)
        self.rows = EncoderCache(self.capacity)
        self.items = ItemNames()

    def chain(self, salt: str | None, media: list[list[MediaTag]]) -> list[BlockContent]:
        """One block each for these lists of items that begin in it."""
        contents: list[BlockContent] = []
        parent, tags = ROOT, ()
        for number, begins in enumerate(media):
            tags = (*tags, *begins)
            ids = tuple(range(number, number + SIZE))
            key = repr((parent, ids, [t.key for t in begins], salt)).encode()
            contents.append(BlockContent(key, ids, parent, media=tags, touches=len(begins), salt=salt))
            parent = key
        return contents

    def run(self, contents: list[BlockContent]) -> list[int] | None:
        """A request that computes these blocks, and ends: its table, or None where there is no room."""
        shared = self.prefix.lookup(contents)
        self.pool.share(shared)
        new = self.pool.allocate(len(contents) - len(shared))
        if new is None:
            self.pool.free(shared)
            return None
        table = [*shared, *new]
        for block, content in zip(table, contents, strict=True):
            self.prefix.publish(block, content)
        return table

    def encode(self, key: bytes, rows: int) -> None:
        self.step += 1
        if key in self.rows:
            self.rows.acquire(key, self.step)
        elif not self.rows.allocate(key, rows, rows, self.step, self.step):
            return
        self.rows.begin_step(self.step)
        self.rows.complete_step(self.step)
        self.rows.release(key, self.step)
        self.rows.take_evicted()

    def published(self) -> dict[bytes, BlockContent]:
        return {content.key: content for _, content in self.prefix.contents()}


def random_chain(caches: Caches, choice: random.Random) -> list[BlockContent]:
    salt = choice.choice(SALTS)
    media: list[list[MediaTag]] = []
    for _ in range(choice.randint(1, 6)):
        begins = []
        for _ in range(choice.choice((0, 0, 1, 2))):
            uuid = choice.choice(UUIDS)
            key = media_key(salt, uuid, choice.randint(0, 1))
            if uuid is not None or salt is not None:
                caches.items.note(key, Name(salt, uuid))
            begins.append(MediaTag(key, uuid))
        media.append(begins)
    return caches.chain(salt, media)


def random_run(caches: Caches, choice: random.Random, held: list[list[int]]) -> None:
    """A few requests more, some of which end."""
    contents = random_chain(caches, choice)
    table = caches.run(contents)
    if table is not None:
        held.append(table)
    for tag in contents[-1].media[-2:]:
        caches.encode(tag.key, 4 + tag.key[-1] % 3)
    while len(held) > 2 or (held and choice.random() < 0.5):
        caches.pool.free(held.pop(choice.randrange(len(held))))


# -- the index -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("late", [False, True], ids=["from-the-start", "made-later"])
def test_the_index_is_what_a_search_finds(seed: int, late: bool) -> None:
    choice, caches = random.Random(seed), Caches()
    held: list[list[int]] = []
    index = None if late else TagIndex(caches.prefix)
    for _ in range(40):
        random_run(caches, choice, held)
    index = index or TagIndex(caches.prefix)
    for _ in range(40):
        random_run(caches, choice, held)
        if choice.random() < 0.2:
            caches.prefix.drop(index.of_name(Name(choice.choice(SALTS), choice.choice(UUIDS[1:]))))
        found = dict(caches.prefix.contents())
        for salt in SALTS:
            assert index.of_salt(salt) == sorted(b for b, c in found.items() if c.salt == salt)
            for uuid in UUIDS[1:]:
                name = Name(salt, uuid)
                assert index.of_name(name) == sorted(b for b, c in found.items() if name in names_in_chain(c))
                assert index.touching(name) == sorted(b for b, c in found.items() if name in names_in(c))
        index.check_integrity()


def test_a_name_is_a_uuid_within_a_salt() -> None:
    caches = Caches()
    index = TagIndex(caches.prefix)
    for salt in ("alice", "bob"):
        caches.run(caches.chain(salt, [[MediaTag(media_key(salt, "x", 0), "x")], []]))
    assert len(index.of_name(Name("alice", "x"))) == len(index.of_name(Name("bob", "x"))) == 2
    assert not {*index.of_name(Name("alice", "x"))} & {*index.of_name(Name("bob", "x"))}
    assert index.of_name(Name(None, "x")) == []


def test_ancestors_end_where_the_chain_is_broken() -> None:
    caches = Caches()
    index = TagIndex(caches.prefix)
    table = caches.run(caches.chain(None, [[], [], [MediaTag(b"k", "x")], []]))
    assert table is not None
    assert index.with_ancestors([table[2]]) == {*table[:3]}
    caches.prefix.forget(table[1])
    assert index.with_ancestors([table[2]]) == {table[2]}


def test_item_names_are_bounded_and_found_both_ways() -> None:
    items = ItemNames(3)
    for number in range(3):
        items.note(bytes([number]), Name("s", "x"))
    items.note(bytes([0]), Name("s", "x"))  # the newest again
    items.note(bytes([9]), Name("t", None))
    assert items.keys(Name("s", "x")) == [bytes([0]), bytes([2])]
    assert (items.keys_of_salt("t"), items.name(bytes([1])), items.name(bytes([9]))) == ([b"\x09"], None, ("t", None))
    items.drop([bytes([0]), bytes([2]), b"none"])
    assert items.keys(Name("s", "x")) == []


# -- pins ------------------------------------------------------------------------------------------


def wanted_pins(caches: Caches, pins: Pins, name: Name) -> set[bytes]:
    """Keys of the blocks that a pin of that name keeps, from the contents alone."""
    found = caches.published()
    keys: set[bytes] = set()
    for content in found.values():
        if name in names_in(content):
            at: BlockContent | None = content
            while at is not None:
                keys.add(at.key)
                at = found.get(at.parent)
    return keys


@pytest.mark.parametrize("seed", range(8))
def test_pinned_blocks_and_rows_outlive_any_flood(seed: int) -> None:
    choice, caches = random.Random(seed), Caches()
    pins = Pins(caches.pool, caches.prefix, caches.rows, caches.items)
    held: list[list[int]] = []
    kept: dict[Name, tuple[set[bytes], set[bytes]]] = {}
    full = 0
    for turn in range(150):
        random_run(caches, choice, held)
        name = Name(choice.choice(SALTS), choice.choice(UUIDS[1:]))
        if turn % 5 == 0:
            before = (pins.num_blocks, pins.num_rows, {*pins.names})
            wanted = wanted_pins(caches, pins, name)
            try:
                blocks, rows, _ = pins.pin(name)
            except CacheFullError:
                full += 1
                assert (pins.num_blocks, pins.num_rows, pins.names) == before, "half pinned"
            else:
                assert blocks == len(wanted)
                present = {key for key in caches.items.keys(name) if key in caches.rows}
                assert rows == sum(map(caches.rows.rows_of, present))
                kept[name] = (wanted, present)
        elif turn % 11 == 0 and pins.names:
            name = choice.choice(sorted(pins.names, key=str))
            assert pins.unpin(name)
            assert not pins.unpin(name)
            kept.pop(name, None)
        elif turn % 13 == 0:  # on purpose: pins do not hold that up
            assert pins.unpin(name) is (name in kept)
            caches.prefix.drop(pins.index.of_name(name))
            gone = {c.key for c in caches.published().values() if name in names_in_chain(c)}
            assert not gone
            kept.pop(name, None)
            kept = {n: (b & caches.published().keys(), r) for n, (b, r) in kept.items()}
        for blocks_kept, rows_kept in kept.values():
            assert blocks_kept <= caches.published().keys(), "a pinned block was evicted"
            assert all(key in caches.rows for key in rows_kept), "pinned rows were evicted"
        pins.check_integrity()
        caches.pool.check_integrity(held)
        caches.rows.check_integrity(set())
        assert pins.num_blocks <= caches.num_blocks // 2
        assert pins.num_rows <= caches.capacity // 2
    assert full, "the bound was never met: nothing was tested of it"
    assert caches.pool.evictions > 50
    for name in list(pins.names):
        pins.unpin(name)
    assert (pins.num_blocks, pins.num_rows) == (0, 0)
    assert caches.pool.counts()["pinned"] == 0


def test_what_is_published_later_joins_the_pinned() -> None:
    caches = Caches()
    pins = Pins(caches.pool, caches.prefix, caches.rows, caches.items)
    tag = MediaTag(b"k", "x")
    caches.items.note(b"k", Name(None, "x"))
    assert pins.pin(Name(None, "x")) == (0, 0, 0)
    caches.pool.free(caches.run(caches.chain(None, [[], [tag], []])) or [])
    caches.encode(b"k", 5)
    assert (pins.num_blocks, pins.num_rows) == (2, 5), "the block behind the item is an ordinary one"
    for number in range(40):
        caches.pool.free(caches.run(caches.chain(f"s{number}", [[], []])) or [])
        caches.encode(bytes([number]), 20)
    assert len(caches.prefix.lookup(caches.chain(None, [[], [tag], []]))) == 2
    assert b"k" in caches.rows


def test_what_comes_later_and_is_too_much_is_left_out() -> None:
    caches = Caches(num_blocks=8)
    pins = Pins(caches.pool, caches.prefix, caches.rows, caches.items)
    pins.pin(Name(None, "x"))
    for number in range(3):
        tag = MediaTag(bytes([number]), "x")
        caches.pool.free(caches.run(caches.chain(None, [[MediaTag(b"other")] * number, [tag]])) or [])
    assert pins.num_blocks == 4
    assert pins.left_out == 1
    pins.check_integrity()


# -- events ----------------------------------------------------------------------------------------


def replay(events: list[CacheEvent]) -> dict[tuple[str, str], set[bytes]]:
    """What can be found, by cache and level, if these events are all there is."""
    found: dict[tuple[str, str], set[bytes]] = {}
    for event in events:
        there = found.setdefault((event.cache, event.level), set())
        if event.kind == "evicted":
            assert event.key in there, "evicted though it was not there"
            there.remove(event.key)
        else:
            assert event.key not in there, "stored twice"
            there.add(event.key)
    return found


@pytest.mark.parametrize("seed", range(6))
def test_replayed_events_give_what_can_be_found(seed: int) -> None:
    choice, caches = random.Random(seed), Caches()
    log = EventLog(caches.prefix, caches.rows, caches.items, SIZE)
    held: list[list[int]] = []
    for _ in range(choice.randint(0, 30)):
        random_run(caches, choice, held)
    assert log.take() == (), "nobody listens"
    log.start()
    events = list(log.snapshot())
    for _ in range(60):
        random_run(caches, choice, held)
        if choice.random() < 0.1:
            caches.prefix.clear()
        events += log.take()
        found = replay(events)
        assert found.get(("kv", "device"), set()) == caches.published().keys()
        assert found.get(("encoder", "device"), set()) == {*caches.rows.keys()}
    assert {e.kind for e in events} == {"stored", "evicted"}
    tree = {e.key: e for e in events if e.cache == "kv" and e.kind == "stored"}
    for key, content in caches.published().items():
        told = tree[key]
        assert (told.parent, told.token_ids, told.num_tokens) == (content.parent, content.token_ids, SIZE)
        assert {*told.uuids} == {name.uuid for name in names_in(content)}
    log.stop()
    random_run(caches, choice, held)
    assert log.take() == ()
    assert log not in caches.prefix.observers
    assert log not in caches.rows.observers
