"""Policies: who starts first, and what it costs. What leaves a cache first: test_retention.py."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from support.fake_model import Tiers, World
from support.fake_requests import expected_tokens, feature, make_request

from mm_core.hashing import get_hasher
from mm_core.scheduler.costs import ENCODER_UNIT_TOKENS, CostModel
from mm_core.scheduler.policy import (
    AGEING_TOKENS_PER_STEP,
    GROUP_TOKENS,
    POLICIES,
    RESTORABLE_SHARE,
    Candidate,
)
from mm_core.scheduler.sequence import Sequence

ORDER = POLICIES["reuse"].order

# -- who starts first ---------------------------------------------------------------------------------------------


def arrivals(candidates: list[Candidate]) -> list[int]:
    return [candidates[i].arrival for i in ORDER(candidates)]


def test_most_cached_tokens_first_and_ageing() -> None:
    fresh, hit, old = Candidate(0, 0, 0), Candidate(1, 64, 0), Candidate(2, 0, 5)
    assert arrivals([fresh, hit, old]) == [2, 1, 0]
    assert arrivals([fresh, Candidate(1, 0, 0)]) == [0, 1]


def test_restorable_tokens_count_less_than_cached_ones() -> None:
    cached, restorable = Candidate(0, 100, 0), Candidate(1, 0, 0, restorable_tokens=300)
    assert 0.3 < RESTORABLE_SHARE < 1
    assert arrivals([cached, restorable]) == [1, 0]
    assert arrivals([cached, restorable._replace(restorable_tokens=100)]) == [0, 1]
    assert arrivals([Candidate(0, 0, 0), restorable]) == [1, 0]


def test_a_group_stands_behind_its_first_and_the_larger_one_before_its_equals() -> None:
    alone = [Candidate(0, 0, 0, b"x"), Candidate(5, 0, 0)]
    pair = [Candidate(1, 0, 0, b"p"), Candidate(4, 0, 0, b"p")]
    three = [Candidate(2, 0, 0, b"t"), Candidate(3, 0, 0, b"t"), Candidate(6, 0, 0, b"t")]
    assert arrivals([*alone, *pair, *three]) == [2, 3, 6, 1, 4, 0, 5]
    first = Candidate(9, 50, 0, b"p")  # the best of all: the others of its group follow it at once
    assert arrivals([*alone, *pair, *three, first]) == [9, 1, 4, 2, 3, 6, 0, 5]


def test_a_group_does_not_carry_those_far_behind_its_first() -> None:
    first, other, late = Candidate(0, GROUP_TOKENS + 1, 0, b"g"), Candidate(1, 16, 0), Candidate(2, 0, 0, b"g")
    assert arrivals([first, other, late]) == [0, 1, 2]
    assert arrivals([first._replace(cached_tokens=GROUP_TOKENS), other, late]) == [0, 2, 1]


CANDIDATES = st.lists(
    st.builds(
        Candidate, st.integers(0, 99), st.integers(0, 5000), st.integers(0, 300), st.sampled_from([b"", b"a", b"b"]),
        st.integers(0, 3000),
    ),
    max_size=30,
)  # fmt: skip


@given(CANDIDATES)
@pytest.mark.parametrize("name", POLICIES)
def test_an_order_names_everybody_once(name: str, candidates: list[Candidate]) -> None:
    assert sorted(POLICIES[name].order(candidates)) == list(range(len(candidates)))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(0, 5000), st.integers(1, 6))
def test_nobody_is_overtaken_for_ever(seed: int, rate: int, most: int, groups: int) -> None:
    """Whoever starts arrived at most so many steps after anybody who still waits, whatever is cached meanwhile."""
    dice = random.Random(seed)
    bound = (most + RESTORABLE_SHARE * most + GROUP_TOKENS) / AGEING_TOKENS_PER_STEP
    queue: list[tuple[int, int, bytes]] = []  # arrival, step of arrival, group
    arrival = 0
    for step in range(400):
        for _ in range(dice.randint(0, rate)):
            queue.append((arrival, step, dice.choice([b"", *(bytes([g]) for g in range(groups))])))
            arrival += 1
        if not queue:
            continue
        candidates = [
            # Those that came last find the most, as an adversary would have it.
            Candidate(number, most if step - came < 8 else 0, step - came, group, dice.choice([0, most]))
            for number, came, group in queue
        ]
        started = queue.pop(ORDER(candidates)[0])
        assert started[1] <= min((came for _, came, _ in queue), default=started[1]) + bound + 1


def test_waiting_sequences_are_grouped_by_media_and_by_prefix() -> None:
    world = World(max_num_seqs=3, encoder_rows=30, max_tokens=64)
    cat, dog = feature("cat", 8), feature("dog", 8)
    prompts = [[10, dog, 11], [20, cat, 21], list(range(30, 45)), [22, cat, 23], [24, 25, cat], list(range(30, 44))]
    for number, prompt in enumerate(prompts):
        world.add(make_request(str(number), prompt))
    started: list[str] = []
    while world.core.has_work:
        world.step()
        started += [s.request.request_id for s in world.scheduler.running if s.request.request_id not in started]
    assert started == ["1", "3", "4", "2", "0", "5"]  # 5 waits for what 2 computes, and 0 need not wait with it
    assert world.runner.encoded == [b"cat", b"dog"]


def test_first_come_first_served() -> None:
    world = World(policy="fcfs", max_num_seqs=1)
    for number, prompt in enumerate([range(10, 22), range(30, 42), range(10, 22), range(30, 42)]):
        world.add(make_request(str(number), prompt))
    started: list[str] = []
    while world.core.has_work:
        world.step()
        started += [s.request.request_id for s in world.scheduler.running if s.request.request_id not in started]
    assert started == ["0", "1", "2", "3"]


# -- what blocks cost ---------------------------------------------------------------------------------------------


def test_blocks_share_their_items_cost() -> None:
    x, y = feature("x", 10, cost=100), feature("y", 3, cost=30)
    seq = Sequence(0, make_request("r", [10, x, 11, y, 12, x, 13, 14, 15, 16]))
    seq.media_costs = {b"x": 100, b"y": 30}
    contents = seq.fill_contents(len(seq.token_ids) // 4, 4, get_hasher("xxh3_128"))
    assert sum(c.encoder_cost for c in contents) == pytest.approx(230)
    assert contents[0].encoder_cost == pytest.approx(30)  # three of x's ten rows
    assert [c.touches for c in contents[:4]] == [1, 1, 1, 1]
    assert [tag.key for tag in contents[4].media] == [b"x", b"y", b"x"]
    assert contents[-1].media is contents[-2].media, "shared by all behind the last item"
    assert all(c.parent == before.key for before, c in pairwise(contents))
    assert {c.layout for c in contents} == {seq.layout}
    at_once = [c._replace(layout=None) for c in contents]
    again = Sequence(0, seq.request)
    again.media_costs = seq.media_costs
    for count in range(1, len(contents) + 1):  # one by one, as an answer grows
        again.fill_contents(count, 4, get_hasher("xxh3_128"))
    assert [c._replace(layout=None) for c in again.contents] == at_once


def test_costs_are_what_steps_take_whatever_the_first_ones_took() -> None:
    dice = random.Random(1)
    costs = CostModel()
    for number in range(100):
        tokens, units = dice.choice([(8192, 0), (2000, 8000), (512, 4096), (0, 20000)])
        decodes = dice.choice([0, 100])
        seconds = tokens * 3e-5 + units * 1e-5 + (0.015 if decodes else 0.0)
        seconds = seconds * dice.uniform(0.9, 1.1) + (4.0 if number < 3 else 0.0)
        costs = costs.observe_step(tokens, units, seconds * (30 if number % 17 == 0 else 1), decodes)
        costs = costs.observe_step(0, 0, 0.015 * dice.uniform(0.9, 1.1), 100)
    assert costs.token_seconds == pytest.approx(3e-5, rel=0.25)
    assert costs.encoder_seconds == pytest.approx(1e-5, rel=0.25)
    assert costs.restore_seconds == pytest.approx(0.015, rel=0.1)
    assert costs.recompute(1000, 4000) == pytest.approx(0.07, rel=0.2)
    assert costs.weight(16, 64) == pytest.approx(16 + 64 / 3, rel=0.4)


def test_steps_of_one_mixture_tell_what_both_take_together() -> None:
    costs = CostModel()
    for tokens in (4096, 8192, 1024, 2048) * 10:
        costs = costs.observe_step(tokens, 4 * tokens, tokens * 7e-5)
    assert costs.recompute(1000, 4000) == pytest.approx(0.07, rel=0.02)
    assert costs.encoder_seconds / costs.token_seconds == pytest.approx(ENCODER_UNIT_TOKENS, rel=0.1)


def test_before_anything_is_measured() -> None:
    costs = CostModel()
    assert (costs.recompute(100, 100), costs.restore(10**6)) == (0.0, 0.0)
    assert costs.weight(16, 64) == 16 + 64 * ENCODER_UNIT_TOKENS
    assert costs.observe_step(8, 0, 0.01) == costs, "few tokens tell nothing of many"
    assert costs.observe_restore(0, 1.0) == costs


OBSERVATIONS = st.lists(
    st.tuples(
        st.sampled_from(["step", "restore"]), st.integers(0, 10**5), st.integers(0, 10**6),
        st.floats(allow_nan=True, allow_infinity=True), st.integers(0, 300),
    ),
    max_size=60,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(OBSERVATIONS)
def test_no_observation_makes_a_cost_negative_or_absurd(observations: list[tuple[Any, ...]]) -> None:
    costs = CostModel()
    for kind, tokens, units, seconds, decodes in observations:
        if kind == "step":
            costs = costs.observe_step(tokens, units, seconds, decodes)
        else:
            costs = costs.observe_restore(tokens, seconds)
        assert 0.0 <= costs.token_seconds < float("inf")
        assert 0.0 <= costs.encoder_seconds < float("inf")
        assert 0.0 <= costs.restore(10**6) < float("inf")
        ratio = costs.weight(0, 1)
        assert ENCODER_UNIT_TOKENS / 101 <= ratio <= ENCODER_UNIT_TOKENS * 101


# -- whole lives --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_tokens_are_the_same_whatever_the_policy(policy: str) -> None:
    dice = random.Random(3)
    world = World(policy=policy, num_blocks=20, copy_tokens=2, encoder_rows=24)
    for number in range(60):
        item = feature(dice.choice("abcde"), 6)
        tail = [dice.randint(10, 12) for _ in range(dice.randint(1, 6))]
        world.add(make_request(str(number), [10, 11, item, *tail]))
        for _ in range(dice.randint(0, 3)):
            world.step()
    world.run()
    assert world.scheduler.pool.evictions > 0
    for seq in world.sequences:
        assert seq.output_token_ids == expected_tokens(seq.request, 4)


def test_what_could_be_copied_back_is_seen_by_the_policy() -> None:
    world = World(tiers=Tiers(slots=40), num_blocks=12, max_num_seqs=1, max_tokens=64)
    for number in range(4):  # each leaves for the next
        world.add(make_request(str(number), range(10 + 30 * number, 34 + 30 * number)))
        world.run()
    first, running = [*range(10, 34), 9], range(200, 220)
    world.add(make_request("running", running))
    world.step()
    (known,) = world.add(make_request("known", first))
    (unknown,) = world.add(make_request("unknown", range(300, 325)))
    found = world.scheduler._measure([known, unknown], world.scheduler.stats.steps)
    device = found[0].cached_tokens
    assert 0 < found[0].restorable_tokens == 24 - device
    assert found[1].restorable_tokens == 0
    world.run()
    assert world.scheduler.tiers is not None
    assert world.scheduler.tiers.stats.restored_tokens > 0
    assert known.num_cached_tokens == 24
