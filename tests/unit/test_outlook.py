"""Outlook: who is admitted beside whom, by what all will want of the cache."""

from __future__ import annotations

from support.fake_model import World
from support.fake_requests import feature, make_request

from mm_core.config import SamplingParams
from mm_core.scheduler.outlook import Future
from mm_core.scheduler.sequence import Status


def greedy(n: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=n)


def test_answers_that_end_together_peak_together() -> None:
    future = Future()
    for _ in range(4):
        future.add(8, 2, 3)
    assert future.peak() == 8 + 3
    assert future.peak(8, 2, 3) == 10 + 4 + 3


def test_answers_that_ended_before_have_given_back() -> None:
    """One is about to end and holds 6 blocks; the others go on for long."""
    future = Future()
    future.add(1, 1, 6)
    assert future.peak() == 1
    future.add(4, 1, 1)
    assert future.peak() == 2
    future.add(40, 10, 1)
    # At its own end it has grown by 10, and the 6 + 1 that the others hold now are back.
    assert future.peak() == 3
    assert future.peak(40, 10, 2) == 20 + 1 - 7 + 2
    # One that ends a step after another cannot count on its blocks.
    assert future.peak(2, 3, 1) == 9 + 2 + 1


def test_nobody_is_admitted_to_be_preempted() -> None:
    """Four answers of 24 tokens, of which one fits at a time, and the next when the first is nearly done."""
    world = World(num_blocks=12, max_tokens=32, expected=128.0)
    for i in range(4):
        world.add(make_request(str(i), range(10 + i, 18 + i), greedy(24)))
    world.run()
    assert world.scheduler.stats.preemptions == 0
    assert world.scheduler.stats.steps < 4 * 24
    assert all(s.num_output_tokens == 24 for s in world.sequences)


def test_the_mean_of_answers_is_learnt() -> None:
    world = World(expected=128.0)
    for i in range(40):
        world.add(make_request(str(i), [10 + i], greedy(4)))
    world.run()
    assert 4 < world.scheduler.outlook.expected < 128 * 0.5


def test_who_waits_for_the_encoder_starts_before_one_that_waits_for_room() -> None:
    """One finds the step's encoder budget spent, and the next no room: that is no reason to stop looking."""
    world = World(num_blocks=40, max_tokens=64, encoder_budget=16, expected=60.0)
    world.add(make_request("x", [feature("x", 4)], greedy(60)))
    (short,) = world.add(make_request("a", [feature("a", 4)], greedy(4)))
    (long,) = world.add(make_request("b", range(8, 50), greedy(100)))
    world.step()
    assert short.status is long.status is Status.WAITING
    world.step()
    assert short.status is Status.RUNNING
    assert long.status is Status.WAITING
    world.run()
