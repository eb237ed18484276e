"""The engine's loop with a step in flight: what is launched when, and what becomes of late news."""

from __future__ import annotations

import pytest
import torch
from bench.loop_cost import decode_cost, whole_run
from support.fake_model import Faults, World
from support.fake_requests import expected_tokens, feature, make_request

from mm_core.config import SamplingParams
from mm_core.engine.messages import Abort, ClearCache
from mm_core.errors import EngineError
from mm_core.scheduler import ScheduledBatch, Status
from mm_core.types import FinishReason


def greedy(n: int) -> SamplingParams:
    return SamplingParams(max_tokens=n, temperature=0)


def launched(world: World) -> list[ScheduledBatch]:
    """Every batch launched from now on."""
    batches: list[ScheduledBatch] = []
    real = world.runner.launch

    def launch(batch: ScheduledBatch):
        batches.append(batch)
        return real(batch)

    world.runner.launch = launch  # type: ignore[method-assign]
    return batches


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_is_launched_before_the_one_before_it_is_taken_in(overlap: bool) -> None:
    world = World(overlap=overlap)
    (seq,) = world.add(make_request("a", range(10, 18), greedy(4)))
    world.step()
    assert (seq.num_output_tokens, seq.num_in_flight) == ((0, 1) if overlap else (1, 0))
    assert world.core.stats()["steps_in_flight"] == overlap
    world.run()
    assert world.runner.most_in_flight == 1 + overlap
    assert world.runner.computed_tokens == 8 + 3, "a step was wasted on an answer whose length was known"
    assert seq.output_token_ids == expected_tokens(seq.request, 4)


def test_what_is_computed_behind_an_end_is_dropped() -> None:
    prompt = list(range(10, 18))
    wanted = expected_tokens(make_request("x", prompt), 3)
    world = World(overlap=True)
    (seq,) = world.add(make_request("a", prompt, greedy(20), stop_token_ids=frozenset({wanted[2]})))
    while seq.status is not Status.FINISHED:
        world.step()
    assert seq.output_token_ids == wanted[: wanted.index(wanted[2]) + 1]
    assert world.core.has_work, "the step behind the end is in flight"
    assert world.scheduler.pool.counts()["pending"] > 0
    world.run()
    assert world.runner.computed_tokens == 8 + len(seq.output_token_ids)
    assert world.scheduler.stats.generated_tokens == len(seq.output_token_ids)
    assert world.scheduler.pool.counts()["pending"] == 0


def test_the_context_length_is_not_passed() -> None:
    world = World(overlap=True, num_blocks=4)
    (seq,) = world.add(make_request("a", range(10, 20), SamplingParams(max_tokens=None, temperature=0)))
    world.run()
    assert seq.num_tokens == 16
    assert world.runner.computed_tokens == 15


def test_results_from_before_a_preemption_are_dropped() -> None:
    world = World(overlap=True)
    (seq,) = world.add(make_request("a", range(10, 18), greedy(6)))
    world.step()
    world.step()
    assert (seq.num_output_tokens, seq.num_in_flight, seq.epoch) == (1, 1, 0)
    world.scheduler._preempt(seq)
    assert (seq.num_output_tokens, seq.num_in_flight, seq.epoch) == (1, 0, 1)
    batch = world.scheduler.schedule()  # it runs again before the old step is taken in
    assert batch is not None
    assert batch.sequences[0].epoch == 1
    launched_again = world.runner.launch(batch)
    world.core._take_in()
    assert seq.num_output_tokens == 1
    world.scheduler.update(batch, launched_again.wait())
    assert seq.num_output_tokens == 2
    world.run()
    assert seq.output_token_ids == expected_tokens(seq.request, 6)


def test_slots_come_back() -> None:
    world = World(overlap=True, max_num_seqs=2)
    seqs = [world.add(make_request(str(i), range(10 + i, 16 + i), greedy(2 + i)))[0] for i in range(5)]
    seen = set()
    while world.core.has_work:
        world.step()
        seen |= {s.slot for s in world.scheduler.running}
    assert seen == {0, 1}
    assert {s.slot for s in seqs} == {-1}


def test_an_abort_keeps_blocks_and_rows_until_the_last_step_that_reads_them() -> None:
    world = World(overlap=True, encoder_rows=8, max_tokens=6, reuse=False)
    (seq,) = world.add(make_request("a", [10, feature("x", 8), 11, 12]))
    world.step()
    world.step()  # the second chunk reads the item in the step that is in flight now
    assert seq.num_completed_tokens == 6
    world.core.handle(Abort("a"))
    world.add(make_request("b", [10, feature("y", 8), 11]))
    cache, pool = world.scheduler.encoder_cache, world.scheduler.pool
    assert cache.room == 0
    assert pool.counts()["pending"] == 3
    world.step()
    assert world.runner.encoded == [b"x"], "there was no room beside what is being read"
    world.run()
    assert world.runner.encoded == [b"x", b"y"]
    assert world.sequences[1].output_token_ids == expected_tokens(world.sequences[1].request, 4)


def test_clear_cache_reaches_blocks_that_a_step_in_flight_still_holds() -> None:
    prompt = list(range(10, 30))
    wanted = expected_tokens(make_request("x", prompt), 2)
    world = World(overlap=True, max_tokens=32)
    world.add(make_request("a", prompt, greedy(9), stop_token_ids=frozenset(wanted)))
    while not world.scheduler.pool.num_pending:
        world.step()
    world.core.handle(ClearCache())
    world.run()
    (again,) = world.add(make_request("b", prompt))
    world.run()
    assert again.num_cached_tokens == 0


def test_a_waiter_starts_with_the_first_step_after_the_block_it_waits_for() -> None:
    world = World(overlap=True, max_tokens=32)
    batches = launched(world)
    prompt = list(range(10, 30))
    world.add(make_request("a", prompt, greedy(8)))
    (second,) = world.add(make_request("b", prompt, greedy(8)))
    world.step()
    world.step()  # launches the first one's decode, then takes in its prompt
    assert second.status is Status.WAITING
    world.step()
    assert second.status is Status.RUNNING
    assert [len(b.sequences) for b in batches] == [1, 1, 2]
    assert (batches[2].sequences[1].start, batches[2].num_decodes) == (16, 1)


# -- faults ----------------------------------------------------------------------------------------


def faulty_at(world: World, which: int, faults: Faults) -> None:
    """The step with this number goes wrong, once."""
    done = []

    def odd(batch: ScheduledBatch) -> Faults:
        if batch.step == which and not done:
            done.append(batch)
            return faults
        return Faults()

    world.runner.faults = odd


def two(world: World, tokens: int = 6) -> None:
    for name in "ab":
        world.add(make_request(name, [ord(name), *range(10, 16)], greedy(tokens)))


def check_two(world: World, failed: str = "") -> None:
    world.run()
    assert set(world.errors) == set(failed)
    for seq in world.sequences:
        wanted = expected_tokens(seq.request, 6)
        kept = seq.num_output_tokens if seq.request.request_id in failed else 6
        assert seq.output_token_ids == wanted[:kept]
    assert world.scheduler.pool.counts()["in_use"] == 0


@pytest.mark.parametrize("step", [1, 3])
def test_a_step_that_cannot_be_launched_is_run_one_by_one(step: int) -> None:
    world = World(overlap=True)
    two(world)
    faulty_at(world, step, Faults(dies=RuntimeError("once")))
    check_two(world)


def test_an_answer_that_ended_meanwhile_is_not_run_again() -> None:
    wanted = expected_tokens(make_request("x", [*range(10, 16)]), 3)
    world = World(overlap=True)
    (seq,) = world.add(make_request("a", range(10, 16), greedy(9), stop_token_ids=frozenset(wanted[1:2])))
    two(world)
    faulty_at(world, 3, Faults(dies=RuntimeError("once")))
    world.run()
    assert not world.errors
    assert seq.output_token_ids == wanted[:2]


def test_a_step_that_fails_on_the_device_costs_its_own_sequences_only() -> None:
    world = World(overlap=True, max_tokens=7)
    two(world)  # "b" joins in the second step, which is in flight by then
    faulty_at(world, 1, Faults(lost=ValueError("what a reader of results may raise")))
    check_two(world, failed="a")


def test_bad_logits_are_noticed_a_step_late() -> None:
    world = World(overlap=True)
    two(world)
    faulty_at(world, 2, Faults(nan=frozenset({1})))
    check_two(world, failed="a")
    assert isinstance(world.errors["a"], EngineError)
    assert world.sequences[0].num_output_tokens == 1


@pytest.mark.parametrize("when", ["dies", "lost"])
@pytest.mark.parametrize("kind", [torch.AcceleratorError, RuntimeError])
def test_a_lost_device_stops_the_engine(when: str, kind: type[Exception]) -> None:
    world = World(overlap=True)
    two(world)
    error = kind("CUDA error: an illegal memory access was encountered")
    faulty_at(world, 2, Faults(**{when: error}))
    with pytest.raises(kind, match="illegal"):
        world.run()
    assert not world.errors, "nobody was blamed"


def test_lack_of_memory_is_not_a_lost_device() -> None:
    world = World(overlap=True)
    two(world)
    faulty_at(world, 2, Faults(dies=RuntimeError("CUDA error: out of memory")))
    check_two(world)


def test_a_failure_known_at_launch_is_taken_in_at_once() -> None:
    world = World(overlap=True)
    world.add(make_request("a", [10, feature("x", 4), 11]))
    faulty_at(world, 1, Faults(media=frozenset({b"x"})))
    world.step()
    assert set(world.errors) == {"a"}
    assert not world.core.has_work


def test_who_reads_an_item_that_turns_out_spoilt_computes_it_again() -> None:
    """The second request reads the item in the step launched before the failure was known."""
    world = World(overlap=True, max_tokens=12, reuse=False)
    world.add(make_request("a", [10, feature("x", 4), 11, 12, 13, 14, 15], greedy(3)))
    (second,) = world.add(make_request("b", [20, 21, 22, feature("x", 4), 23], greedy(3)))
    faulty_at(world, 1, Faults(media=frozenset({b"x"}), late=True))
    world.step()
    world.step()
    assert set(world.errors) == {"a"}
    assert second.epoch == 1
    world.run()
    assert second.output_token_ids == expected_tokens(second.request, 3)
    assert world.runner.encoded == [b"x", b"x"]


# -- cost ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_the_measure_of_the_loops_cost_counts_what_it_says(overlap: bool) -> None:
    assert decode_cost(3, 20, overlap=overlap, waiting=2) > 0
    run = whole_run(12, 5, overlap=overlap)
    assert run["seconds"] > 0
    assert run["steps"] == 5 + overlap  # all prompts fit one step; the last answer is taken in by a step of its own


def test_finishing_from_outside_is_idempotent() -> None:
    world = World(overlap=True)
    (seq,) = world.add(make_request("a", range(10, 20)))
    world.step()
    for _ in range(2):
        world.scheduler.finish(seq, FinishReason.ABORT)
    world.run()
    assert world.scheduler.stats.finished == {"abort": 1}
