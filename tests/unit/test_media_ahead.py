"""Encoder rows: who holds them, who keeps them for later, and in which order they go."""

from __future__ import annotations

import pytest
from support.fake_model import Faults, World
from support.fake_requests import expected_tokens, feature, make_request

from mm_core.cache import EncoderCache
from mm_core.config import SamplingParams
from mm_core.engine.messages import Abort
from mm_core.scheduler import ScheduledBatch, Status


def greedy(n: int) -> SamplingParams:
    return SamplingParams(max_tokens=n, temperature=0)


def check_answers(world: World) -> None:
    for seq in world.sequences:
        assert seq.output_token_ids == expected_tokens(seq.request, seq.params.max_tokens or 0)


def steps_until_running(world: World, seq_id: int, limit: int = 400) -> int:
    seq = world.sequences[seq_id]
    for step in range(limit):
        if seq.status is not Status.WAITING:
            return step
        world.step()
    raise AssertionError("it never ran")


# -- the cache -------------------------------------------------------------------------------------


def full(*rows: int) -> EncoderCache:
    """Items k0, k1 … of so many rows, each held by the sequence of its number, all steps done."""
    cache = EncoderCache(sum(rows))
    for i, count in enumerate(rows):
        assert cache.allocate(f"k{i}".encode(), count, 10 * count, i, step=1)
    cache.begin_step(1)
    cache.complete_step(1)
    cache.check_integrity(set(range(len(rows))))
    return cache


def test_only_what_nobody_needs_is_evicted_for_later_use() -> None:
    cache = full(4, 4, 4)
    assert not cache.allocate(b"new", 1, 1, 9, step=2)
    cache.release(b"k0", 0)
    cache.keep(b"k0", 7)
    cache.release(b"k1", 1)
    assert cache.room == 8
    assert not cache.allocate_ahead(b"new", 5, 1, 9, step=2)
    assert cache.allocate_ahead(b"new", 4, 1, 9, step=2)
    assert cache.take_evicted() == [b"k1"]
    cache.check_integrity({0, 2, 7, 9})


def test_who_runs_takes_the_newest_of_what_is_kept() -> None:
    cache = full(4, 4)
    for i in range(2):
        cache.release(f"k{i}".encode(), i)
        cache.keep(f"k{i}".encode(), 7 + i)
    assert cache.allocate(b"new", 4, 1, 9, step=2)
    assert cache.take_evicted() == [b"k1"]
    cache.release(b"k1", 8)  # its keeper learns nothing and need not
    assert b"k0" in cache


def test_rows_that_a_step_reads_or_writes_stay() -> None:
    cache = full(4, 4)
    cache.begin_step(2)
    cache.abandon(b"k0", 0)
    cache.release(b"k1", 1)
    assert cache.room == 4
    cache.begin_step(3)
    assert cache.allocate_ahead(b"new", 4, 1, 9, step=4)
    cache.begin_step(4)
    cache.release(b"new", 9)
    assert cache.room == 0
    cache.complete_step(2)
    assert cache.room == 4
    cache.complete_step(3)
    assert cache.room == 4
    cache.complete_step(4)
    assert cache.room == 8


def test_the_cheapest_to_make_again_goes_first() -> None:
    cache = EncoderCache(12)
    for key, cost in ((b"dear", 100), (b"cheap", 4), (b"middling", 20)):
        assert cache.allocate(key, 4, cost, 1, step=1)
    cache.complete_step(1)
    for key in (b"dear", b"cheap", b"middling"):
        cache.release(key, 1)
    assert cache.allocate(b"new", 8, 8, 2, step=2)
    assert cache.take_evicted() == [b"cheap", b"middling"]


def test_taking_up_and_letting_go_again_and_again_leaves_no_trace() -> None:
    cache = full(4, 4)
    cache.release(b"k1", 1)
    for _ in range(1000):
        cache.acquire(b"k1", 5)
        cache.release(b"k1", 5)
    cache.check_integrity({0})
    assert len(cache._loose) < 200
    assert cache.allocate(b"new", 4, 1, 2, step=2)
    assert cache.take_evicted() == [b"k1"]


# -- ahead of need ---------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_items_of_waiting_sequences_are_encoded_ahead(overlap: bool) -> None:
    world = World(overlap=overlap, max_num_seqs=1)
    world.add(make_request("a", [10, 11, 12], greedy(6)))
    for name in "xyz":
        world.add(make_request(name, [10, feature(name, 4), 11], greedy(2)))
    world.step()
    assert world.runner.encoded == [b"x", b"y", b"z"]
    assert [seq.kept_media for seq in world.sequences[1:]] == [{b"x"}, {b"y"}, {b"z"}]
    world.run()
    assert world.scheduler.stats.encoded_ahead == 3
    assert [seq.encoded_rows for seq in world.sequences] == [0, 4, 4, 4]
    assert world.runner.encoded == [b"x", b"y", b"z"]
    check_answers(world)


def test_the_next_chunks_items_are_encoded_ahead() -> None:
    world = World(max_tokens=6, encoder_budget=20)
    x, y, z = (feature(name, 5, cost=10) for name in "xyz")
    (seq,) = world.add(make_request("a", [10, x, 11, y, z, 12]))
    world.step()
    assert (seq.num_completed_tokens, world.runner.encoded) == (6, [b"x", b"y"])
    assert (seq.held_media, seq.kept_media) == (set(), {b"y"})
    world.step()
    assert (seq.num_completed_tokens, world.runner.encoded) == (12, [b"x", b"y", b"z"])
    world.run()
    assert world.scheduler.stats.encoded_ahead == 2
    check_answers(world)


def test_ahead_ends_at_the_budget() -> None:
    world = World(max_num_seqs=1, encoder_budget=20)
    world.add(make_request("a", [10, 11, 12], greedy(6)))
    for name in "xyz":
        world.add(make_request(name, [10, feature(name, 4), 11], greedy(2)))
    world.step()
    assert world.runner.encoded == [b"x"]  # 16 of 20, the next has 16 as well
    world.step()
    assert world.runner.encoded == [b"x", b"y"]
    world.run()
    check_answers(world)


def test_an_item_over_the_budget_is_encoded_ahead_alone() -> None:
    world = World(max_num_seqs=1, encoder_budget=4)
    world.add(make_request("a", [10, 11, 12], greedy(6)))
    for name in "xy":
        world.add(make_request(name, [10, feature(name, 4), 11], greedy(2)))
    world.step()
    assert world.runner.encoded == [b"x"]
    world.run()
    assert world.scheduler.stats.encoded_ahead == 2
    check_answers(world)


def test_a_batch_may_hold_nothing_but_items() -> None:
    """No block is free for the second sequence, and the first has just ended its last step."""
    world = World(num_blocks=2, max_tokens=16, encoder_budget=16)
    batches: list[ScheduledBatch] = []
    real = world.runner.launch
    world.runner.launch = lambda batch: (batches.append(batch), real(batch))[1]  # type: ignore[method-assign]
    world.add(make_request("a", [10, feature("x", 4), feature("y", 3)], greedy(1)))
    world.step()
    assert [len(b.sequences) for b in batches] == [1]
    assert (batches[0].sequences[0].length, world.runner.encoded) == (5, [b"x"])
    world.run()
    world.scheduler.config = type(world.scheduler.config)(1, 16, 64, 8)
    held = world.scheduler.pool.allocate(2)
    assert held is not None
    world.add(make_request("b", [10, feature("z", 4), 11], greedy(1)))
    world.scheduler.check_integrity = lambda: None  # type: ignore[method-assign]  # the blocks are ours
    batch = world.scheduler.schedule()
    assert batch is not None
    assert (batch.sequences, [i.key for i in batch.encode], batch.num_tokens, batch.num_decodes) == ((), [b"z"], 0, 0)
    assert world.scheduler.update(batch, world.runner.execute(batch)) == []
    world.scheduler.pool.free(held)
    world.run()
    check_answers(world)


def test_what_waits_for_anothers_blocks_keeps_nothing() -> None:
    world = World(max_num_seqs=4, max_tokens=8)
    prompt = [10, feature("x", 12), 11]
    for name in "abc":
        world.add(make_request(name, prompt))
    world.step()
    assert [seq.kept_media for seq in world.sequences[1:]] == [set(), set()]
    world.run()
    assert world.runner.encoded == [b"x"]
    check_answers(world)


def test_a_cached_prefix_needs_no_rows() -> None:
    world = World(max_num_seqs=1, encoder_rows=12)
    world.add(make_request("a", [10, feature("x", 11), 11]))
    world.run()
    world.add(make_request("busy", [20, 21, feature("y", 12), 22]))
    world.add(make_request("again", [10, feature("x", 11), 12]))
    world.run()
    assert world.runner.encoded == [b"x", b"y"]
    check_answers(world)


@pytest.mark.parametrize("overlap", [False, True])
def test_an_abort_lets_go_of_what_was_encoded_ahead(overlap: bool) -> None:
    world = World(overlap=overlap, max_num_seqs=1, encoder_rows=8)
    world.add(make_request("a", [10, 11, 12], greedy(8)))
    world.add(make_request("x", [10, feature("x", 8), 11]))
    world.add(make_request("y", [10, feature("y", 8), 11]))
    world.step()
    assert world.runner.encoded == [b"x"]
    world.core.handle(Abort("x"))
    world.sequences.pop(1)
    for _ in range(3):
        world.step()
    assert world.runner.encoded == [b"x", b"y"]
    world.run()
    check_answers(world)


@pytest.mark.parametrize("overlap", [False, True])
def test_an_item_that_fails_ahead_ends_its_request_when_that_needs_it(overlap: bool) -> None:
    world = World(overlap=overlap, max_num_seqs=1)
    world.runner.faults = lambda batch: Faults(media=frozenset({b"x"} & {item.key for item in batch.encode}))
    tried: list[int] = []
    real = world.runner.launch

    def launch(batch: ScheduledBatch):
        tried.extend(batch.step for item in batch.encode if item.key == b"x")
        return real(batch)

    world.runner.launch = launch  # type: ignore[method-assign]
    world.add(make_request("a", [10, 11, 12], greedy(8)))
    world.add(make_request("x", [10, feature("x", 4), 11]))
    world.add(make_request("y", [10, feature("y", 4), 11]))
    for _ in range(4):
        world.step()
    assert not world.errors
    world.run()
    assert set(world.errors) == {"x"}
    assert len(tried) == 2, "once ahead, once in its own step"
    del world.sequences[1]
    check_answers(world)


def test_a_launch_that_fails_for_an_item_ahead_costs_nobody_a_token() -> None:
    world = World(max_num_seqs=1)
    world.add(make_request("a", [10, 11, 12], greedy(8)))
    world.add(make_request("x", [10, feature("x", 4), 11]))

    def odd(batch: ScheduledBatch) -> Faults:
        ahead = batch.encode and batch.sequences[0].seq.seq_id == 1
        return Faults(dies=MemoryError("too much at once") if ahead else None)

    world.runner.faults = odd
    world.run()
    assert not world.errors
    check_answers(world)


@pytest.mark.parametrize("overlap", [False, True])
def test_an_item_that_fills_the_cache_is_not_starved(overlap: bool) -> None:
    """Every step of the others breaks off within an item, so that some rows are always held; the large
    item needs all of them, and gets them before those behind it go on."""
    world = World(overlap=overlap, encoder_rows=8, num_blocks=128, max_tokens=4, reuse=False)
    first = [10, 11, *(feature(f"first{i}", 4) for i in range(5))]
    world.add(make_request("first", first, greedy(1)))
    world.add(make_request("large", [10, feature("large", 8), 11], greedy(1)))
    for name in "abc":
        world.add(make_request(name, [10, *(feature(f"{name}{i}", 4) for i in range(20))], greedy(1)))
    large = world.sequences[1]
    for _ in range(14):
        world.step()
    assert large.num_output_tokens == 1
    world.run()
    check_answers(world)


@pytest.mark.parametrize("overlap", [False, True])
def test_an_item_over_the_budget_is_not_starved(overlap: bool) -> None:
    world = World(overlap=overlap, encoder_budget=20, max_num_seqs=4, num_blocks=64, max_tokens=12, reuse=False)
    world.add(make_request("s0", [10, feature("s0", 5), feature("t0", 5), feature("u0", 5)]))
    world.add(make_request("large", [feature("large", 8), 11]))
    for i in range(1, 40):
        world.add(make_request(f"s{i}", [10, feature(f"s{i}", 5), feature(f"t{i}", 5), feature(f"u{i}", 5)]))
    assert steps_until_running(world, 1) < 20
    world.run()
    check_answers(world)
