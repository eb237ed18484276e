"""What leaves a cache first, by the policy's worth; pins, forgetting, and who is told."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from support.fake_model import Tiers, World
from support.fake_requests import expected_tokens, feature, make_request

from mm_core.cache.blocks import BlockPool
from mm_core.cache.encoder import EncoderCache
from mm_core.cache.prefix import BlockContent, MediaTag, PrefixCache
from mm_core.cache.tags import Name
from mm_core.config import SamplingParams
from mm_core.hashing import ROOT
from mm_core.scheduler.costs import CostModel
from mm_core.scheduler.policy import (
    POLICIES,
    Restorable,
    Retained,
)
from mm_core.scheduler.retention import retain_by

# -- what it is worth ---------------------------------------------------------------------------------------------


def test_worth_weighs_seconds_and_hits_against_bytes_and_recency() -> None:
    worth = POLICIES["reuse"].worth
    thing = Retained(seconds=1.0, nbytes=10, hits=0, clock=0.0, stamp=1)
    assert worth(thing._replace(seconds=2.0)) > worth(thing)
    assert worth(thing._replace(hits=1)) == worth(thing._replace(seconds=2.0))
    assert worth(thing._replace(nbytes=20)) < worth(thing)
    assert worth(thing._replace(clock=0.2)) > worth(thing._replace(hits=1)), "what was dear becomes old"
    assert worth(thing._replace(stamp=9)) == worth(thing)
    assert POLICIES["fcfs"].worth(thing._replace(stamp=2, seconds=0.0)) > POLICIES["fcfs"].worth(thing)


def test_copied_back_where_that_is_faster() -> None:
    costs = CostModel(token_seconds=1e-4, encoder_seconds=1e-5, byte_seconds=1e-9, restore_seconds=1e-3)
    restores = POLICIES["reuse"].restores
    assert restores(Restorable(16, 0, 100_000), costs)
    assert not restores(Restorable(16, 0, 1_000_000), costs)
    assert restores(Restorable(16, 100, 1_000_000), costs), "its media would have to be encoded, too"
    assert restores(Restorable(16, 0, 10**9), CostModel()), "nothing is known"


def contents_of(count: int, name: str = "", **extra: Any) -> list[BlockContent]:
    keys = [f"{name}{i}".encode() for i in range(count)]
    return [
        BlockContent(key, (i,), keys[i - 1] if i else ROOT, number=i, **extra) for i, key in enumerate(keys)
    ]  # fmt: skip


def behind(contents: list[BlockContent], name: str) -> list[BlockContent]:
    """One block more."""
    key = contents[-1].key + name.encode()
    return [*contents, BlockContent(key, (99,), contents[-1].key, number=len(contents))]


def pool_of(num_blocks: int, policy: str = "reuse", costs: CostModel | None = None) -> tuple[BlockPool, PrefixCache]:
    pool = BlockPool(num_blocks, 16)
    prefix = PrefixCache(pool)
    retain_by(POLICIES[policy], lambda: costs or CostModel(), pool, EncoderCache(0))
    return pool, prefix


def compute(pool: BlockPool, prefix: PrefixCache, contents: list[BlockContent]) -> list[int]:
    """A sequence that finds what is there, computes the rest, and ends; its table."""
    found = prefix.lookup(contents)
    pool.share(found, hit=prefix.branches(found))
    table = [*found, *(pool.allocate(len(contents) - len(found)) or [])]
    for block, content in zip(table, contents, strict=True):
        prefix.publish(block, content)
    pool.free(table)
    pool.check_integrity([])
    prefix.check_integrity()
    return table


@pytest.mark.parametrize(("policy", "stays"), [("reuse", "media"), ("fcfs", "text")])
def test_what_costs_the_encoder_stays_longer(policy: str, stays: str) -> None:
    pool, prefix = pool_of(8, policy)
    media, text = contents_of(4, "m", encoder_cost=64.0), contents_of(4, "t")
    for contents in (media, text, contents_of(4, "new")):
        compute(pool, prefix, contents)
    assert len(prefix.lookup(media)) == (4 if stays == "media" else 0)
    assert len(prefix.lookup(text)) == (4 if stays == "text" else 0)


def test_what_was_found_stays_longer_and_yet_grows_old() -> None:
    pool, prefix = pool_of(7)
    used, other = contents_of(3, "u"), contents_of(4, "o")
    for contents in (behind(used, "a"), behind(used, "b"), behind(used, "c"), other, contents_of(4, "new")):
        compute(pool, prefix, contents)
    assert (len(prefix.lookup(used)), len(prefix.lookup(other))) == (3, 0)
    for number in range(4):
        compute(pool, prefix, contents_of(4, f"n{number}"))
    assert len(prefix.lookup(used)) == 0


def test_the_next_turn_of_a_chat_does_not_make_it_worth_more() -> None:
    pool, prefix = pool_of(10)
    chat = contents_of(5, "c")
    for turn in (1, 3, 5):
        compute(pool, prefix, chat[:turn])
    for number in range(2):
        compute(pool, prefix, contents_of(5, f"n{number}"))
    assert len(prefix.lookup(chat)) == 0, "the latest have it, whatever its turns"


def test_what_is_left_of_an_item_is_worth_no_more_than_text() -> None:
    pool, prefix = pool_of(9)
    tag = (MediaTag(b"picture"),)
    picture = contents_of(4, "p", encoder_cost=64.0, media=tag, touches=1)
    compute(pool, prefix, picture)
    compute(pool, prefix, contents_of(4, "t"))
    pool.share([prefix.find(c.key) for c in contents_of(4, "t")])  # now only the picture can leave, its end first
    taken = pool.allocate(2)
    assert taken is not None
    pool.free([prefix.find(c.key) for c in contents_of(4, "t")])
    assert len(prefix.lookup(picture)) == 3
    assert pool.allocate(3) is not None, "the rest of it goes before the text, which came later"
    assert len(prefix.lookup(picture)) == 0
    assert len(prefix.lookup(contents_of(4, "t"))) == 4


def test_measured_costs_decide() -> None:
    for encoder_seconds, media_stays in ((1e-5, True), (1e-8, False)):
        pool, prefix = pool_of(8, costs=CostModel(token_seconds=1e-5, encoder_seconds=encoder_seconds))
        media, text = contents_of(4, "m", encoder_cost=64.0), contents_of(3, "t")
        for contents in (media, behind(text, "a"), behind(text, "b")[:4], contents_of(4, "new")):
            compute(pool, prefix, contents)
        assert bool(prefix.lookup(media)) == media_stays


def test_a_tail_leaves_before_its_head() -> None:
    pool, prefix = pool_of(6)
    chain = contents_of(4)
    table = compute(pool, prefix, [chain[0], chain[1]._replace(encoder_cost=900.0), *chain[2:]])
    for left in (3, 2, 1, 0):
        while len(prefix) > left:
            block = pool.allocate(1)
            assert block is not None
        assert [b for b in table if prefix.content(b) is not None] == table[:left]


def test_what_left_before_its_parent_was_there_again_finds_its_place() -> None:
    """A block whose parent is published anew, by another sequence, is worth no more than that parent."""
    pool, prefix = pool_of(6)
    head, tail = contents_of(1)[0], contents_of(2)[1]._replace(encoder_cost=100.0)
    table = compute(pool, prefix, [head, tail])
    prefix.forget(table[0])  # on purpose: its child stays
    assert prefix.lookup([head, tail]) == []
    again = compute(pool, prefix, [head, *contents_of(1, "x")])  # the same head, by another
    assert prefix.lookup([head, tail]) == [again[0], table[1]]
    pool.allocate(pool.num_available - 1)
    assert prefix.find(head.key) == again[0]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(sorted(POLICIES)), st.booleans())
def test_no_block_outlives_the_one_through_which_it_is_found(seed: int, policy: str, steps: bool) -> None:
    """Random trees of blocks, shared, pinned and forgotten; `check_integrity` compares each with its parent."""
    dice = random.Random(seed)
    pool, prefix = pool_of(12, policy)
    live: list[list[int]] = []
    pinned: list[int] = []
    for number in range(60):
        if dice.random() < 0.6:
            keys = [dice.choice("ab") for _ in range(dice.randint(1, 5))]
            contents = [
                BlockContent(
                    "".join(keys[: i + 1]).encode(), (i,), "".join(keys[:i]).encode() or ROOT,
                    (MediaTag(b"x"),), dice.choice([0, 1]), encoder_cost=float(dice.choice([0, 0, 10, 300])),
                )
                for i in range(len(keys))
            ]  # fmt: skip
            found = prefix.lookup(contents)[: dice.choice([0, 9])]  # some compute what is there already
            if pool.num_available - pool.num_cached(found) >= len(keys) - len(found):
                pool.share(found, hit=prefix.branches(found))
                table = [*found, *(pool.allocate(len(keys) - len(found)) or [])]
                live.append(table)
                for block, content in zip(table, contents, strict=True):
                    prefix.publish(block, content)
        elif live and dice.random() < 0.7:
            pool.free(live.pop(dice.randrange(len(live))))
        elif prefix.contents():
            block = dice.choice(prefix.contents())[0]
            if dice.random() < 0.5:
                prefix.forget(block)
            elif len(pinned) < 3:
                pool.pin(block)
                pinned.append(block)
        pinned = [b for b in pinned if prefix.content(b) is not None]
        if pinned and dice.random() < 0.2:
            pool.unpin(pinned.pop())
        if steps:
            pool.begin_step(number)
            if number % 3 == 0:
                pool.complete_step(number - dice.randint(0, 2))
        pool.check_integrity(live)
        prefix.check_integrity()
    pool.complete_step(60)
    for table in live:
        pool.free(table)
    prefix.clear()
    assert pool.counts()["free"] + pool.counts()["pinned"] == 12


# -- pins, forgetting, and who is told ----------------------------------------------------------------------------


class Listener:
    def __init__(self) -> None:
        self.told: list[tuple[str, bytes]] = []

    def published(self, block: int, content: BlockContent) -> None:
        self.told.append(("published", content.key))

    def forgotten(self, block: int, content: BlockContent, evicted: bool) -> None:
        self.told.append(("evicted" if evicted else "forgotten", content.key))

    def encoded(self, key: bytes, rows: int) -> None:
        self.told.append(("encoded", key))

    def dropped(self, key: bytes, rows: int, cost: int, evicted: bool) -> None:
        self.told.append(("evicted" if evicted else "dropped", key))


def test_observers_are_told_who_gave_a_block_up() -> None:
    pool, prefix = pool_of(3)
    listener = Listener()
    prefix.observers.append(listener)
    first, second, third = contents_of(3)
    table = compute(pool, prefix, [first, second, third])
    compute(pool, prefix, [first, second, third])  # nothing new
    assert pool.allocate(1) == table[2:]
    prefix.drop([table[1], table[2]])
    prefix.clear()
    assert listener.told == [
        *(("published", c.key) for c in (first, second, third)),
        ("evicted", third.key), ("forgotten", second.key), ("forgotten", first.key),
    ]  # fmt: skip
    assert pool.counts() == {"free": 2, "cached": 0, "in_use": 1, "pending": 0, "pinned": 0}


def test_a_block_in_use_that_is_forgotten_is_free_when_its_holders_leave() -> None:
    pool, prefix = pool_of(4)
    contents = contents_of(2)
    table = compute(pool, prefix, contents)
    pool.share(table)
    prefix.forget(table[0])
    pool.check_integrity([table])
    assert prefix.lookup(contents) == []
    assert pool.counts()["in_use"] == 2
    pool.free(table)
    assert pool.counts() == {"free": 3, "cached": 1, "in_use": 0, "pending": 0, "pinned": 0}


def test_pins() -> None:
    pool, prefix = pool_of(4)
    contents = contents_of(2)
    table = compute(pool, prefix, contents)
    pool.pin(table[0])
    pool.pin(table[0])
    assert pool.counts() == {"free": 2, "cached": 1, "in_use": 0, "pending": 0, "pinned": 1}
    assert pool.num_available == 3
    assert pool.num_cached(table) == 1
    assert pool.allocate(4) is None
    others = pool.allocate(3)
    assert others is not None
    assert prefix.find(contents[0].key) == table[0]
    prefix.clear()
    assert prefix.find(contents[0].key) == table[0], "what is pinned is forgotten by name only"
    pool.share(table[:1])
    pool.unpin(table[0])
    pool.free(table[:1])
    assert pool.counts()["pinned"] == 1
    pool.unpin(table[0])
    assert pool.num_available == 1
    with pytest.raises(RuntimeError, match="nobody pinned"):
        pool.unpin(table[0])
    pool.pin(table[0])
    prefix.forget(table[0])
    pool.check_integrity([others])
    assert pool.counts() == {"free": 1, "cached": 0, "in_use": 3, "pending": 0, "pinned": 0}
    with pytest.raises(RuntimeError, match="nothing findable"):
        pool.pin(table[0])


def test_pinned_blocks_that_yield_are_ends_of_chains_and_not_the_spared() -> None:
    pool, prefix = pool_of(8)
    first, second = contents_of(4, "a"), contents_of(3, "b")
    tables = [compute(pool, prefix, contents) for contents in (first, second)]
    for block in (*tables[0], *tables[1]):
        pool.pin(block)
    pool.share(tables[0][:1])  # in use
    assert pool.surrender(2, tables[1]) == 2
    assert (len(prefix.lookup(first)), len(prefix.lookup(second))) == (2, 3)
    pool.check_integrity([tables[0][:1]])
    assert pool.surrender(9, tables[1][:2]) == 2
    assert (len(prefix.lookup(first)), len(prefix.lookup(second))) == (1, 2)
    assert pool.surrender(9, tables[1]) == 0
    assert pool.surrender(9) == 2
    assert pool.counts() == {"free": 7, "cached": 0, "in_use": 1, "pending": 0, "pinned": 0}
    pool.free(tables[0][:1])
    assert pool.counts()["pinned"] == 1, "who uses a pinned block does not lose it"


@pytest.mark.parametrize("overlap", [False, True], ids=["in-turn", "overlap"])
@pytest.mark.parametrize("tiers", [None, Tiers(8)], ids=["device", "host"])
def test_a_prompt_that_lacks_blocks_takes_pinned_ones_of_others(overlap: bool, tiers: Tiers | None) -> None:
    """A prompt of one chunk, which begins as a pinned one."""
    world = World(num_blocks=8, max_tokens=64, overlap=overlap, tiers=tiers)
    items = [replace(feature(name, 7), uuid=name) for name in "ab"]
    pins, names = world.core.keeper.pins, [Name(None, name) for name in "ab"]
    for item, name in zip(items, names, strict=True):
        world.add(make_request(item.key.decode(), [8, item]))
        world.run()
        assert pins.pin(name)[0] == 2
    once = SamplingParams(max_tokens=1, temperature=0)
    (seq,) = world.add(make_request("large", [8, items[0], *range(10, 29)], once))
    world.run()
    assert seq.output_token_ids == expected_tokens(seq.request, 1)
    assert (seq.num_cached_tokens, world.scheduler.stats.preemptions) == (8, 0)
    assert [len(pins.index.touching(name)) for name in names] == [2, 1]
    assert pins.num_blocks == 3
    (seq,) = world.add(make_request("all", range(10, 38)))
    world.run()
    assert seq.output_token_ids == expected_tokens(seq.request, 4)
    assert pins.num_blocks == 0
    world.add(make_request("again", [8, items[0]]))
    world.run()
    assert pins.num_blocks == 2, "the name is pinned all the same"
    assert not world.errors


def test_pinned_rows_yield_to_an_item_that_would_wait_for_ever() -> None:
    """Also while others run all the time, and keep none that have room beside what is pinned from running."""
    world = World(num_blocks=64, encoder_rows=20, reuse=False)
    items = {name: replace(feature(name, rows), uuid=name) for name, rows in (("a", 5), ("b", 5), ("c", 9), ("d", 13))}
    pins, rows = world.core.keeper.pins, world.scheduler.encoder_cache
    for name in "ab":
        world.add(make_request(name, [8, items[name]]))
        world.run()
        assert pins.pin(Name(None, name))[1] == 5
    world.add(make_request("c", [8, items["c"]]))
    world.run()
    assert pins.num_rows == 10, "there was room beside them"
    world.add(make_request("d", [8, items["d"]]))
    for number in range(20):  # somebody runs in each of the steps
        world.add(make_request(f"t{number}", [8, 9], SamplingParams(max_tokens=6, temperature=0)))
        world.step()
        assert world.core.has_work
    assert "d" not in world.core.request_ids
    assert (pins.num_rows, b"b" in rows) == (5, True), "the oldest went, and no more"
    world.run()
    assert world.runner.encoded == [b"a", b"b", b"c", b"d"]
    world.add(make_request("again", [8, items["a"]]))
    world.run()
    assert pins.num_rows == 10, "the name is pinned all the same"
    assert pins.pin(Name(None, "a"))[1] == 5
    for name in "ab":
        assert pins.unpin(Name(None, name))
    assert rows.room == rows.capacity
    assert not world.errors


def test_encoder_rows_go_by_the_policy_and_observers_are_told() -> None:
    for policy, gone in (("reuse", b"cheap"), ("fcfs", b"dear")):
        cache = EncoderCache(20)
        retain_by(POLICIES[policy], CostModel, BlockPool(1, 1), cache)
        listener = Listener()
        cache.observers.append(listener)
        for step, (key, cost) in enumerate([(b"dear", 400), (b"cheap", 40), (b"new", 40)]):
            assert cache.allocate(key, 8, cost, 1, step)
            cache.complete_step(step)
            cache.release(key, 1)
            cache.check_integrity(set())
        assert gone not in cache
        assert cache.drop(b"new")
        assert not cache.drop(gone)
        made = [("encoded", key) for key in (b"dear", b"cheap", b"new")]
        assert listener.told == [*made[:2], ("evicted", gone), made[2], ("dropped", b"new")]


def test_an_item_found_often_stays_in_the_encoder_cache() -> None:
    world = World(encoder_rows=20, reuse=False)
    for name in ("x", "y", "x", "x", "z", "x", "w", "x"):
        world.add(make_request(name, [10, feature(name, 8), 11]))
        world.run()
    assert world.runner.encoded == [b"x", b"y", b"z", b"w"]
