"""DiskTier and its file: what is found was written, whatever became of the file in between."""

from __future__ import annotations

import errno
import logging
import os
import random
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.tier_rig import TierRig, name

from mm_core.cache import disk_file
from mm_core.cache.disk import DiskTier
from mm_core.cache.disk_file import DiskIdentity
from mm_core.cache.prefix import BlockContent
from mm_core.engine.keeping import DiskKeeper
from mm_core.errors import ConfigError
from mm_core.hashing import ROOT
from mm_core.runner.background import Workers
from mm_core.runner.slots import SlotLayout
from mm_core.scheduler.transfers import Spill

SLOT = 512
IDENTITY = DiskIdentity(
    "qwen2vl", "ab" * 32, "main", "safetensors", "torch.bfloat16", "torch.bfloat16", 16, (28, 4, 128), "xxh3_128", "cpu"
)
RECORD = 256  # bytes of one, with 16 token ids


def size_for(places: int) -> int:
    return 8192 + places * (SLOT + RECORD)


def open_tier(path: Path, places: int = 8, identity: DiskIdentity = IDENTITY) -> DiskTier:
    tier = DiskTier.open(str(path), size_for(places), identity, SLOT)
    assert tier is not None
    assert tier.num_places == places
    return tier


def content_of(key: bytes, part: int = 0) -> bytes:
    return random.Random(key + bytes([part])).randbytes(SLOT)


def ids_of(key: bytes) -> tuple[int, ...]:
    return tuple(random.Random(key).choices(range(-1, 2**31), k=16))


def put(tier: DiskTier, key: bytes, count: int = 1, rows: int = 0) -> bool:
    ids = () if rows else ids_of(key)
    places = tier.reserve(key, count, ids, rows)
    if places is None:
        return False
    if tier.write(Spill(key, (), places, ids, rows), [content_of(key, part) for part in range(count)]):
        tier.commit(key)
        return True
    tier.drop(key)
    return False


def get(tier: DiskTier, key: bytes) -> bool | None:
    """Whether what is there under a key verifies; None: nothing is. What verifies must be what was written."""
    entry = tier.find(key)
    if entry is None:
        return None
    tier.hold(key)
    into = bytearray(SLOT)
    good = all(tier.read(place, into) and into == content_of(key, part) for part, place in enumerate(entry.places))
    wrong = any(tier.read(place, into) and into != content_of(key, part) for part, place in enumerate(entry.places))
    assert not wrong, "content that nobody wrote under this key"
    assert entry.num_rows or entry.token_ids == ids_of(key)
    tier.release(key)
    return good


def test_what_was_written_is_found_again_after_a_restart(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    keys = [b"a", b"b" * 32, b"\0" * 16]
    assert all(put(tier, key) for key in keys)
    assert put(tier, b"rows", count=3, rows=7)
    assert not put(tier, b"a"), "it is there"
    assert tier.counts() == {
        "places": 8, "free": 2, "writing": 0, "ready": 6, "leaving": 0, "entries": 4, "evicted": 0
    }  # fmt: skip
    tier.check_integrity()
    tier.close()
    tier.close()
    again = open_tier(tmp_path)
    assert again.keys() == [*keys, b"rows"]
    assert [get(again, key) for key in (*keys, b"rows", b"nobody")] == [True] * 4 + [None]
    rows = again.find(b"rows")
    assert rows is not None
    assert (rows.num_rows, len(rows.places), rows.token_ids) == (7, 3, ())
    again.check_integrity()
    again.close()


def test_what_is_reserved_or_dropped_is_not_found_and_the_oldest_leaves_first(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, 3)
    assert put(tier, b"one")
    assert put(tier, b"two")
    assert tier.reserve(b"three", 1) is not None
    assert tier.find(b"three") is None
    assert tier.reserve(b"three", 1) is None
    assert tier.reserve(b"", 1) is None
    assert tier.reserve(b"x" * 33, 1) is None
    tier.hold(b"one")
    assert put(tier, b"four"), "two leaves: one is being read, three is being written"
    assert tier.keys() == [b"one", b"four"]
    assert tier.reserve(b"five", 2) is None, "only four may leave"
    assert tier.keys() == [b"one", b"four"], "so it stays"
    tier.drop(b"one")
    assert tier.find(b"one") is None
    assert tier.counts()["leaving"] == 1
    tier.check_integrity()
    assert get(tier, b"four") is True
    tier.release(b"one")
    with pytest.raises(KeyError):
        tier.release(b"one")
    tier.drop(b"three")
    tier.drop(b"nobody")
    assert tier.counts()["free"] == 2
    tier.clear()
    assert len(tier) == 0
    tier.check_integrity()
    tier.close()
    again = open_tier(tmp_path, 3)
    assert again.keys() == [], "what was dropped stays so"
    again.close()


def test_a_wrong_book_is_noticed(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    put(tier, b"one")
    tier._free.pop()
    with pytest.raises(RuntimeError, match="lost"):
        tier.check_integrity()
    tier.close()


# -- files that are not what they should be ----------------------------------------------------


def only_file(path: Path) -> Path:
    (file,) = path.iterdir()
    return file


@pytest.mark.parametrize(
    "other",
    [
        {"family": "llava"}, {"checkpoint": "cd" * 32}, {"revision": "v2"}, {"weights": "dummy 0"},
        {"dtype": "torch.float16"}, {"kv_dtype": "torch.float8_e4m3fn torch.uint8"}, {"block_size": 32},
        {"kv_shape": (28, 4, 64)}, {"hash_algorithm": "sha256"}, {"device": "NVIDIA H100"},
    ],
)  # fmt: skip
def test_each_part_of_the_identity_has_a_file_of_its_own(tmp_path: Path, other: dict[str, Any]) -> None:
    identity = replace(IDENTITY, **other)
    assert identity.file_name != IDENTITY.file_name
    tier = open_tier(tmp_path)
    put(tier, b"one")
    tier.close()
    # Even where its file is put in the other's place.
    only_file(tmp_path).rename(tmp_path / identity.file_name)
    changed = DiskTier.open(str(tmp_path), size_for(8), identity, SLOT)
    assert changed is not None
    assert changed.keys() == []
    changed.close()


def test_another_size_or_version_begins_anew_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begins_anew(places: int = 8, slot: int = SLOT) -> None:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            tier = DiskTier.open(str(tmp_path), size_for(places), IDENTITY, slot)
        assert tier is not None
        assert tier.keys() == []
        assert "begun anew" in caplog.text
        assert put(tier, b"one")
        tier.close()

    tier = open_tier(tmp_path)
    put(tier, b"one")
    tier.close()
    begins_anew(places=9)
    begins_anew(places=7)
    begins_anew(slot=SLOT // 2)
    monkeypatch.setattr(disk_file, "VERSION", 2)
    begins_anew()
    assert only_file(tmp_path).stat().st_size <= size_for(8)


@pytest.mark.parametrize("foreign", [b"x", b"somebody's diary" * 99, disk_file.MAGIC[:-1] + b"?" * 5000])
def test_a_foreign_file_is_left_alone(tmp_path: Path, foreign: bytes, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / IDENTITY.file_name
    file.write_bytes(foreign)
    with caplog.at_level(logging.WARNING):
        assert DiskTier.open(str(tmp_path), size_for(8), IDENTITY, SLOT) is None
    assert "was not made by mm-core" in caplog.text
    assert file.read_bytes() == foreign


@pytest.mark.parametrize("begin", [b"", b"\0" * 100, disk_file.MAGIC, disk_file.MAGIC + b"\0" * 9000])
def test_a_start_that_was_cut_short_is_gone_on_with(tmp_path: Path, begin: bytes) -> None:
    (tmp_path / IDENTITY.file_name).write_bytes(begin)
    tier = open_tier(tmp_path)
    assert put(tier, b"one")
    tier.close()
    again = open_tier(tmp_path)
    assert get(again, b"one") is True
    again.close()


def test_links_and_special_files_are_not_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"")
    folder = tmp_path / "kv"
    folder.mkdir()
    place = folder / IDENTITY.file_name
    place.symlink_to(target)
    with pytest.raises(ConfigError, match="disk_cache_path"):
        DiskTier.open(str(folder), size_for(8), IDENTITY, SLOT)
    place.unlink()
    for make in (os.mkfifo, lambda path: os.link(target, path)):
        make(place)  # type: ignore[operator]
        with caplog.at_level(logging.WARNING):
            assert DiskTier.open(str(folder), size_for(8), IDENTITY, SLOT) is None
        assert "not a file of this user's own" in caplog.text
        place.unlink()
        caplog.clear()
    assert target.read_bytes() == b""
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(ConfigError, match="disk_cache_path"):
        DiskTier.open(str(tmp_path / "link"), size_for(8), IDENTITY, SLOT)


def test_a_size_that_holds_nothing_names_the_least_one(tmp_path: Path) -> None:
    too_small = size_for(1) - 1
    with pytest.raises(ConfigError, match=rf"disk_cache_size={too_small}\) is too small.*Use {size_for(1)} or more"):
        DiskTier.open(str(tmp_path), too_small, IDENTITY, SLOT)
    open_tier(tmp_path, 1).close()


# -- crashes -----------------------------------------------------------------------------------


class CutError(Exception):
    """The process ends here."""


@pytest.mark.parametrize("cut", range(12))
def test_a_write_that_is_cut_short_anywhere_leaves_the_old_entry_the_new_one_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    tier = open_tier(tmp_path, 2)
    for key in (b"old", b"older"):
        put(tier, key)
    real, left = os.pwrite, [cut]

    def cut_short(descriptor: int, data: Any, offset: int) -> int:
        if not left[0]:
            half = memoryview(data)[: len(data) // 2]
            real(descriptor, half, offset)
            raise CutError
        left[0] -= 1
        return real(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", cut_short)
        try:
            done = put(tier, b"new", count=2, rows=3)
        except CutError:
            done = False
    tier.close()
    again = open_tier(tmp_path, 2)
    found = {key for key in (b"old", b"older", b"new") if get(again, key)}
    assert found in ({b"old", b"older"}, {b"old"}, {b"older"}, set(), {b"new"})
    assert (found == {b"new"}) is done
    assert done is (cut >= 6), "two records end, two contents, two records"
    again.check_integrity()
    assert put(again, b"next")
    again.close()


# -- fuzz --------------------------------------------------------------------------------------


def damage(draw: random.Random, data: bytearray) -> str:
    kind = draw.choice(["bit", "bytes", "zeros", "cut", "grow", "swap", "header", "record"])
    at = draw.randrange(len(data))
    span = min(draw.choice([1, 8, 64, 512, 4096]), len(data) - at)
    if kind == "bit":
        data[at] ^= 1 << draw.randrange(8)
    elif kind == "bytes":
        data[at : at + span] = draw.randbytes(span)
    elif kind == "zeros":
        data[at : at + span] = bytes(span)
    elif kind == "cut":
        del data[at:]
    elif kind == "grow":
        data += draw.randbytes(span)
    elif kind == "swap":
        to = draw.randrange(len(data) - span + 1)
        data[at : at + span], data[to : to + span] = data[to : to + span], data[at : at + span]
    elif kind == "header":
        data[draw.randrange(4096)] ^= 1 << draw.randrange(8)
    else:  # a whole record in another's place
        one, two = (4096 + RECORD * draw.randrange(8) for _ in range(2))
        data[one : one + RECORD] = data[two : two + RECORD]
    return kind


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_costs_misses_only(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    keys = [b"key %d" % i for i in range(5)]
    tier = open_tier(tmp_path)
    for key in keys:
        put(tier, key)
    put(tier, b"rows", count=3, rows=9)
    tier.close()
    file = only_file(tmp_path)
    good, intact = file.read_bytes(), 0
    for _ in range(150):
        data = bytearray(good)
        for _ in range(draw.randrange(1, 4)):
            if len(data) > 4096 * 2:
                damage(draw, data)
        file.write_bytes(data)
        found = DiskTier.open(str(tmp_path), size_for(8), IDENTITY, SLOT)
        if found is None:
            assert not data.startswith(disk_file.MAGIC)
            assert file.read_bytes() == data
            continue
        intact += sum(get(found, key) is True for key in (*keys, b"rows"))
        assert set(found.keys()) <= {*keys, b"rows"}
        found.check_integrity()
        assert put(found, b"another")
        assert get(found, b"another") is True
        found.close()
    assert intact > 150, "most damage leaves most of it usable"


# -- the disk's own faults ---------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_is_told_of_once_and_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    tier = open_tier(tmp_path)
    put(tier, b"one")

    def refuse(*args: Any) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(os, "pwrite", refuse)
        assert not put(tier, b"two")
        assert tier.reserve(b"three", 1) is None
        tier.drop(b"one")
        patch.setattr(os, "preadv", refuse)
        assert tier.read(0, bytearray(SLOT)) is False
    assert caplog.text.count(os.strerror(code)) == 1
    tier.check_integrity()
    tier.close()


def test_a_file_that_another_engine_uses_is_refused_until_it_is_closed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tier = open_tier(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert DiskTier.open(str(tmp_path), size_for(8), IDENTITY, SLOT) is None
    assert "used by another engine" in caplog.text
    tier.close()
    open_tier(tmp_path).close()


# -- through the real copies -------------------------------------------------------------------


@pytest.mark.parametrize("checksums", [False, True])
def test_blocks_go_to_disk_and_come_back_to_the_device(tmp_path: Path, checksums: bool) -> None:
    slot_bytes = TierRig(slots=1).slot_bytes
    tier = DiskTier.open(str(tmp_path), 8 * (slot_bytes + 4096), IDENTITY, slot_bytes)
    assert tier is not None
    rig = TierRig(slots=8, disk=tier, checksums=checksums)
    before = [rig.content(block) for block in range(6)]
    rig.store(range(6), range(6))
    spills = []
    for block in range(6):
        places = tier.reserve(name(block), 1, (block,))
        assert places is not None
        spills.append(Spill(name(block), (block,), places, (block,)))
    rig.launch(spills=spills)
    done = rig.finish()
    assert sorted(d.key for d in done) == sorted(name(block) for block in range(6))
    assert all(d.kind == "spill" and d.ok and d.nbytes == slot_bytes for d in done)
    for block in range(6):
        tier.commit(name(block))
    rig.wipe(range(24))
    for slot in range(8):
        rig.memory.slot(slot).fill_(0)
    # Damage one on disk.
    descriptor = os.open(only_file(tmp_path), os.O_RDWR)
    at = tier._file._sizes.content_at(spills[2].places[0]) + 99
    os.pwrite(descriptor, bytes([os.pread(descriptor, 1, at)[0] ^ 1]), at)
    os.close(descriptor)
    done = rig.restore(range(10, 16), [7, 6, 5, 4, 3, 2], [spill.places[0] for spill in spills])
    assert {d.key: d.ok for d in done} == {name(10 + i): i != 2 for i in range(6)}
    assert [d.damaged for d in done if not d.ok] == [True]
    assert all(d.seconds > 0 for d in done)
    for index in (0, 1, 3, 4, 5):
        assert all(map(bytes_equal, rig.content(10 + index), before[index]))
    rig.wipe(range(10, 16))  # now from the slots, which verify
    assert all(d.ok for d in rig.restore([10], [7]))
    assert all(map(bytes_equal, rig.content(10), before[0]))
    rig.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("mm-core-disk")]


def bytes_equal(left: Any, right: Any) -> bool:
    return bool((left == right).all())


def test_a_damaged_slot_is_not_spilled(tmp_path: Path) -> None:
    slot_bytes = TierRig(slots=1).slot_bytes
    tier = DiskTier.open(str(tmp_path), 8 * (slot_bytes + 4096), IDENTITY, slot_bytes)
    assert tier is not None
    rig = TierRig(slots=8, disk=tier, checksums=True)
    rig.store([1], [1])
    rig.flip(1, 77)
    places = tier.reserve(b"x", 1, ())
    assert places is not None
    rig.launch(spills=[Spill(b"x", (1,), places)])
    assert [(d.ok, d.damaged) for d in rig.finish()] == [(False, True)]
    rig.close()


# -- at the end of an engine -------------------------------------------------------------------


class Books:
    """A scheduler whose device holds these blocks, in order of their publication."""

    def __init__(self, contents: list[BlockContent]) -> None:
        self.prefix = SimpleNamespace(contents=lambda: list(enumerate(contents)))
        self.tiers = None

    def check_integrity(self) -> None:
        """They balance."""


def chain(letter: bytes, count: int) -> list[BlockContent]:
    keys = [ROOT, *(letter + b"%d" % index for index in range(count))]
    return [BlockContent(key, (index,), parent) for index, (parent, key) in enumerate(pairwise(keys))]


def keeper_of(path: Path, contents: list[BlockContent], places: int) -> tuple[DiskKeeper, TierRig, DiskTier]:
    rig = TierRig(slots=1)
    tier = DiskTier.open(str(path), 8192 + places * (rig.slot_bytes + RECORD), IDENTITY, rig.slot_bytes)
    assert tier is not None
    assert tier.num_places == places
    return DiskKeeper(Books(contents), rig.transfers, tier), rig, tier  # type: ignore[arg-type]


def test_the_newest_blocks_are_kept_each_behind_those_it_continues(tmp_path: Path) -> None:
    old, new = chain(b"old", 3), chain(b"new", 3)
    keeper, rig, tier = keeper_of(tmp_path, [*old, *new], 4)
    assert keeper.keep(show_progress=False) == 4
    assert tier.keys() == [c.key for c in (*new, old[0])]
    assert keeper.keep(show_progress=False) == 0, "what is there already keeps its place"
    into = bytearray(rig.slot_bytes)
    for index, content in enumerate(new):
        entry = tier.find(content.key)
        assert entry is not None
        assert entry.token_ids == (index,)
        assert tier.read(entry.places[0], into)
        wanted = torch.empty(rig.slot_bytes, dtype=torch.uint8)
        SlotLayout(rig.stores).read(3 + index, wanted)
        assert bytes(into) == wanted.numpy().tobytes()
    tier.close()


def test_keeping_ends_in_time_and_keeps_nothing_of_broken_books(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper, _, tier = keeper_of(tmp_path, chain(b"a", 3), 4)
    with caplog.at_level(logging.WARNING):
        assert keeper.keep(show_progress=False, seconds=-1.0) == 0
        assert "3 blocks were not kept on disk: there was no time" in caplog.text
        caplog.clear()

        def broken(books: Books) -> None:
            raise RuntimeError("blocks leaked")

        monkeypatch.setattr(Books, "check_integrity", broken)
        assert keeper.keep(show_progress=False) == 0
        assert "was not kept" in caplog.text
    assert len(tier) == 0
    tier.close()


def test_work_that_raises_is_told_of_as_failed() -> None:
    news = threading.Event()
    told: list[Any] = []
    for count in (0, 2):
        workers = Workers("test", count, news)
        workers.submit(lambda: 1 // 0, told.append, "failed")
        workers.submit(lambda: 7, told.append, "failed")
        while workers.pending:
            news.wait(1)
            workers.take()
        workers.close()
    assert sorted(map(str, told)) == ["7", "7", "failed", "failed"]


@pytest.mark.parametrize("count", [0, 3])
def test_work_is_shared_out_and_counts_all_where_it_raises(count: int) -> None:
    workers = Workers("test", count, news := threading.Event())
    assert sorted(workers.share(lambda part: [n for n in part if n % 3 == 0], range(10))) == [0, 3, 6, 9]
    assert workers.share(lambda part: [1 // 0], [5, 6]) == [5, 6]
    assert workers.share(lambda part: [], []) == []
    while workers.pending:
        workers.take()
        news.wait(0.01)
    workers.close()
