"""Host memory and disk behind the scheduler, on a fake device: what comes back is what had left, or is computed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from support.fake_model import Faults, Tiers, World
from support.fake_requests import expected_tokens, feature, make_answer, make_request, make_source
from support.fake_tiers import CopyFaults
from support.lives import MEDIA, SOURCES, STOPS, TEXT, live

from mm_core.config import SamplingParams
from mm_core.engine.messages import Abort, ClearCache
from mm_core.scheduler import ScheduledBatch, Sequence, Status
from mm_core.scheduler.costs import CostModel
from mm_core.scheduler.transfers import Transfers

Make = Callable[..., World]
PROMPT = list(range(10, 31))  # five full blocks and a token


def greedy(n: int) -> SamplingParams:
    return SamplingParams(max_tokens=n, temperature=0)


@pytest.fixture(params=[False, True], ids=["alone", "overlapped"])
def make(request: pytest.FixtureRequest) -> Make:
    """Worlds with twelve blocks and host memory for all that leaves them."""

    def world(slots: int = 64, **settings: Any) -> World:
        own = {name: settings.pop(name) for name in ("places", "always", "faults", "max_filling") if name in settings}
        return World(**{"overlap": request.param, "num_blocks": 12, "tiers": Tiers(slots, **own), **settings})

    return world


def check_all(world: World) -> None:
    for seq in world.sequences:
        assert seq.output_token_ids == expected_tokens(seq.request, seq.params.max_tokens or 0), seq.seq_id


def run(world: World, name: str, prompt: Any, tokens: int = 1, **extra: Any) -> Sequence:
    (seq,) = world.add(make_request(name, prompt, greedy(tokens), **extra))
    world.run()
    return seq


def flood(world: World, count: int = 12) -> None:
    """Text that takes `count` blocks: it drives out what was there."""
    run(world, "flood", [40 + len(world.sequences) % 5, *range(8, 8 + 4 * count - 3)])


def moved(world: World) -> Any:
    assert world.scheduler.tiers is not None
    return world.scheduler.tiers.stats


def test_what_was_evicted_comes_back_from_the_host(make: Make) -> None:
    world = make()
    run(world, "a", PROMPT)
    flood(world)
    computed = world.runner.computed_tokens
    seq = run(world, "b", PROMPT, tokens=3)
    assert seq.num_cached_tokens == 20
    assert world.runner.computed_tokens - computed == 1 + 2
    assert (moved(world).restored, moved(world).restored_tokens, moved(world).host_hits) == (5, 20, 20)
    stats = world.core.stats()
    assert stats["host_cache"]["offloaded"] == moved(world).offloaded >= 5
    hits = {"queried": 21 + 46 + 21, "device": 0, "host": 20, "disk": 0, "computed": 21 + 46 + 1}
    assert stats["prompt_hits"] == hits
    check_all(world)


def test_a_source_comes_back_as_a_whole_or_not_at_all(make: Make) -> None:
    source = make_source([feature("x", 9)])  # three blocks, the last partly filled
    world = make()
    world.add(make_answer("a", source, params=greedy(2)))
    world.run()
    flood(world)
    assert world.runner.sources == [source.key]
    (seq,) = world.add(make_answer("b", source, params=greedy(2)))
    world.run()
    assert world.runner.sources == [source.key], "it was computed again"
    assert world.runner.encoded == [b"x"]
    assert moved(world).restored == 3
    flood(world)
    world.runner.transfers.faults = CopyFaults(damaged=1.0)
    world.add(make_answer("c", source, params=greedy(2)))
    world.run()
    assert world.runner.sources == [source.key] * 2
    assert seq.num_cached_tokens == 0
    check_all(world)


def test_a_damaged_block_ends_what_is_found(make: Make) -> None:
    """Its copy is forgotten, those before it are of use, it and those behind it are computed."""
    world = make()
    run(world, "a", PROMPT)
    flood(world)
    keys = [content.key for content in world.sequences[0].contents]
    real = world.runner.transfers._end

    def end(copy: Any) -> Any:
        bad = copy.done.kind == "restore" and copy.done.key == keys[2]
        return copy.done._replace(ok=False, damaged=True) if bad else real(copy)

    world.runner.transfers._end = end  # type: ignore[method-assign]
    computed = world.runner.computed_tokens
    seq = run(world, "b", PROMPT)
    assert seq.num_cached_tokens == 8
    assert world.runner.computed_tokens - computed == 13
    assert moved(world).damaged == 1
    assert world.scheduler.tiers.host.find(keys[2]) is None
    assert world.scheduler.tiers.host.find(keys[3]) is not None
    check_all(world)


def test_copies_that_cannot_be_made_cost_time_only(make: Make) -> None:
    world = make(faults=CopyFaults(fails=1.0))
    run(world, "a", PROMPT)
    flood(world)
    assert moved(world).offloaded == 0
    assert moved(world).dropped > 0
    assert len(world.scheduler.tiers.host) == 0
    run(world, "b", PROMPT)
    world.runner.transfers.faults = CopyFaults()
    flood(world)
    world.runner.transfers.faults = CopyFaults(fails=1.0)
    assert run(world, "c", PROMPT).num_cached_tokens == 0
    assert world.runner.transfers.counts["failed"] > 5
    assert len(world.scheduler.tiers.host) > 0, "nothing is wrong with what is stored"
    check_all(world)


def stalled(world: World, name: str = "late", prompt: Any = PROMPT) -> Sequence:
    """A sequence whose copies are in flight, and stay so."""
    world.runner.transfers.hold_back = True
    (seq,) = world.add(make_request(name, prompt, greedy(2)))
    batch = world.scheduler.schedule()
    assert batch is not None
    assert batch.transfers.restores
    assert not batch.sequences
    world.core._launch(batch)
    return seq


def test_an_abort_leaves_blocks_to_the_copies_in_flight(make: Make) -> None:
    world = make()
    run(world, "a", PROMPT)
    flood(world)
    seq = stalled(world)
    pool = world.scheduler.pool
    assert pool.counts()["in_use"] == 5
    world.core.handle(Abort("late"))
    assert seq.status is Status.FINISHED
    world.scheduler.check_integrity()
    assert pool.counts()["in_use"] == 5, "blocks were freed under a copy"
    world.core.drain()
    world.scheduler.check_integrity()
    assert pool.counts()["in_use"] == 0
    assert moved(world).orphaned == 1
    assert run(world, "again", PROMPT).num_cached_tokens == 20, "what landed is found"
    assert moved(world).restored == 5


def test_what_is_cleared_is_not_found_when_it_lands(make: Make) -> None:
    world = make(places=40)
    run(world, "a", PROMPT)
    flood(world)
    seq = stalled(world)
    world.core.handle(ClearCache())
    world.scheduler.check_integrity()
    host = world.scheduler.tiers.host
    assert len(host) == 0
    assert host.counts()["leaving"] >= 5, "slots were freed under a copy"
    assert world.scheduler.pool.counts()["cached"] == 0
    world.run()
    assert seq.num_cached_tokens == 0
    assert host.counts()["free"] == host.num_slots
    assert world.disk is not None
    assert world.disk.counts()["entries"] == 0
    check_all(world)


def test_a_full_host_keeps_what_is_being_copied(make: Make) -> None:
    """Five slots with copies to the device in flight: the four blocks that are evicted for those are lost."""
    world = make(slots=5)
    run(world, "a", PROMPT)
    flood(world)
    before = moved(world).dropped
    stalled(world)
    assert moved(world).dropped == before + 4
    world.run()
    assert world.sequences[-1].num_cached_tokens == 20
    check_all(world)


def test_what_only_the_disk_has_comes_back_by_way_of_the_host(make: Make) -> None:
    world = make(slots=12, places=60)
    run(world, "a", PROMPT)
    for _ in range(4):
        flood(world)
    tiers, first = world.scheduler.tiers, world.sequences[0].contents
    assert tiers.lookup(first) == (0, 5, 0)
    seq = run(world, "b", PROMPT)
    assert seq.num_cached_tokens == 20
    assert (moved(world).disk_hits, moved(world).host_hits) == (20, 0)
    assert all(tiers.host.find(content.key) for content in first)
    world.runner.transfers.faults = CopyFaults(damaged=1.0)
    for _ in range(4):
        flood(world)
    assert run(world, "c", PROMPT).num_cached_tokens == 0
    assert tiers.lookup(first[:1]) == (0, 0, 1), "what was damaged is still there"
    check_all(world)


def test_two_that_want_the_same_have_it_copied_once(make: Make) -> None:
    world = make()
    run(world, "a", PROMPT)
    flood(world)
    stalled(world)
    world.add(make_request("too", PROMPT, greedy(2)))
    world.scheduler.tiers.restores.check_integrity()
    assert world.scheduler.schedule() is None
    world.run()
    assert [seq.num_cached_tokens for seq in world.sequences[-2:]] == [20, 20]
    assert moved(world).restored == 5
    check_all(world)


def test_what_was_copied_back_goes_before_anybody_is_preempted() -> None:
    world = World(num_blocks=12, max_num_seqs=1, tiers=Tiers(64))
    run(world, "a", PROMPT)
    flood(world)
    world.add(make_request("busy", [50, *range(8, 34)], greedy(20)))  # seven blocks, twelve at its end
    world.step()
    (late,) = world.add(make_request("late", PROMPT, greedy(2)))
    tiers = world.scheduler.tiers
    shared = world.scheduler.reuse.found(late)
    assert tiers.restore(late, shared, []) is not None
    world.step()
    while tiers.in_flight:
        world.core._take_copies(wait=True)
    assert tiers.restores.group_of(late) is not None
    assert world.scheduler.pool.num_available == 0
    world.run()
    assert moved(world).given_up == 1
    assert world.scheduler.stats.preemptions == 0
    check_all(world)


def test_the_loop_waits_for_a_copy_where_nothing_else_is_to_do(make: Make) -> None:
    world = make(faults=CopyFaults(late=0.0))
    run(world, "a", PROMPT)
    flood(world)
    waited = []
    real = world.runner.transfers.poll
    world.runner.transfers.poll = lambda wait=False: (waited.append(wait), real(wait))[1]  # type: ignore[method-assign]
    assert run(world, "b", PROMPT).num_cached_tokens == 20
    assert waited.count(True) >= 5
    check_all(world)


def test_others_go_on_beside_copies() -> None:
    world = World(num_blocks=24, tiers=Tiers(64))
    run(world, "a", PROMPT)
    flood(world, 24)
    world.add(make_request("busy", [50, 51], greedy(12)))
    world.step()
    world.runner.transfers.hold_back = True
    (late,) = world.add(make_request("late", PROMPT, greedy(2)))
    for _ in range(4):
        before = world.sequences[-2].num_output_tokens
        world.step()
        assert world.sequences[-2].num_output_tokens == before + 1
    assert late.status is Status.WAITING
    world.runner.transfers.hold_back = False
    world.run()
    assert late.num_cached_tokens == 20
    check_all(world)


def test_a_preempted_sequence_gets_its_own_back(make: Make) -> None:
    """Prompt and answer: what it had computed when it went, and others drove out."""
    world = make(max_num_seqs=1, max_tokens=64)
    (seq,) = world.add(make_request("a", PROMPT, greedy(14)))
    while seq.num_output_tokens < 12:
        world.step()
    world.scheduler._preempt(seq)
    world.core.drain()
    world.scheduler.waiting.remove(seq)
    flood(world)
    world.scheduler.waiting.put_back(seq)
    computed = world.runner.computed_tokens
    world.run()
    assert moved(world).restored == 8
    assert world.runner.computed_tokens - computed == 2
    assert seq.num_cached_tokens == 0, "what it found when it first began"
    check_all(world)


def test_a_step_that_cannot_be_launched_has_its_copies_made_once(make: Make) -> None:
    world = make()
    run(world, "a", PROMPT)
    ordered: list[Transfers] = []
    real = world.runner.transfers.launch
    world.runner.transfers.launch = lambda t: (ordered.append(t), real(t))[1]  # type: ignore[method-assign]
    died: list[int] = []

    def dies(batch: ScheduledBatch) -> Faults:
        if batch.transfers.stores and not died:
            died.append(batch.step)
            return Faults(dies=RuntimeError("once"))
        return Faults()

    world.runner.faults = dies
    flood(world)
    assert set(world.errors) == {"flood"}
    keys = Counter(store.key for transfers in ordered for store in transfers.stores)
    assert set(keys.values()) == {1}
    seq = run(world, "b", PROMPT)
    assert seq.num_cached_tokens == 20
    assert seq.output_token_ids == world.sequences[0].output_token_ids


def test_it_is_computed_where_that_is_faster(make: Make) -> None:
    world = make(always=False)
    run(world, "a", PROMPT)
    flood(world)
    world.scheduler.costs = CostModel(token_seconds=1e-3, encoder_seconds=1e-3, byte_seconds=1.0)
    assert run(world, "b", PROMPT).num_cached_tokens == 0
    assert (moved(world).declined, moved(world).restored) == (1, 0)
    flood(world)
    world.scheduler.costs = CostModel(token_seconds=1e-3, encoder_seconds=1e-3, byte_seconds=1e-6)
    assert run(world, "c", PROMPT).num_cached_tokens == 20
    check_all(world)


def test_steps_and_copies_tell_what_they_cost() -> None:
    world = World(num_blocks=80, max_tokens=96, tiers=Tiers(64))
    for name in "abcdef":
        run(world, name, [ord(name), *range(8, 88)], tokens=3)
    costs = world.scheduler.costs
    assert costs.token_seconds > 0
    assert costs.restore_seconds > 0, "decodes alone say when a copy is seen"
    assert costs.byte_seconds == 0
    run(world, "again", [ord("a"), *range(8, 88)])
    assert moved(world).restored > 0
    assert world.scheduler.costs.byte_seconds > 0


# -- encoder rows ----------------------------------------------------------------------------------


def rows_world(make: Make, **tiers: Any) -> World:
    """A slab for one item, and no reuse of blocks."""
    world = make(encoder_rows=9, reuse=False, **tiers)
    for name in "xy":
        run(world, name, [10, feature(name, 8), 11])
    return world


def test_rows_come_back_without_the_encoder(make: Make) -> None:
    world = rows_world(make)
    seq = run(world, "again", [12, feature("x", 8), 13])
    assert world.runner.encoded == [b"x", b"y"]
    assert seq.encoded_rows == 0
    assert (moved(world).restored_items, moved(world).restored_rows, moved(world).offloaded_rows) == (1, 8, 16)
    check_all(world)


def test_rows_that_come_back_take_no_encoder_budget() -> None:
    world = World(encoder_rows=24, encoder_budget=32, reuse=False, max_tokens=64, tiers=Tiers(64))
    for name in "xyz":
        run(world, name, [10, feature(name, 8), 11])
    run(world, "w", [10, feature("w", 24), 11])
    world.add(make_request("all", [10, *(feature(name, 8) for name in "xyz"), 11], greedy(1)))
    world.step()
    assert world.sequences[-1].num_computed_tokens == 26
    assert world.runner.encoded == [b"x", b"y", b"z", b"w"]
    world.run()
    check_all(world)


def test_damaged_rows_are_encoded_and_forgotten(make: Make) -> None:
    world = rows_world(make, faults=CopyFaults(damaged=1.0))
    run(world, "again", [12, feature("x", 8), 13])
    assert world.runner.encoded == [b"x", b"y", b"x"]
    assert world.scheduler.tiers.host.find(b"x") is None
    assert moved(world).damaged == 1
    check_all(world)


def test_rows_of_a_failed_item_are_not_stored(make: Make) -> None:
    world = make(encoder_rows=9, reuse=False)
    world.runner.faults = lambda batch: Faults(media=frozenset(i.key for i in batch.encode if i.key == b"x"))
    for name in "xy":
        world.add(make_request(name, [10, feature(name, 8), 11], greedy(1)))
        world.run()
    assert set(world.errors) == {"x"}
    assert world.scheduler.tiers.host.find(b"x") is None
    assert b"x" not in world.scheduler.tiers.host


# -- forgetting ------------------------------------------------------------------------------------


def test_what_is_stored_for_a_salt_can_be_forgotten(make: Make) -> None:
    world = make(places=60, num_blocks=16)
    for salt in ("one", "two"):
        run(world, salt, PROMPT, cache_salt=salt)
    flood(world, 16)
    tiers = world.scheduler.tiers
    assert tiers.forget(lambda content: content.salt == "one") == 5
    world.scheduler.check_integrity()
    assert [tiers.lookup(seq.contents) for seq in world.sequences[:2]] == [(0, 0, 0), (5, 0, 0)]
    world.run()
    assert run(world, "again", PROMPT, cache_salt="one").num_cached_tokens == 0
    assert run(world, "other", PROMPT, cache_salt="two").num_cached_tokens == 20


def test_what_moves_is_told(make: Make) -> None:
    world = make(slots=12, places=60)
    told: Counter[tuple[str, str]] = Counter()

    class Listener:
        def moved(self, move: str, level: str, content: Any, num_rows: int) -> None:
            assert content.key
            assert num_rows == 0
            told[move, level] += 1

    world.scheduler.tiers.observers.append(Listener())
    run(world, "a", PROMPT)
    for _ in range(4):
        flood(world)
    run(world, "b", PROMPT)
    stats, host = moved(world), world.scheduler.tiers.host
    assert told["restored", "disk"] == stats.restored == 5
    assert told["offloaded", "host"] == stats.offloaded + 5  # those on their way from disk
    assert told["offloaded", "disk"] == stats.spilled > 5
    assert told["evicted", "host"] == host.evicted == told["offloaded", "host"] - len(host)


# -- lives -----------------------------------------------------------------------------------------

A, B, C, D = MEDIA
PROMPTS = [
    [8, 9, A, B, 9, 8, 9],
    [8, 9, A, B, 9, 8, 9, 9, 8],
    [8, 9, C, 10, 11],
    [B, B, 9],
    [*[8, 9] * 7],
    [*[9, 8] * 8, D],
]
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from(PROMPTS), st.integers(1, 9), st.integers(1, 2), STOPS, st.none()),
        st.tuples(st.just("add"), TEXT, st.integers(1, 12), st.integers(1, 2), STOPS, st.sampled_from(SOURCES[1:3])),
        st.tuples(st.just("step"), st.integers(1, 9)),
        st.tuples(st.just("abort"), st.integers(0, 30)),
        st.tuples(st.sampled_from(["clear", "forget", "step"]), st.integers(10, 30)),
        st.tuples(st.sampled_from(["pin", "unpin"]), st.sampled_from(MEDIA)),
    ),
    min_size=6,
    max_size=40,
)
SHARES = st.sampled_from([0.0, 0.0, 0.1, 0.5])
TIERS = st.builds(
    Tiers,
    slots=st.integers(1, 40),
    places=st.sampled_from([0, 3, 20, 60]),
    faults=st.builds(CopyFaults, fails=SHARES, damaged=SHARES, late=st.sampled_from([0.05, 0.3, 0.7, 1.0])),
    always=st.booleans(),
    max_filling=st.sampled_from([1, 4, 1024]),
    max_spills=st.sampled_from([1, 4]),
    seed=st.integers(0, 1000),
)
WORLDS = {
    "actions": ACTIONS,
    "tiers": TIERS,
    "policy": st.sampled_from(["reuse", "fcfs"]),
    "overlap": st.booleans(),
    "num_blocks": st.integers(8, 24),
    "max_num_seqs": st.integers(1, 6),
    "max_tokens": st.integers(1, 40),
    "encoder_rows": st.integers(9, 20),
    "encoder_budget": st.integers(1, 80),
    "source_budget": st.sampled_from([0, 1, 12]),
    "faults": st.one_of(st.none(), st.integers(0, 1000)),
}
SEEN: Counter[str] = Counter()  # in all lives of this process


def live_with_tiers(**settings: Any) -> None:
    """A life at whose end nothing is in flight, and all that is stored can be dropped."""
    world = live(**settings)
    tiers, copies = world.scheduler.tiers, world.runner.transfers
    assert tiers is not None
    SEEN.update(copies.counts)
    SEEN.update(
        {name: getattr(tiers.stats, name) for name in ("given_up", "orphaned", "declined", "host_hits", "disk_hits")}
    )
    assert tiers.in_flight == copies.pending == 0
    assert not list(tiers.restores.tables)
    if world.disk is not None:
        world.disk.check_idle()
    world.core.handle(ClearCache())
    world.scheduler.check_integrity()
    assert tiers.host.counts()["free"] == tiers.host.num_slots
    if world.disk is not None:
        assert world.disk.counts()["free"] == world.disk.counts()["places"]


@settings(max_examples=150, deadline=None)
@given(**WORLDS)
def test_random_life_with_tiers(**world: Any) -> None:
    live_with_tiers(**world)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None)
@given(**WORLDS)
def test_random_life_with_tiers_at_length(**world: Any) -> None:
    live_with_tiers(**world)


def long_life(seed: int) -> None:
    """A hundred actions, most of them requests for what was there before."""
    dice = random.Random(seed)

    def action() -> tuple[Any, ...]:
        kind = dice.choices(["text", "answer", "step", "abort", "clear", "forget"], [8, 4, 12, 3, 0.2, 0.3])[0]
        if kind in ("step", "abort", "forget"):
            return kind, dice.randint(1, 12) if kind == "step" else dice.randint(0, 3)
        if kind == "clear":
            return (kind,)
        source = dice.choice(SOURCES) if kind == "answer" else None
        parts = dice.choice(PROMPTS) if kind == "text" else [dice.randint(8, 9) for _ in range(dice.randint(1, 9))]
        stops = frozenset({20}) if dice.random() < 0.3 else frozenset()
        return "add", parts, dice.randint(1, 12), dice.choice([1, 1, 2]), stops, source

    rate = dice.choice([0.0, 0.0, 0.1, 0.3])
    faults = CopyFaults(fails=rate, damaged=dice.choice([0.0, 0.1, 0.3]), late=dice.choice([0.05, 0.2, 0.5, 1.0]))
    live_with_tiers(
        actions=[action() for _ in range(100)],
        tiers=Tiers(
            slots=dice.choice([3, 8, 20, 60, 200]),
            places=dice.choice([0, 4, 40, 200]),
            faults=faults,
            always=dice.random() < 0.7,
            max_filling=dice.choice([1, 5, 1024]),
            max_spills=dice.choice([1, 4]),
            seed=seed,
        ),
        policy=dice.choice(["reuse", "fcfs"]),
        overlap=dice.random() < 0.5,
        num_blocks=dice.randint(8, 20),
        max_num_seqs=dice.randint(1, 6),
        max_tokens=dice.choice([4, 16, 40]),
        encoder_rows=dice.randint(9, 20),
        encoder_budget=dice.randint(1, 80),
        source_budget=dice.choice([0, 1, 12]),
        faults=seed if dice.random() < 0.3 else None,
    )


def test_long_lives_are_eventful() -> None:
    """What the lives are for did happen in them."""
    SEEN.clear()
    for seed in range(32):
        long_life(seed)
    assert min(SEEN.values()) > 0, SEEN


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 3000, 250))
def test_thousands_of_long_lives(first: int) -> None:
    for seed in range(first, first + 250):
        long_life(seed)
