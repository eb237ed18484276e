"""Room for preprocessed media: what is counted, who waits, and that nobody waits for ever."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mm_core.errors import ContextLengthError, MediaTooLargeError
from mm_core.inputs.room import Room, Stay
from mm_core.types import MediaFeature


class Prepared:
    """Stands for a prepared request."""


def feature(key: bytes, nbytes: int = 60, rows: int = 1) -> MediaFeature:
    return MediaFeature("image", rows, {"x": torch.zeros(nbytes, dtype=torch.uint8)}, key=key)


def enter(room: Room) -> Stay:
    stay = Stay(1000, None)
    room.enter(stay)
    return stay


def waits(steps: Iterator[Any]) -> Any:
    """What a request waits for; None where it goes on."""
    return next(steps, None)


def test_shared_features_count_once_and_live_as_long_as_their_requests() -> None:
    room = Room(100)
    one, two = enter(room), enter(room)
    for stay in (one, two, two):
        room.count(stay, feature(b"a"))
    room.count(two, feature(b"b", 30))
    assert room.nbytes == 90
    first, second = Prepared(), Prepared()
    room.keep(one, first)
    room.keep(two, second)
    del second
    gc.collect()
    assert room.nbytes == 60
    del first
    gc.collect()
    assert room.nbytes == 0
    assert not any((room._users, room._sizes, room._preparing, room._prepared))


def test_requests_wait_until_a_prepared_one_is_over() -> None:
    room = Room(100)
    one, two = enter(room), enter(room)
    room.count(one, feature(b"a"))
    room.count(one, feature(b"b"))
    done = Prepared()
    room.keep(one, done)
    steps = room.wait(two)
    awaited = waits(steps)
    assert awaited is not None
    assert not awaited.done()
    del done
    gc.collect()
    assert awaited.done()
    assert waits(steps) is None


def test_of_those_that_wait_for_each_other_the_oldest_goes_on() -> None:
    room = Room(100)
    one, two = enter(room), enter(room)
    room.count(one, feature(b"a"))
    room.count(two, feature(b"b"))
    assert waits(room.wait(one)) is None
    steps = room.wait(two)
    awaited = waits(steps)
    assert awaited is not None
    room.leave(one)  # it failed
    assert awaited.done()
    assert waits(steps) is None
    assert room.nbytes == 60


def test_one_that_is_given_up_leaves_nothing() -> None:
    room = Room(10)
    one, two = enter(room), enter(room)
    room.count(one, feature(b"a"))
    steps = room.wait(two)
    awaited = waits(steps)
    assert awaited is not None
    assert awaited.alone  # nobody else waits for it: who gives up cancels it
    awaited.cancel()
    steps.close()
    assert not room._waiters
    room.leave(two)
    room.leave(one)
    assert room.nbytes == 0


def test_a_request_has_bounds_of_its_own() -> None:
    room = Room(10**6)
    stay = Stay(100, 10)
    room.enter(stay)
    room.count(stay, feature(b"a", 60, 4))
    with pytest.raises(MediaTooLargeError, match="100 bytes"):
        room.count(stay, feature(b"b", 60, 4))
    with pytest.raises(ContextLengthError, match="at least 10 tokens") as caught:
        room.count(stay, feature(b"c", 1, 2))
    assert caught.value.param == "prompt"
