"""The books of the host's memory: slots in one state each, what is least worth leaves, nothing that is in use does."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from mm_core.cache import BlockContent
from mm_core.cache.host import HostEntry, HostTier


def content(number: int, cost: float = 0.0) -> BlockContent:
    return BlockContent(number.to_bytes(2, "big"), (number,), encoder_cost=cost)


def key(number: int) -> bytes:
    return number.to_bytes(2, "big")


def put(tier: HostTier, number: int, cost: float = 0.0, count: int = 1, num_rows: int = 0) -> HostEntry:
    entry = tier.reserve(content(number, cost), 0 if num_rows else 4, count, num_rows)
    assert entry is not None
    landed = tier.land(entry.key, True)
    assert landed is entry
    return entry


def check(tier: HostTier, holds: dict[int, int] | None = None, storing: set[int] | None = None) -> None:
    tier.check_integrity({key(n): count for n, count in (holds or {}).items()}, {key(n) for n in storing or set()})


def test_an_entry_is_findable_when_its_copy_has_landed() -> None:
    tier = HostTier(4)
    assert tier.reserve(content(1), 4) is not None
    assert tier.find(key(1)) is None
    assert key(1) in tier
    assert tier.reserve(content(1), 4) is None, "the same key is stored twice"
    check(tier, storing={1})
    assert tier.counts()["storing"] == 1
    tier.land(key(1), True)
    assert tier.find(key(1)) is not None
    check(tier)


def test_a_copy_that_failed_leaves_nothing() -> None:
    tier = HostTier(4)
    tier.reserve(content(1), 4, 3, 12)
    assert tier.land(key(1), False) is None
    assert key(1) not in tier
    assert tier.counts()["free"] == 4
    check(tier)


def test_what_is_stored_together_lies_together() -> None:
    tier = HostTier(64)
    for number in range(64):
        put(tier, number)
    tier.make_room(24)
    slots = [put(tier, number).slots[0] for number in range(100, 124)]
    assert sum(b - a == 1 for a, b in pairwise(slots)) == 23
    assert put(HostTier(8), 1, count=5, num_rows=20).slots == (0, 1, 2, 3, 4)


def test_the_least_worth_leaves_first_and_uses_count() -> None:
    tier = HostTier(3)
    told: list[bytes] = []
    tier.on_evict = lambda entry: told.append(entry.key)
    for number, cost in ((1, 50.0), (2, 0.0), (3, 10.0)):
        put(tier, number, cost)
    tier.hold(key(2)).hits += 20
    tier.release(key(2))
    put(tier, 4, 5.0)
    assert told == [key(3)]
    put(tier, 5, 100.0)
    assert told == [key(3), key(4)]
    check(tier)
    assert (tier.evicted, tier.evicted_tokens) == (2, 8)


def test_age_counts_too() -> None:
    """What was dear once does not stay for ever: what leaves raises the worth of what comes."""
    tier = HostTier(2)
    put(tier, 1, 20.0)
    for number in range(2, 20):
        put(tier, number)
    assert tier.find(key(1)) is None


@pytest.mark.parametrize("how", ["held", "pinned", "storing"])
def test_what_is_in_use_stays(how: str) -> None:
    tier = HostTier(2)
    if how == "storing":
        tier.reserve(content(1), 4)
    else:
        put(tier, 1)
        _ = tier.hold(key(1)) if how == "held" else tier.pin(key(1))
    put(tier, 2, 1000.0)
    assert tier.room == 1
    assert put(tier, 3).slots == (1,)
    assert key(2) not in tier
    assert tier.reserve(content(4), 8, 2, 8) is None
    check(tier, {1: 1} if how == "held" else {}, {1} if how == "storing" else set())
    if how == "held":
        tier.release(key(1))
    elif how == "pinned":
        tier.unpin(key(1))
    else:
        tier.land(key(1), True)
    assert tier.room == 2
    check(tier)


@pytest.mark.parametrize("how", ["drop", "clear"])
def test_what_is_dropped_gives_its_slots_back_after_the_last_copy(how: str) -> None:
    tier = HostTier(4)
    put(tier, 1)
    tier.hold(key(1))
    tier.hold(key(1))
    tier.reserve(content(2), 4)
    for number in (1, 2):
        _ = tier.drop(key(number)) if how == "drop" else tier.clear()
    assert len(tier) == 0
    assert tier.find(key(1)) is None
    assert tier.reserve(content(1), 4) is None, "its key is in use"
    assert tier.counts()["leaving"] == 2
    check(tier, {1: 2}, {2})
    tier.release(key(1))
    assert tier.land(key(2), True) is None
    check(tier, {1: 1})
    tier.release(key(1))
    assert tier.counts()["free"] == 4
    check(tier)


def test_clear_keeps_what_is_pinned_and_drop_does_not() -> None:
    tier = HostTier(4)
    put(tier, 1)
    put(tier, 2)
    assert tier.pin(key(1))
    assert not tier.pin(key(9))
    tier.clear()
    assert [entry.key for entry in tier.entries()] == [key(1)]
    check(tier)
    assert tier.drop(key(1))
    assert not tier.drop(key(1))
    tier.unpin(key(1))
    assert tier.room == 4
    check(tier)


def test_books_that_do_not_balance_are_told() -> None:
    tier = HostTier(4)
    put(tier, 1)
    tier.hold(key(1))
    with pytest.raises(RuntimeError, match="held"):
        check(tier)
    tier.release(key(1))
    with pytest.raises(RuntimeError, match="twice"):
        tier.release(key(1))
    with pytest.raises(RuntimeError, match="twice"):
        tier.land(key(1), True)
    with pytest.raises(RuntimeError, match="storing"):
        check(tier, storing={5})
    tier.reserve(content(2), 4)
    with pytest.raises(RuntimeError, match="storing"):
        check(tier)


@pytest.mark.parametrize("seed", range(20))
def test_random_books(seed: int) -> None:
    """Any order of calls: every slot in one state, and as many evictable as `room` says."""
    dice = random.Random(seed)
    tier = HostTier(dice.randint(1, 24))
    holds: dict[int, int] = {}
    storing: set[int] = set()
    pins: dict[int, int] = {}
    for _ in range(400):
        number = dice.randrange(30)
        present = tier.find(key(number)) is not None
        match dice.randrange(8):
            case 0 | 1:
                count = dice.choice([1, 1, 1, 3])
                room, known = tier.room, key(number) in tier
                entry = tier.reserve(content(number, dice.random() * 9), 4, count)
                assert (entry is not None) == (count <= room and not known)
                if entry is not None:
                    assert len(set(entry.slots)) == count
                    storing.add(number)
                    pins.pop(number, None)
            case 2 | 3 if storing:
                done = dice.choice(sorted(storing))
                storing.remove(done)
                tier.land(key(done), dice.random() < 0.8)
            case 4 if present:
                tier.hold(key(number)).hits += 1
                holds[number] = holds.get(number, 0) + 1
            case 5 if holds:
                held = dice.choice(sorted(holds))
                tier.release(key(held))
                holds[held] -= 1
                if not holds[held]:
                    del holds[held]
            case 6 if dice.random() < 0.5:
                tier.drop(key(number))
                pins.pop(number, None)
            case 7 if present:
                if pins.get(number):
                    tier.unpin(key(number))
                    pins[number] -= 1
                else:
                    tier.pin(key(number))
                    pins[number] = 1
        check(tier, holds, storing)
        evictable = [e for e in tier.entries() if e.ready and not e.holds and not e.pins]
        assert tier.room == tier.counts()["free"] + sum(len(e.slots) for e in evictable)
        assert sum(tier.counts()[name] for name in ("free", "storing", "ready", "leaving")) == tier.num_slots
