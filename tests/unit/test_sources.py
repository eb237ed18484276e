"""What decoders attend to: computed once, shared, waited for, given up, and never read before it is there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from support.fake_model import Faults, World
from support.fake_requests import expected_tokens, feature, make_answer, make_request, make_source

from mm_core.config import SamplingParams
from mm_core.engine.messages import Abort, ClearCache
from mm_core.errors import ContextLengthError, EngineError, MediaTooLargeError
from mm_core.scheduler import ScheduledBatch, Status
from mm_core.types import Source

Make = Callable[..., World]

CLIP = make_source([feature("clip", 10)])
PAGE = make_source([feature("page", 6)])
TEXT = make_source([10, 11, feature("cat", 4), 12])


@pytest.fixture(params=[False, True], ids=["alone", "overlapped"])
def make(request: pytest.FixtureRequest) -> Make:
    return partial(World, overlap=request.param)


def greedy(n: int, answers: int = 1) -> SamplingParams:
    return SamplingParams(max_tokens=n, temperature=0, n=answers)


def check_answers(world: World) -> None:
    for seq in world.sequences:
        if seq.request.request_id not in world.errors:
            assert seq.output_token_ids == expected_tokens(seq.request, seq.params.max_tokens or 0)


def ask(world: World, name: str, source: Source = CLIP, tokens: int = 4, answers: int = 1):
    return world.add(make_answer(name, source, params=greedy(tokens, answers)))


# -- sharing ---------------------------------------------------------------------------------------


def test_answers_depend_on_the_source() -> None:
    answers = {tuple(expected_tokens(make_answer("x", s), 4)) for s in (CLIP, PAGE, TEXT)}
    assert len(answers) == 3


@pytest.mark.parametrize("source", [CLIP, TEXT])
def test_a_source_is_computed_once(make: Make, source: Source) -> None:
    world = make()
    ask(world, "a", source)
    world.run()
    encoded = list(world.runner.encoded)
    world.scheduler.encoder_cache.discard(encoded[0])
    (second,) = ask(world, "b", source)
    world.step()
    assert second.status is Status.RUNNING
    assert (second.held_media, second.encoded_rows) == (set(), 0)
    world.run()
    assert world.runner.encoded == encoded, "the encoder worked for a source that was there"
    assert world.runner.sources == [source.key]
    check_answers(world)


def test_those_in_flight_share_it(make: Make) -> None:
    world = make()
    ask(world, "a", answers=3)
    ask(world, "b")
    ask(world, "other", PAGE)
    world.run()
    assert world.runner.sources == [CLIP.key, PAGE.key]
    assert world.runner.encoded == [b"clip", b"page"]
    assert world.scheduler.stats.deferred >= 3
    assert world.scheduler.stats.computed_sources == 2
    check_answers(world)


def test_a_partly_filled_block_is_shared() -> None:
    world = World()
    (first,) = ask(world, "a", tokens=8)
    world.step()
    (second,) = ask(world, "b", tokens=8)
    world.step()
    assert len(first.tables["cross"]) == 3, "ten rows in blocks of four"
    assert second.tables["cross"] == first.tables["cross"]
    assert not set(second.tables["self"]) & set(first.tables["self"])
    world.run()
    check_answers(world)


def test_prompts_are_shared_under_one_source_only(make: Make) -> None:
    world = make()
    prompt = list(range(10, 23))
    for name, source, cached in (("a", CLIP, 0), ("b", PAGE, 0), ("c", CLIP, 12)):
        (seq,) = world.add(make_answer(name, source, prompt))
        world.run()
        assert seq.num_cached_tokens == cached
    check_answers(world)


def test_without_reuse_everybody_computes_it(make: Make) -> None:
    world = make(reuse=False)
    first, second = ask(world, "a", answers=2)
    world.step()
    assert first.tables["cross"]
    assert not set(first.tables["cross"]) & set(second.tables["cross"])
    world.run()
    assert world.runner.sources == [CLIP.key] * 2
    assert world.scheduler.pool.counts()["cached"] == 0
    check_answers(world)


def test_one_block_that_is_gone_means_all_of_it_again() -> None:
    world = World(num_blocks=8)
    ask(world, "a", tokens=1)
    world.run()
    world.add(make_request("long", range(10, 34), greedy(1)))  # seven blocks: all but one of the source's go
    world.run()
    (again,) = ask(world, "b")
    assert world.scheduler.reuse.find_source(again) == []
    world.run()
    assert world.runner.sources == [CLIP.key] * 2
    check_answers(world)


def test_a_source_that_was_forgotten_is_not_remembered() -> None:
    world = World(max_num_seqs=1)
    ask(world, "a")
    world.run()
    (seq,) = ask(world, "b")
    assert len(world.scheduler.reuse.find_source(seq)) == 3
    world.core.handle(ClearCache())
    assert world.scheduler.reuse.find_source(seq) == []
    world.run()
    assert world.runner.sources == [CLIP.key] * 2
    check_answers(world)


def test_a_source_that_is_there_is_no_room_for_the_rest() -> None:
    """Its cached blocks cannot be evicted for the sequence's prompt."""
    world = World(num_blocks=8, max_tokens=32)
    ask(world, "a", tokens=1)
    world.run()
    world.add(make_request("busy", range(10, 19), greedy(8)))
    world.step()
    assert world.scheduler.pool.counts() == {"free": 2, "cached": 3, "in_use": 3, "pending": 0, "pinned": 0}
    (late,) = world.add(make_answer("late", CLIP, range(10, 20)))
    world.step()
    assert late.status is Status.WAITING
    world.run()
    check_answers(world)


def test_policy_prefers_sources_that_are_there() -> None:
    world = World(max_num_seqs=1)
    ask(world, "a")
    world.run()
    (other,) = ask(world, "other", PAGE)
    (same,) = ask(world, "same")
    world.step()
    assert (other.status, same.status) == (Status.WAITING, Status.RUNNING)
    world.run()
    check_answers(world)


# -- taking over -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["abort", "preempt"])
def test_who_waits_takes_over(how: str) -> None:
    world = World(overlap=True)
    (first,) = ask(world, "a")
    (second,) = ask(world, "b")
    world.step()
    assert (second.status, world.scheduler.stats.deferred) == (Status.WAITING, 1)
    if how == "abort":
        world.core.handle(Abort("a"))
        world.sequences.remove(first)
    else:
        world.scheduler._preempt(first)
    world.step()
    assert world.scheduler.reuse.find_source(second) == [], "it was published by a step that is void"
    world.run()
    assert world.runner.sources == [CLIP.key] * 2
    assert world.runner.encoded == [b"clip"]
    check_answers(world)


def test_a_source_that_ends_in_nan_is_not_published() -> None:
    world = World()
    ask(world, "bad")
    ask(world, "good")
    world.runner.faults = lambda batch: Faults(nan=frozenset({1} if batch.step == 1 else ()))
    world.run()
    assert set(world.errors) == {"bad"}
    assert world.runner.sources == [CLIP.key] * 2
    check_answers(world)


def test_media_that_cannot_be_encoded_end_their_request(make: Make) -> None:
    world = make()
    ask(world, "a")
    ask(world, "b", PAGE)
    world.runner.faults = lambda batch: Faults(media=frozenset({b"clip"} & {i.key for i in batch.encode}))
    world.run()
    assert set(world.errors) == {"a"}
    check_answers(world)


def test_a_source_of_an_item_that_turns_out_spoilt_is_computed_again() -> None:
    """The second source reads the item in the step launched before the failure was known."""
    world = World(overlap=True, source_budget=10)
    item = feature("x", 6)
    world.add(make_answer("a", make_source([item])))
    (second,) = world.add(make_answer("b", make_source([8, item]), params=greedy(3)))
    done: list[int] = []

    def late(batch: ScheduledBatch) -> Faults:
        bad = {b"x"} & {i.key for i in batch.encode} if not done else set()
        done.extend([batch.step] * len(bad))
        return Faults(media=frozenset(bad), late=True)

    world.runner.faults = late
    world.run()
    assert set(world.errors) == {"a"}
    assert second.epoch == 1
    assert world.runner.encoded == [b"x", b"x"]
    check_answers(world)


@pytest.mark.parametrize("step", [1, 2])
def test_a_step_that_cannot_be_launched_costs_nobody_a_source(step: int) -> None:
    world = World(overlap=True)
    ask(world, "a", tokens=6)
    ask(world, "b", PAGE, tokens=6)
    dies = [step]

    def once(batch: ScheduledBatch) -> Faults:
        if batch.step in dies:
            dies.clear()
            return Faults(dies=RuntimeError("once"))
        return Faults()

    world.runner.faults = once
    world.run()
    assert not world.errors
    check_answers(world)


def test_what_a_step_before_a_preemption_computed_is_not_published() -> None:
    world = World(overlap=True)
    (seq,) = ask(world, "a")
    world.step()
    world.scheduler._preempt(seq)
    assert seq.source_step == 0
    batch = world.scheduler.schedule()  # it runs again before the old step is taken in
    assert batch is not None
    assert (batch.sources, seq.source_step) == ((seq,), 2)
    launched = world.runner.launch(batch)
    world.core._take_in()
    assert (seq.source_step, seq.held_media, world.scheduler.reuse.find_source(seq)) == (2, {b"clip"}, [])
    world.scheduler.update(batch, launched.wait())
    assert (seq.source_step, seq.held_media) == (0, set())
    assert world.scheduler.reuse.find_source(seq) == seq.tables["cross"]
    world.run()
    check_answers(world)


# -- room and budgets ------------------------------------------------------------------------------


def test_media_are_held_until_the_step_that_reads_them_is_done() -> None:
    world = World(overlap=True, encoder_rows=10)
    (first,) = ask(world, "a", tokens=8)
    world.step()
    assert (first.held_media, world.scheduler.encoder_cache.room) == ({b"clip"}, 0)
    world.step()
    assert (first.held_media, world.scheduler.encoder_cache.room) == (set(), 10)
    world.run()
    check_answers(world)


def test_a_preempted_sequence_finds_its_source(make: Make) -> None:
    world = make(num_blocks=12, max_tokens=32)
    for i in range(3):
        world.add(make_answer(str(i), PAGE, range(10 + i, 14 + i), greedy(20)))
    world.run()
    assert world.scheduler.stats.preemptions > 0
    assert world.runner.sources == [PAGE.key]
    check_answers(world)


def test_sources_of_a_step_are_bounded(make: Make) -> None:
    world = make(source_budget=16)
    sources = [make_source([feature(f"f{i}", 6)]) for i in range(4)]
    for i, source in enumerate(sources):
        ask(world, str(i), source)
    ask(world, "large", make_source([feature("large", 20)]))
    per_step: list[int] = []
    real = world.runner.launch
    world.runner.launch = lambda b: (per_step.append(len(b.sources)), real(b))[1]  # type: ignore[method-assign]
    world.run()
    assert [count for count in per_step if count] == [2, 2, 1]
    check_answers(world)


def test_a_source_over_the_budget_is_not_overtaken() -> None:
    world = World(source_budget=12, max_num_seqs=4, num_blocks=64, encoder_rows=256, encoder_budget=4000)
    ask(world, "s0", make_source([feature("s0", 6)]), tokens=2)
    (large,) = ask(world, "large", make_source([feature("large", 20)]), tokens=2)
    for i in range(1, 12):
        ask(world, f"s{i}", make_source([feature(f"s{i}", 6)]), tokens=2)
    world.step()
    assert len(world.runner.sources) == 1, "one behind it took what was left of the budget"
    world.step()
    assert large.num_output_tokens == 1
    world.run()
    check_answers(world)


def test_the_encoders_budget_bounds_the_sources_of_a_step() -> None:
    world = World(encoder_budget=20)
    for name in "xyz":
        ask(world, name, make_source([feature(name, 4)]))  # 16 each
    for encoded in ([b"x"], [b"x", b"y"], [b"x", b"y", b"z"]):
        world.step()
        assert world.runner.encoded == encoded
    world.run()
    assert world.scheduler.stats.encoded_ahead == 0
    check_answers(world)


def test_media_of_one_source_may_be_over_the_encoders_budget(make: Make) -> None:
    world = make(encoder_budget=20)
    both = make_source([feature("x", 4), feature("y", 4)])
    ask(world, "first", make_source([feature("z", 2)]))
    (seq,) = ask(world, "both", both)
    ask(world, "late", make_source([feature("w", 2)]))
    world.run()
    assert world.runner.sources[1] == both.key
    assert seq.encoded_rows == 8
    check_answers(world)


def test_media_of_waiting_sources_are_encoded_ahead(make: Make) -> None:
    world = make(max_num_seqs=1)
    ask(world, "a", tokens=6)
    (page,) = ask(world, "page", PAGE)
    (same,) = ask(world, "same")
    world.step()
    assert world.runner.encoded == [b"clip", b"page"]
    world.step()
    assert page.kept_media == {b"page"}
    assert same.kept_media == set(), "its source is there, or will be"
    world.run()
    assert world.scheduler.stats.encoded_ahead == 1
    check_answers(world)


def test_what_was_kept_for_a_source_that_is_there_is_let_go() -> None:
    world = World(max_num_seqs=1)
    world.add(make_request("busy", [10, 11], greedy(6)))
    ask(world, "a", TEXT, tokens=1)
    (seq,) = world.add(make_answer("b", TEXT, params=greedy(8)))
    world.step()
    world.step()
    assert b"cat" in world.runner.encoded
    while seq.status is not Status.RUNNING:
        world.step()
    assert (seq.kept_media, seq.held_media) == (set(), set())
    world.run()
    check_answers(world)


def test_text_needs_no_encoder(make: Make) -> None:
    world = make()
    ask(world, "a", make_source([10, 11, 12, 13, 14]))
    world.run()
    assert world.runner.encoded == []
    assert len(world.runner.sources) == 1
    check_answers(world)


# -- what can never run ----------------------------------------------------------------------------


def test_requests_that_can_never_run_are_refused_at_once(make: Make) -> None:
    world = make(num_blocks=4, encoder_rows=16)
    ask(world, "running", make_source([10, 11]))
    ask(world, "blocks", make_source([feature("x", 15)]))
    ask(world, "rows", make_source([feature("x", 9), feature("y", 9)]))
    ask(world, "item", make_source([feature("z", 17)]))
    assert {name: type(error) for name, error in world.errors.items()} == {
        "blocks": ContextLengthError,
        "rows": MediaTooLargeError,
        "item": MediaTooLargeError,
    }
    assert "KvCacheConfig" in str(world.errors["blocks"])
    assert "encoder_cache_tokens" in str(world.errors["rows"])
    world.run()
    check_answers(world)


def test_an_answer_ends_where_the_pool_ends(make: Make) -> None:
    world = make(num_blocks=5)
    (seq,) = ask(world, "a", tokens=100)
    world.run()
    assert seq.num_tokens == 2 * 4
    assert seq.output_token_ids == expected_tokens(seq.request, 7)
    assert not any(isinstance(error, EngineError) for error in world.errors.values())
