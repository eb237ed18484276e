"""Copies between blocks, slots and rows: what comes back is what left, and every order is told of once."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.tier_rig import Shape, TierRig, item, name

from mm_core.errors import OutOfMemoryError
from mm_core.runner import host_memory
from mm_core.runner.copier import Ring
from mm_core.runner.host_memory import HostMemory
from mm_core.runner.spans import DeviceSpans
from mm_core.scheduler.transfers import BlockCopy, BlockRestore, BlockStore, RowStore, Transfers
from mm_core.tracing import SpanRecorder

GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
)
SHAPES = [
    Shape(),
    Shape(dtype=torch.bfloat16, heads=1, layers=1),
    Shape(dtype=torch.float8_e4m3fn, head_dim=16, scales=True),
    Shape(dtype=torch.bfloat16, block_size=1, heads=1, head_dim=1, scales=True),  # nothing is eight bytes long
]


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def rigs(device: str) -> Iterator[Any]:
    made: list[TierRig] = []

    def make(*args: Any, **options: Any) -> TierRig:
        made.append(TierRig(*args, device=device, **options))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("checksums", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_block_comes_back_as_it_left_and_no_other_changes(rigs: Any, shape: Shape, checksums: bool) -> None:
    rig = rigs(shape, checksums=checksums)
    before = [rig.content(block) for block in range(shape.blocks)]
    blocks, slots = [5, 2, 9, 0], [3, 7, 4, 11]  # 3 and 4 lie side by side, their blocks do not
    done = rig.store(blocks, slots)
    assert sorted(d.key for d in done) == sorted(map(name, blocks))
    assert all(d.kind == "store" and d.ok and d.nbytes == rig.slot_bytes for d in done)
    targets = [12, 13, 14, 15]
    done = rig.restore(targets, slots)
    assert sorted(d.key for d in done) == sorted(map(name, targets))
    assert all(d.kind == "restore" and d.ok and not d.damaged and d.seconds > 0 for d in done)
    for block, target in zip(blocks, targets, strict=True):
        assert same(rig.content(target), before[block])
    for block in set(range(shape.blocks)) - set(targets):
        assert same(rig.content(block), before[block])


def test_what_is_stored_is_read_before_the_step_writes_and_before_a_restore_of_the_same_batch(rigs: Any) -> None:
    rig = rigs(slots=4)
    old, other = rig.content(1), rig.content(2)
    rig.store([2], [0])
    rig.wipe([2])
    rig.launch(stores=[BlockStore(b"old", 1, 1)], restores=[BlockRestore(b"other", 1, 0)])
    rig.wipe([3])  # a step that writes
    assert {d.key for d in rig.finish()} == {b"old", b"other"}
    assert same(rig.content(1), other)
    rig.restore([4], [1])
    assert same(rig.content(4), old)


def test_a_copy_within_the_device_comes_behind_the_stores_and_before_the_restores(rigs: Any) -> None:
    rig = rigs(slots=4)
    one, two, three = (rig.content(block) for block in (1, 2, 3))
    rig.store([3], [0])
    rig.launch(
        stores=[BlockStore(b"x", 2, 1)], copies=[BlockCopy(1, 2, 5)], restores=[BlockRestore(b"y", 1, 0)]
    )  # block 2's content leaves, 1's goes there, 3's to 1
    rig.finish()
    assert same(rig.content(2), one)
    assert same(rig.content(1), three)
    rig.restore([5], [1])
    assert same(rig.content(5), two)


def test_a_copy_needs_no_memory_behind_the_device(device: str) -> None:
    from mm_core.runner.transfers import TransfersRunner

    rig = TierRig(slots=1, device=device)
    plain = TransfersRunner(rig.stores, rig.rows, rig.device, DeviceSpans(None, rig.device))
    one = rig.content(1)
    with rig.on_stream():
        plain.launch(Transfers(copies=(BlockCopy(1, 7, 3),)))
    assert plain.poll() == []
    assert same(rig.content(7), one)
    plain.close()
    rig.close()


@pytest.mark.parametrize("checksums", [False, True])
@pytest.mark.parametrize("slots", [(4, 5, 6), (9, 2, 5)])
def test_rows_come_back_to_other_places(rigs: Any, slots: tuple[int, ...], checksums: bool) -> None:
    rig = rigs(checksums=checksums)
    on = rig.device
    count = 2 * rig.slot_bytes // rig.rows.row_bytes + 3  # two slots and some
    rows, others = torch.randn(count, 24, device=on), torch.randn(5, 24, device=on)
    assert rig.rows.encode([item(b"others", others), item(b"a", rows)]) == {}
    rig.launch(row_stores=[RowStore(b"a", slots)])
    rig.rows.drop([b"a", b"others"])
    assert [(d.kind, d.key, d.ok, d.nbytes) for d in rig.finish()] == [("row_store", b"a", True, 3 * rig.slot_bytes)]
    calls = rig.rows.calls
    assert rig.rows.encode([item(b"a", rows + 1, slots)]) == {}
    assert rig.rows.calls == calls, "copied back, not encoded"
    ticket = rig.transfers.take_loaded()
    assert ticket is not None
    ticket.wait()
    rig.wait()
    places = torch.from_numpy(rig.rows.places.by_key[b"a"]).long()
    assert torch.equal(rig.rows.slab[places.to(on)], rows)
    assert rig.rows.take_damaged() == frozenset()
    assert rig.transfers.take_loaded() is None


def test_damaged_rows_are_encoded_and_told_of(rigs: Any) -> None:
    rig = rigs(checksums=True)
    rows = torch.randn(10, 24, device=rig.device)
    rig.rows.encode([item(b"a", rows)])
    rig.launch(row_stores=[RowStore(b"a", (2,))])
    rig.rows.drop([b"a"])
    rig.finish()
    rig.flip(2, 100)
    rig.rows.encode([item(b"a", rows, (2,))])
    assert rig.rows.take_damaged() == {b"a"}
    assert rig.rows.take_damaged() == frozenset()
    rig.wait()
    places = torch.from_numpy(rig.rows.places.by_key[b"a"]).long()
    assert torch.equal(rig.rows.slab[places.to(rig.device)], rows)


def test_rows_that_are_not_there_are_not_stored(rigs: Any) -> None:
    rig = rigs()
    rig.launch(row_stores=[RowStore(b"nobody", (1, 2))])
    assert [(d.key, d.ok) for d in rig.finish()] == [(b"nobody", False)]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_flipped_bit_is_found(rigs: Any, shape: Shape) -> None:
    rig = rigs(shape, checksums=True)
    draw = random.Random(3)
    rig.store(range(10), range(10))
    damaged = set(draw.sample(range(10), 4))
    for slot in damaged:
        rig.flip(slot, draw.randrange(8 * rig.slot_bytes))
    done = rig.restore(range(10, 20), range(10))
    assert {d.key for d in done if d.damaged} == {name(slot + 10) for slot in damaged}
    assert all(d.ok is not d.damaged for d in done)
    again = rig.restore(sorted(slot + 10 for slot in damaged), sorted(damaged))
    assert all(d.damaged for d in again), "a damaged slot stays damaged"


def test_without_checksums_nobody_looks(rigs: Any) -> None:
    rig = rigs()
    rig.store([1], [1])
    rig.flip(1, 5)
    assert [d.ok for d in rig.restore([2], [1])] == [True]


@pytest.mark.parametrize("checksums", [False, True])
def test_every_order_is_told_of_once(rigs: Any, checksums: bool) -> None:
    rig = rigs(slots=20, checksums=checksums, staging=(3, 2))
    draw = random.Random(7)
    ordered: list[tuple[str, bytes]] = []
    told: list[tuple[str, bytes]] = []
    busy: dict[bytes, int] = {}  # key → slot with a copy in flight
    serial = 0
    for _ in range(60):
        stores, restores = [], []
        free = [slot for slot in range(20) if slot not in busy.values()]
        for slot in draw.sample(free, min(len(free), draw.randrange(5))):
            key = b"%d" % (serial := serial + 1)
            busy[key] = slot
            if draw.random() < 0.5:
                stores.append(BlockStore(key, draw.randrange(12), slot))
            else:
                restores.append(BlockRestore(key, 12 + slot % 12, slot))
        ordered += [("store", order.key) for order in stores] + [("restore", order.key) for order in restores]
        rig.launch(stores=stores, restores=restores)
        for done in rig.transfers.poll(wait=draw.random() < 0.2):
            told.append((done.kind, done.key))
            del busy[done.key]
    told += [(done.kind, done.key) for done in rig.finish()]
    assert sorted(told) == sorted(ordered)
    assert rig.transfers.pending == 0
    assert rig.transfers.poll(wait=True) == []


def test_copies_have_spans(device: str) -> None:
    recorder = SpanRecorder()
    spans = DeviceSpans(recorder, torch.device(device))
    rig = TierRig(device=device, spans=spans)
    rig.store([1, 2], [1, 2])
    rig.restore([3], [1])
    rig.wait()
    spans.resolve()
    assert [(s.track, s.name, s.args["slots"]) for s in recorder.take()] == [
        ("copies out", "store", 2), ("copies in", "restore", 1),
    ]  # fmt: skip
    rig.close()


class Broken:
    """A copier that fails."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, *args: Any) -> Any:
        raise self.error


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_copy_that_fails_is_told_of_and_the_next_one_works(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = TierRig(device="cuda", staging=(4, 4))
    layout = rig.transfers._copier._layout  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(layout, "gather", Broken(RuntimeError("no memory for an index")))
        assert [d.ok for d in rig.store([1, 2], [1, 2])] == [False, False]
    with monkeypatch.context() as patch:
        patch.setattr(layout, "scatter", Broken(RuntimeError("no memory for an index")))
        assert [(d.ok, d.damaged) for d in rig.restore([1], [1])] == [(False, False)]
    for _ in range(5):  # the ring's places came back
        assert all(d.ok for d in rig.store([1, 2, 3], [1, 2, 3]))
    with monkeypatch.context() as patch:
        patch.setattr(layout, "gather", Broken(torch.AcceleratorError("CUDA error: the device is gone")))
        with pytest.raises(RuntimeError, match="device is gone"):
            rig.launch(stores=[BlockStore(b"x", 1, 1)])
    rig.close()


# -- staging ---------------------------------------------------------------------------------


def test_a_ring_hands_out_what_is_free_in_order() -> None:
    ring = Ring(5)
    assert ring.take(3) == (0, 3)
    assert ring.take(9) == (3, 2), "to the end"
    assert ring.take(1) is None
    ring.give_back()
    assert ring.take(4, whole=True) is None
    assert ring.take(2, whole=True) == (0, 2)
    ring.give_back()  # of 3 and 4
    assert ring.take(4, whole=True) is None, "0 and 1 are still taken"
    assert ring.take(3, whole=True) == (2, 3)


def test_a_ring_skips_its_end_for_what_must_lie_together() -> None:
    ring = Ring(6)
    assert [ring.take(count) for count in (1, 3, 1)] == [(0, 1), (1, 3), (4, 1)]
    ring.give_back()
    ring.give_back()
    assert ring.take(3, whole=True) == (0, 3), "5 is left out until this is given back"
    assert ring.take(5) == (3, 1)
    assert ring.take(5) is None
    ring.give_back()
    assert ring.take(5) == (4, 1)
    for _ in range(3):
        ring.give_back()
    assert ring.take(7, whole=True) is None
    assert ring.take(6, whole=True) == (0, 6)


# -- host memory -----------------------------------------------------------------------------


def test_slots_lie_in_segments_and_none_crosses_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "SEGMENT_BYTES", 4096)
    told: list[int] = []
    memory = HostMemory(3 * 12 * 320 + 1000, 320, told=told.append)
    assert memory.num_slots == 3 * 12 + 3
    assert told == [12 * 320, 24 * 320, 36 * 320, 39 * 320]
    for slot in range(memory.num_slots):
        memory.slot(slot).fill_(slot)
    assert [memory.memory(slot)[7] for slot in range(memory.num_slots)] == list(range(memory.num_slots))
    asked = [10, 11, 12, 13, 35, 36, 37, 5, 4]
    runs = [(first, len(part)) for first, part in memory.runs(asked)]
    assert runs == [(0, 2), (2, 2), (4, 1), (5, 2), (7, 1), (8, 1)]
    together = torch.cat([part[:, 0] for _, part in memory.runs(asked)])
    assert together.tolist() == asked
    memory.close()
    memory.close()
    assert memory.num_slots == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_memory_is_pinned_until_it_is_given_back() -> None:
    memory = HostMemory(3 * 2**20, 4096, pinned=True)
    (run,) = memory.runs(range(memory.num_slots))
    assert run.memory.is_pinned()
    memory.close()
    assert not run.memory.is_pinned()


def test_plain_memory_takes_no_room_before_it_is_used() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident()
    told: list[int] = []
    memory = HostMemory(2**30, 4096, told=told.append)
    assert memory.num_slots == 2**18
    assert told[-1] == 2**30
    assert resident() - before < 2**26
    memory.close()


def test_too_much_memory_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 2**30)
    with pytest.raises(OutOfMemoryError, match=r"host_cache_size=2147483648.*1\.0 GiB are free.*Lower it"):
        HostMemory(2**31, 4096)
    assert HostMemory(2**20, 4096).num_slots == 256


def test_what_the_host_has_left_is_known_here() -> None:
    available = host_memory.available_bytes()
    assert available is not None
    assert 2**20 < available < 2**50
