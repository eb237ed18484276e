"""Shared memory for media: the allocator's books, slots that several requests use, tensors on the other side."""

from __future__ import annotations

import os
import queue

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_core.config import EngineConfig
from mm_core.engine.process.arena import PAGE, Allocator, Arena, arena_bytes, open_memory
from mm_core.engine.process.views import ArenaViews
from mm_core.engine.process.wire import ProtocolError, WireFeature, WireTensor
from mm_core.types import MediaFeature

ROOM = 64 * PAGE


def feature(key: bytes, *sizes: int, dtype: torch.dtype = torch.uint8) -> MediaFeature:
    made = {f"t{i}": (torch.arange(size) % 100).to(dtype) for i, size in enumerate(sizes)}
    return MediaFeature("image", 1, made, key=key)


@given(st.lists(st.one_of(st.integers(0, 40 * PAGE), st.integers(-1000, -1)), max_size=120))
def test_the_allocator_keeps_its_books(actions):
    books, held = Allocator(ROOM), {}
    for action in actions:
        if action >= 0:
            room = max((size for _, size in books._free), default=0)
            offset = books.allocate(action)
            wanted = max(-(-action // PAGE), 1) * PAGE
            assert (offset is None) == (wanted > room)  # what fits in one piece is never refused
            if offset is not None:
                assert all(offset >= o + s or offset + wanted <= o for o, s in held.items())
                held[offset] = wanted
        elif held:
            offset = sorted(held)[action % len(held)]
            books.free(offset)
            del held[offset]
        books.check_integrity()
        assert books.used == sum(held.values())
    for offset in held:
        books.free(offset)
    assert books._free == [(0, ROOM)]


def no_memory(*_):
    raise MemoryError


def test_a_copy_that_fails_leaves_nothing(monkeypatch):
    arena = Arena(ROOM)
    try:
        held, lost = feature(b"held", 10), feature(b"lost", 10)
        assert arena.place([held])[b"held"].mentions == 1
        with monkeypatch.context() as patch:
            patch.setattr(Arena, "_copy", no_memory)
            with pytest.raises(MemoryError):
                arena.place([held, lost])
        assert arena.counts()["items"] == 1
        placed = arena.place([held, lost])  # copied now
        assert (placed[b"held"].mentions, placed[b"lost"].mentions) == (2, 1)
        begin = placed[b"lost"].offset
        assert arena._bytes[begin : begin + 10].tolist() == list(range(10))
    finally:
        arena.close()


def test_a_piece_is_given_back_once():
    books = Allocator(ROOM)
    offset = books.allocate(5)
    books.free(offset)
    with pytest.raises(KeyError):
        books.free(offset)
    books._free.append((0, PAGE))
    with pytest.raises(RuntimeError, match="wrong at"):
        books.check_integrity()


class Sides:
    """An arena and a reader of it, in one process."""

    def __init__(self, nbytes: int = ROOM) -> None:
        self.arena = Arena(nbytes)
        self.gone: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.views = ArenaViews(self.arena.descriptor, nbytes, self.gone)

    def send(self, *features: MediaFeature) -> list[WireFeature] | None:
        slots = self.arena.place(features)
        if slots is None:
            return None
        sent = []
        for item in features:
            slot = slots[item.key]
            tensors = [WireTensor(t.name, t.dtype, list(t.shape), t.offset) for t in slot.tensors]
            where = (slot.number, slot.offset, slot.nbytes)
            sent.append(WireFeature("image", 1, {}, item.key, None, None, *where, tensors))
        return sent

    def settle(self) -> None:
        while not self.gone.empty():
            told = self.views.released(self.gone.get())
            if told is not None:
                self.arena.released(*told)
        self.arena.check_integrity()


@pytest.fixture
def sides():
    made = Sides()
    yield made
    made.arena.close()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32, torch.bfloat16, torch.int64])
def test_tensors_arrive(sides, dtype):
    item = feature(b"k", 7, 0, 300, dtype=dtype)
    item.tensors["square"] = torch.arange(12).reshape(3, 4).T.to(dtype)  # type: ignore[index]
    item.tensors["one"] = torch.tensor(1).to(dtype)  # type: ignore[index]
    (sent,) = sides.send(item)
    found = sides.views.tensors(sent)
    assert list(found) == list(item.tensors)
    for name, tensor in item.tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    del found
    sides.settle()
    assert sides.arena.counts() == {"bytes": ROOM, "used": 0, "items": 0}


def test_an_item_is_copied_once_and_freed_behind_its_last_reader(sides):
    item = feature(b"k", 5000)
    (first,), (second,) = sides.send(item), sides.send(item)
    assert (first.number, first.offset) == (second.number, second.offset)
    assert sides.arena.counts()["items"] == 1
    a = sides.views.tensors(first)
    cut = a["t0"][10:20]  # a view keeps the slot, too
    del a
    sides.settle()
    assert sides.arena.counts()["items"] == 1
    del cut
    sides.settle()
    assert sides.arena.counts()["items"] == 1, "a request that names it is on its way"
    b = sides.views.tensors(second)
    assert b["t0"].tolist() == item.tensors["t0"].tolist()
    del b
    sides.settle()
    assert sides.arena.counts()["items"] == 0


def test_a_slot_is_read_again_before_word_of_its_end_is_sent(sides):
    item = feature(b"k", 10)
    (first,) = sides.send(item)
    sides.views.tensors(first)
    assert not sides.gone.empty()
    (second,) = sides.send(item)
    held = sides.views.tensors(second)
    sides.settle()  # the first one's death is in the queue; the slot lives
    assert sides.arena.counts()["items"] == 1
    del held
    sides.settle()
    assert sides.arena.counts()["items"] == 0


def test_what_does_not_fit_changes_nothing(sides):
    big, small, huge = feature(b"b", 50 * PAGE), feature(b"s", 20 * PAGE), feature(b"h", 65 * PAGE)
    sides.send(big)
    before = sides.arena.counts()
    assert sides.send(feature(b"x", PAGE), small) is None
    assert sides.arena.counts() == before
    sides.arena.check_integrity()
    assert sides.arena.fits([small, big]) is False
    assert sides.arena.fits([small]) is True
    assert sides.arena.fits([huge]) is False


@pytest.mark.parametrize(
    ("where", "tensor"),
    [
        ((1, -PAGE, 10), WireTensor("t", "uint8", [1], 0)),
        ((1, ROOM - 5, 10), WireTensor("t", "uint8", [1], 0)),
        ((1, 0, 10), WireTensor("t", "uint8", [11], 0)),
        ((1, 0, 10), WireTensor("t", "int64", [2], 0)),
        ((1, 0, 10), WireTensor("t", "uint8", [-1], 0)),
        ((1, 0, 10), WireTensor("t", "uint8", [1], -1)),
        ((1, 0, 10), WireTensor("t", "load", [1], 0)),
    ],
)  # fmt: skip
def test_nothing_outside_a_slot_is_read(sides, where, tensor):
    with pytest.raises(ProtocolError):
        sides.views.tensors(WireFeature("image", 1, {}, b"k", None, None, *where, [tensor]))


ITEMS = [MediaFeature("image", 1, {"t": torch.full((1 + n * 3 * PAGE,), n)}, key=b"%d" % n) for n in range(7)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["send", "read", "drop", "tell"]), st.integers(0, 99)), max_size=40))
def test_items_come_and_go(actions):
    """Any order of sending, reading and letting go: what is read is right, and at the end nothing is held."""
    sides, held, on_way = Sides(8 * ROOM), [], []
    for action, number in actions:
        if action == "send":
            wanted = {number % 7, number // 7 % 7}
            on_way += sides.send(*(ITEMS[n] for n in wanted)) or []
        elif action == "read" and on_way:
            item = on_way.pop(0)
            held.append((int(item.key), sides.views.tensors(item)["t"]))
        elif action == "drop" and held:
            held.pop(number % len(held))
        elif action == "tell":
            sides.settle()
        for n, tensor in held:
            assert (tensor[0], tensor[-1], len(tensor)) == (n, n, 1 + n * 3 * PAGE)
    for item in on_way:
        sides.views.tensors(item)
    held.clear()
    del actions
    tensor = None
    sides.settle()
    assert sides.arena.counts()["used"] == 0
    sides.arena.close()


def test_memory_without_memfd(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    descriptor = open_memory(3 * PAGE)
    assert os.fstat(descriptor).st_size == 3 * PAGE
    assert os.fstat(descriptor).st_nlink == 0
    os.close(descriptor)


def test_the_arena_takes_no_memory_before_it_is_used():
    before = set(os.listdir("/proc/self/fd"))
    arena = Arena(arena_bytes(EngineConfig()))
    assert os.fstat(arena.descriptor).st_blocks == 0
    arena.close()
    arena.close()
    assert set(os.listdir("/proc/self/fd")) == before
