"""The scheduler on a fake model: same tokens whatever is shared, chunked, evicted or preempted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from support.fake_model import World
from support.fake_requests import expected_tokens, feature, make_request
from support.lives import WORLDS, live

from mm_core.config import SamplingParams
from mm_core.engine.messages import ClearCache
from mm_core.errors import EngineError
from mm_core.scheduler import Candidate, SampledToken, StepResult, longest_prefix_first
from mm_core.types import FinishReason

Make = Callable[..., World]


@pytest.fixture(params=[False, True], ids=["alone", "overlapped"])
def make(request: pytest.FixtureRequest) -> Make:
    """Worlds whose steps are taken in before the next one is scheduled, and after."""
    return partial(World, overlap=request.param)


def check_all(world: World) -> None:
    for seq in world.sequences:
        if seq.request.request_id not in world.errors:
            wanted = expected_tokens(seq.request, seq.params.max_tokens or 0)
            assert seq.output_token_ids == wanted, seq.seq_id


def greedy(n: int) -> SamplingParams:
    return SamplingParams(max_tokens=n, temperature=0)


def test_second_request_reuses_the_prefix(make: Make) -> None:
    world = make()
    prompt = list(range(10, 31))
    world.add(make_request("a", prompt))
    world.run()
    computed = world.runner.computed_tokens
    (second,) = world.add(make_request("b", prompt))
    world.run()
    assert second.num_cached_tokens == 20
    assert world.runner.computed_tokens - computed == 1 + 3  # the last prompt token, three decodes
    check_all(world)


def test_full_hit_still_computes_the_last_block(make: Make) -> None:
    world = make()
    prompt = list(range(10, 26))  # exactly four blocks
    world.add(make_request("a", prompt))
    world.run()
    (second,) = world.add(make_request("b", prompt))
    world.run()
    assert second.num_cached_tokens == 12
    check_all(world)


def test_reuse_can_be_off(make: Make) -> None:
    world = make(reuse=False)
    for name in "ab":
        (seq,) = world.add(make_request(name, range(10, 31)))
        world.run()
        assert seq.num_cached_tokens == 0
    assert world.scheduler.pool.counts()["cached"] == 0
    check_all(world)


def test_identical_prompts_in_flight_are_computed_once(make: Make) -> None:
    world = make(max_tokens=64)
    prompt = [10, 11, feature("cat", 8), *range(12, 20)]
    for name in "abcd":
        world.add(make_request(name, prompt))
    world.run()
    assert world.scheduler.stats.deferred > 0
    assert world.runner.encoded == [b"cat"]
    assert world.scheduler.stats.cached_tokens == 3 * 16
    check_all(world)


@pytest.mark.parametrize("how", ["abort", "preempt"])
def test_a_waiter_takes_over(how: str) -> None:
    world = World(max_tokens=40)
    prompt = list(range(10, 40))
    (first,) = world.add(make_request("a", prompt))
    world.add(make_request("b", prompt))
    batch = world.scheduler.schedule()
    assert batch is not None
    assert world.scheduler.stats.deferred == 1
    if how == "abort":
        world.scheduler.finish(first, FinishReason.ABORT)
        world.sequences.remove(first)
    else:
        world.scheduler._preempt(first)
    world.scheduler.update(batch, StepResult({}))
    world.scheduler.check_integrity()
    world.run()
    # The prompt is computed once by whoever came first, its tail and three decodes by each.
    assert world.runner.computed_tokens == (30 + 3 if how == "abort" else 30 + 3 + 2 + 3)
    check_all(world)


def test_same_tokens_other_media_share_nothing(make: Make) -> None:
    world = make()
    (first,) = world.add(make_request("a", [10, feature("cat", 12), 11, 12]))
    world.run()
    (second,) = world.add(make_request("b", [10, feature("dog", 12), 11, 12]))
    world.run()
    assert first.request.token_ids == second.request.token_ids
    assert second.num_cached_tokens == 0
    check_all(world)


def test_salt_and_context_separate(make: Make) -> None:
    world = make()
    prompt = list(range(10, 31))
    world.add(make_request("a", prompt, cache_salt="one"))
    world.run()
    for extra in ({"cache_salt": "two"}, {}, {"cache_salt": "one", "kv_context": b"question"}):
        (seq,) = world.add(make_request("b", prompt, **extra))
        world.run()
        assert seq.num_cached_tokens == 0
    (seq,) = world.add(make_request("c", prompt, cache_salt="one"))
    world.run()
    assert seq.num_cached_tokens == 20


def test_long_prompts_run_in_chunks_beside_decodes(make: Make) -> None:
    world = make(max_tokens=8, num_blocks=64)
    world.add(make_request("short", [10, 11, 12], greedy(20)))
    world.step()
    world.add(make_request("long", range(8, 48), greedy(3)))
    before = world.sequences[0].num_output_tokens
    for _ in range(5):
        world.step()
    assert world.sequences[0].num_output_tokens == before + 5  # a decode in every step
    assert world.scheduler.stats.partial_prefills >= 4
    world.run()
    check_all(world)


def test_preemption_keeps_tokens(make: Make) -> None:
    world = make(num_blocks=12, max_tokens=32)
    for i in range(4):
        world.add(make_request(str(i), range(10 + i, 18 + i), greedy(24)))
    world.run()
    assert world.scheduler.stats.preemptions > 0
    check_all(world)


def test_encoder_budget_cuts_a_chunk_before_the_item() -> None:
    world = World(encoder_budget=40, max_tokens=64)
    (seq,) = world.add(make_request("a", [10, feature("x", 8), 11, feature("y", 8), 12]))
    world.step()
    assert seq.num_computed_tokens == 10
    assert world.runner.encoded == [b"x"]
    world.run()
    check_all(world)


def test_an_item_over_the_encoder_budget_runs_alone(make: Make) -> None:
    world = make(encoder_budget=4)
    world.add(make_request("a", [10, feature("x", 8), feature("y", 8)]))
    world.run()
    check_all(world)


def test_encoder_rows_outlive_the_request_and_are_evicted_for_room(make: Make) -> None:
    world = make(encoder_rows=20, reuse=False)
    for name in ("x", "y", "y", "z", "y", "x"):  # y is found more often, and stays
        world.add(make_request(name, [10, feature(name, 8), 11]))
        world.run()
    assert world.runner.encoded == [b"x", b"y", b"z", b"x"]
    check_all(world)


def test_one_item_twice_in_a_prompt_is_encoded_once(make: Make) -> None:
    world = make(encoder_rows=8)
    x = feature("x", 8)
    world.add(make_request("a", [10, x, 11, x, 12]))
    world.run()
    assert world.runner.encoded == [b"x"]
    check_all(world)


def test_nan_ends_one_request_only() -> None:
    world = World()
    (bad,) = world.add(make_request("bad", range(10, 20)))
    world.add(make_request("good", range(20, 29)))
    batch = world.scheduler.schedule()
    assert batch is not None
    result = world.runner.execute(batch)
    sampled = dict(result.sampled)
    sampled[bad.seq_id] = SampledToken(0, finite=False)
    events = world.scheduler.update(batch, StepResult(sampled))
    failed = [e for e in events if e.error is not None]
    assert [e.seq for e in failed] == [bad]
    assert isinstance(failed[0].error, EngineError)
    world.sequences.remove(bad)
    world.run()
    check_all(world)


def test_abort_while_a_step_is_in_flight_keeps_blocks_pending() -> None:
    world = World()
    (seq,) = world.add(make_request("a", range(10, 20)))
    batch = world.scheduler.schedule()
    assert batch is not None
    world.scheduler.finish(seq, FinishReason.ABORT)
    assert world.scheduler.pool.counts()["pending"] == 3
    world.scheduler.check_integrity()
    world.scheduler.update(batch, StepResult({}))
    assert world.scheduler.pool.counts() == {"free": 32, "cached": 0, "in_use": 0, "pending": 0, "pinned": 0}


def test_a_failed_item_is_encoded_anew_for_who_else_held_it() -> None:
    """A's step failed with the item, B's did not: B goes on and has it made again."""
    world = World(max_tokens=24)
    x = feature("x", 20)
    (a,) = world.add(make_request("a", [10, x, 11]))
    world.add(make_request("b", [12, x, 13, 14]))
    batch = world.scheduler.schedule()
    assert batch is not None
    result = world.runner.execute(batch)
    world.runner.rows.clear()
    failed = StepResult(result.sampled, {a.seq_id: EngineError("broken")}, frozenset({b"x"}))
    world.scheduler.update(batch, failed)
    world.sequences.remove(a)
    world.run()
    assert world.runner.encoded.count(b"x") == 2
    check_all(world)


def test_admission_leaves_room_for_prompts_under_way(make: Make) -> None:
    """A long prompt that runs in chunks keeps the blocks it will want: nobody is preempted for it."""
    world = make(num_blocks=24, max_tokens=8)
    world.add(make_request("long", range(8, 88), greedy(2)))
    world.step()
    world.add(make_request("late", [*range(8, 48), 9], greedy(2)))
    world.run()
    assert world.scheduler.stats.preemptions == 0
    check_all(world)


def test_what_is_shared_is_no_room_for_the_rest() -> None:
    """Cached blocks that a new sequence shares cannot be evicted for its other blocks."""
    world = World(num_blocks=8, max_tokens=32)
    prompt = list(range(10, 34))
    world.add(make_request("a", prompt, greedy(1)))
    world.run()
    world.add(make_request("busy", [5, 6, 8, 9, 5], greedy(20)))
    world.step()
    assert world.scheduler.pool.counts() == {"free": 0, "cached": 6, "in_use": 2, "pending": 0, "pinned": 0}
    (late,) = world.add(make_request("late", [*prompt[:20], 9, 9, 9, 9, 9, 9], greedy(1)))
    world.step()
    assert late.num_computed_tokens == 0
    world.run()
    check_all(world)


def test_blocks_in_flight_are_waited_for_rather_than_taken_from_others(make: Make) -> None:
    """With steps in flight a preempted sequence's blocks come a step later: one preemption is enough."""
    world = make(num_blocks=12, max_tokens=32)
    for i in range(4):
        world.add(make_request(str(i), range(10 + i, 18 + i), greedy(24)))
    counts = [0]
    while world.core.has_work:
        world.step()
        counts.append(world.scheduler.stats.preemptions)
    assert counts[-1] > 0
    assert max(after - before for before, after in pairwise(counts)) == 1
    check_all(world)


def test_an_answer_about_to_end_is_not_preempted() -> None:
    """Its last token is in flight: the blocks come back by themselves."""
    world = World(overlap=True, num_blocks=5, max_tokens=16, reuse=False)
    (first,) = world.add(make_request("first", range(10, 16), greedy(8)))
    world.add(make_request("second", range(20, 22), greedy(7)))
    world.run()
    assert first.num_output_tokens == 8
    assert world.scheduler.stats.preemptions == 0
    check_all(world)


def test_a_cleared_prefix_is_not_remembered() -> None:
    world = World(max_num_seqs=1)
    prompt = list(range(10, 31))
    world.add(make_request("a", prompt))
    world.run()
    (seq,) = world.add(make_request("b", prompt))
    assert world.scheduler.reuse.look_up(seq) == 5
    world.core.handle(ClearCache())
    assert world.scheduler.reuse.look_up(seq) == 0
    world.run()
    assert seq.num_cached_tokens == 0


def test_stop_ids_and_limits(make: Make) -> None:
    prompt = list(range(10, 20))
    wanted = expected_tokens(make_request("x", prompt), 6)
    world = make()
    (eos,) = world.add(make_request("a", prompt, greedy(6), stop_token_ids=frozenset({wanted[2]})))
    ignore = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    (free,) = world.add(make_request("b", prompt, ignore, stop_token_ids=frozenset({wanted[2]})))
    stop = SamplingParams(max_tokens=6, temperature=0, stop_token_ids=(wanted[1],), ignore_eos=True)
    (own,) = world.add(make_request("c", prompt, stop))
    world.run()
    assert eos.output_token_ids == wanted[:3]
    assert free.output_token_ids == wanted
    assert own.output_token_ids == wanted[:2]


def test_policy_prefers_cached_prefixes_and_ages() -> None:
    fresh = Candidate(arrival=0, cached_tokens=0, waited_steps=0)
    hit = Candidate(arrival=1, cached_tokens=64, waited_steps=0)
    old = Candidate(arrival=2, cached_tokens=0, waited_steps=5)
    assert longest_prefix_first([fresh, hit, old]) == [2, 1, 0]
    assert longest_prefix_first([fresh, hit]) == [1, 0]
    assert longest_prefix_first([fresh, Candidate(1, 0, 0)]) == [0, 1]


@settings(max_examples=200, deadline=None)
@given(**WORLDS)
def test_random_life(**world: Any) -> None:
    """Adds, aborts, steps, evictions and faults in any order: books balance, nothing is read that is not
    there or not to be read, tokens are those of a lone run."""
    live(**world)


@pytest.mark.slow
@settings(max_examples=5000, deadline=None)
@given(**WORLDS)
def test_random_life_at_length(**world: Any) -> None:
    live(**world)
