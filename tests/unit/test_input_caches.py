"""The pipeline's caches: what is held, for whom, and what pins keep, against a plain model over random runs."""

from __future__ import annotations

import random
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from mm_core.errors import CacheFullError
from mm_core.inputs.caches import MediaName, NameRegistry, Owner, ProcessorCache
from mm_core.types import MediaFeature, MediaItem

OWNERS = [Owner(salt, uuid) for salt in (None, "s") for uuid in (None, "a", "b")]


def feature(key: bytes, size: int) -> MediaFeature:
    tensors = {"x": torch.zeros(size, dtype=torch.uint8)}
    return MediaFeature("image", 1, tensors, key=key)


def fill(cache: ProcessorCache, key: bytes, owner: Owner, size: int) -> bool:
    """Ask for a key, and make it where it is new; whether it was."""
    found, mine = cache.find_or_claim(key, owner)
    if mine is not None:
        cache.fill(key, mine, lambda: feature(key, size), lambda made: made)
    assert isinstance(found, MediaFeature | Future)
    return mine is not None


def check(cache: ProcessorCache) -> None:
    held = {**cache._features, **cache._pinned}
    assert len(held) == len(cache._features) + len(cache._pinned)
    assert cache._nbytes == sum(f.nbytes for f in held.values()) <= cache._capacity
    assert cache._pinned_bytes == sum(f.nbytes for f in cache._pinned.values()) <= cache._capacity // 2
    assert cache._owners.keys() == held.keys() | cache._in_flight.keys()
    assert {cache._owners[key] for key in cache._pinned} <= cache._pins


@pytest.mark.parametrize("seed", range(5))
def test_pinned_features_stay_and_the_bytes_add_up(seed: int) -> None:
    dice, cache = random.Random(seed), ProcessorCache(1000)
    kept: dict[Owner, set[bytes]] = {}
    full = 0
    for _ in range(600):
        owner = dice.choice(OWNERS)
        key = f"{owner}{dice.randint(0, 3)}".encode()
        action = dice.random()
        if action < 0.7:
            fill(cache, key, owner, 20 + (len(key) * 7 + key[-1] * 31) % 100)
        elif action < 0.8:
            before = {**cache._pinned}
            try:
                count = cache.pin(owner)
            except CacheFullError:
                full += 1
                assert cache._pinned == before
            else:
                held = {k for k, o in cache._owners.items() if o == owner}
                assert count == len(held) == cache.count(owner)
                if count:
                    kept[owner] = held & cache._pinned.keys()
        elif action < 0.9:
            assert cache.unpin(owner) is (owner in kept)
            kept.pop(owner, None)
        elif action < 0.93:
            count = cache.count(owner)
            assert cache.drop(lambda o, owner=owner: o == owner) == count
            kept.pop(owner, None)
        else:
            order, stats = list(cache._features), cache.stats()
            assert (cache.peek(key) is not None) is (key in cache._owners)
            assert (list(cache._features), cache.stats()) == (order, stats)
        for keys in kept.values():
            assert keys <= cache._pinned.keys(), "a pinned feature was dropped"
        check(cache)
    assert full > 3
    assert cache.stats().evicted > 20


def test_work_in_flight_that_is_dropped_is_handed_out_and_not_kept() -> None:
    cache, owner = ProcessorCache(1000), Owner(None, "a")
    found, mine = cache.find_or_claim(b"k", owner)
    assert mine is found
    assert cache.drop(lambda _: True) == 0
    again, other = cache.find_or_claim(b"k", owner)
    assert other is again is not mine, "whoever comes later makes it anew"
    assert mine is not None
    assert other is not None
    cache.fill(b"k", mine, lambda: feature(b"k", 10), lambda made: made)
    assert mine.result().nbytes == 10
    assert cache.peek(b"k") is other
    cache.fail(b"k", other, ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        other.result()
    assert cache.peek(b"k") is None
    check(cache)


def name_of(salt: str | None, number: int) -> MediaName:
    return MediaName(Owner(salt, f"item-{number}"), "image")


def test_one_tenant_forgets_its_own_names_first() -> None:
    """However many salts it uses: those of one key begin alike."""
    names, item = NameRegistry(100), MediaItem("image", b"d", None)
    key, other = "a" * 32, "b" * 64
    for number in range(100):
        names.put(name_of(key + f"{number % 7:032d}", number), item)  # nobody else is there: it may have all
    for number in range(50):
        names.put(name_of(other, number), item)
    for number in range(1000, 2000):
        names.put(name_of(key + f"{number:032d}", number), item)
    assert all(names.get(name_of(other, number), touch=False) for number in range(50))
    kept = [n for n in range(1000, 2000) if names.get(name_of(key + f"{n:032d}", n), touch=False)]
    assert kept == list(range(1950, 2000))


def test_names_of_long_videos_are_bounded_in_bytes() -> None:
    names = NameRegistry(10_000, max_bytes=10 * 2**20)
    video = MediaItem("video", b"d", None, {"times": tuple(map(float, range(768)))})
    for number in range(1000):
        names.put(name_of(None, number), video)
    kept = [number for number in range(1000) if names.get(name_of(None, number), touch=False)]
    assert 300 < len(kept) < 500
    assert kept[-1] == 999
    names.drop(lambda _: True)
    assert (names._total, dict(names._nbytes), names._tenants) == (0, {}, {})


@pytest.mark.parametrize("seed", range(4))
def test_names_are_bounded_but_for_pinned_ones(seed: int) -> None:
    dice, names = random.Random(seed), NameRegistry(5)
    known: dict[MediaName, Any] = {}
    pinned: set[Owner] = set()
    for number in range(400):
        owner = Owner(dice.choice([None, "s"]), dice.choice("abcdef"))
        name = MediaName(owner, dice.choice(["image", "video"]), "")
        action = dice.random()
        if action < 0.7:
            item = MediaItem(name.modality, str(number).encode(), None)
            names.put(name, item)
            known[name] = item
        elif action < 0.8:
            if names.pin(owner):
                pinned.add(owner)
        elif action < 0.93:
            names.unpin(owner)
            pinned.discard(owner)
        else:
            names.drop(lambda o, owner=owner: o == owner)
            pinned.discard(owner)
            known = {n: i for n, i in known.items() if n.owner != owner}
        held = {n: names.get(n, touch=False) for n in known}
        assert sum(item is not None and n.owner not in pinned for n, item in held.items()) <= 5
        for n, item in held.items():
            assert item in (None, known[n]), "a name stands for something else"
            assert item is not None or n.owner not in pinned, "a pinned name was dropped"
            assert names.knows(n.owner) is any(held[m] is not None for m in held if m.owner == n.owner)
        known = {n: i for n, i in known.items() if held[n] is not None}
