"""Partial-block reuse: the first diverging block of a prompt begins with copied tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from support.e2e import ask, settle
from support.fake_model import Tiers, World, random_faults
from support.fake_requests import expected_tokens, feature, make_request
from support.lives import check_empty
from support.pictures import picture
from support.tiny import make_tiny_qwen2vl

from mm_core import Engine, KvCacheConfig, TextPrompt
from mm_core.cache.layout import Layout, PlacedItem
from mm_core.config import SamplingParams
from mm_core.engine.messages import Abort, ClearCache
from mm_core.runner.step import LaunchedStep
from mm_core.scheduler import ScheduledBatch
from mm_core.types import PreparedRequest

LONG = list(range(10, 31))  # 21 tokens, 5 full blocks of 4


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0)


def world_of(*prompts: list[Any], **settings_: Any) -> World:
    world = World(copy_tokens=2, **{"block_size": 8, "max_tokens": 64, **settings_})
    for number, prompt in enumerate(prompts):
        world.add(make_request(str(number), prompt, greedy(3)))
        world.run()
    for seq in world.sequences:
        assert seq.output_token_ids == expected_tokens(seq.request, 3)
    return world


def test_a_prompt_that_differs_in_its_last_words_copies_what_it_has_in_common() -> None:
    world = world_of(LONG, [*LONG[:13], 40, 41, 42])
    assert world.sequences[1].num_cached_tokens == 13
    assert world.scheduler.stats.copied_tokens == 5
    assert world.runner.computed_tokens == 21 + 2 + 3 + 2


def test_the_first_block_can_be_copied_too() -> None:
    world = world_of(LONG, [*LONG[:5], *range(40, 50)])
    assert world.sequences[1].num_cached_tokens == 5


def test_the_last_token_is_computed_in_any_case() -> None:
    world = world_of(LONG, LONG[:16], LONG[:12])
    assert [s.num_cached_tokens for s in world.sequences] == [0, 15, 11]


def test_too_little_in_common_is_not_copied() -> None:
    world = world_of(LONG, [*LONG[:9], *range(40, 50)])
    assert world.sequences[1].num_cached_tokens == 8


def test_of_several_the_longest_is_copied() -> None:
    world = world_of(LONG, [*LONG[:10], *range(40, 50)], [*LONG[:14], *range(50, 60)], [*LONG[:14], *range(60, 70)])
    assert [s.num_cached_tokens for s in world.sequences] == [0, 10, 14, 14]


def test_nothing_is_copied_across_salts_contexts_and_media() -> None:
    cat, dog = feature("cat", 5), feature("dog", 5)
    world = world_of([10, 11, 12, cat, 13, 14])
    for prompt, extra, cached in (
        ([10, 11, 12, dog, 13, 14], {}, 3),
        ([10, 11, 12, cat, 13, 15], {}, 8),
        ([10, 11, 12, cat, 13, 14], {"cache_salt": "x"}, 0),
        ([10, 11, 12, cat, 13, 14], {"kv_context": b"x"}, 0),
    ):
        (seq,) = world.add(make_request("more", prompt, greedy(3), **extra))
        world.run()
        assert seq.num_cached_tokens == cached
        assert seq.output_token_ids == expected_tokens(seq.request, 3) or extra.get("kv_context")


def test_without_room_for_the_source_there_is_no_copy() -> None:
    world = world_of(LONG, num_blocks=4)
    (seq,) = world.add(make_request("b", [*LONG[:5], *range(40, 66)], greedy(1)))  # 4 blocks with its answer
    world.run()
    assert seq.num_cached_tokens == 0
    assert seq.output_token_ids == expected_tokens(seq.request, 1)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_source_stays_until_the_step_that_reads_it_is_done(overlap: bool) -> None:
    world = World(copy_tokens=2, block_size=8, num_blocks=5, overlap=overlap, max_tokens=64)
    world.add(make_request("a", LONG[:16], greedy(1)))
    world.run()
    world.add(make_request("b", [*LONG[:7], 40, 41], greedy(1)))
    batch = world.scheduler.schedule()
    assert batch is not None
    (copy,) = batch.transfers.copies
    assert copy == (world.scheduler.prefix.find(world.sequences[0].contents[0].key), copy.target, 7)
    world.scheduler.check_integrity()
    assert world.scheduler.pool.counts()["pending"] == 1
    world.scheduler.update(batch, world.runner.execute(batch))
    world.scheduler.check_integrity()
    assert world.scheduler.pool.counts()["pending"] == 0
    world.run()


def test_whoever_waits_for_a_longer_match_does_not_copy() -> None:
    world = World(copy_tokens=2, block_size=8, max_tokens=64)
    world.add(make_request("old", [*LONG[:10], *range(40, 50)], greedy(1)))
    world.run()
    world.add(make_request("first", LONG, greedy(2)))
    (second,) = world.add(make_request("second", LONG, greedy(2)))
    world.run()
    assert second.num_cached_tokens == 16  # of "first", not 10 of "old"
    assert world.scheduler.stats.deferred > 0


def positions_of(count: int, shift_from: int, shift: int, axes: int = 3) -> np.ndarray[Any, Any]:
    places = np.tile(np.arange(count, dtype=np.int32), (axes, 1))
    places[:, shift_from:] += shift
    return places


def test_other_positions_end_what_is_in_common() -> None:
    world = World(copy_tokens=1, block_size=8, max_tokens=64)
    cached = []
    for shift_from, shift in ((21, 0), (12, -2), (12, -2), (14, -2), (12, 1)):
        request = make_request("r", LONG, greedy(1), positions=positions_of(21, shift_from, shift), decode_delta=shift)
        (seq,) = world.add(request)
        world.run()
        cached.append(seq.num_cached_tokens)
        assert seq.output_token_ids == expected_tokens(request, 1)
    assert cached == [0, 12, 16, 14, 12]


def test_the_end_of_a_picture_is_copied_however_few_tokens_it_has() -> None:
    """Else the whole of it would be encoded again; texts alone are copied from `copy_tokens` on."""
    world = World(copy_tokens=6, block_size=8, max_tokens=64)
    picture = feature("a", 8)
    cached = []
    for last in (60, 70):
        (seq,) = world.add(make_request("r", [*range(10, 13), *[picture], last, *range(40, 50)], greedy(1)))
        world.run()
        cached.append(seq.num_cached_tokens)
    assert cached == [0, 11]  # the first block, and the three last rows of the picture
    assert world.scheduler.stats.encoded_rows == 8
    (seq,) = world.add(make_request("r", [*range(10, 13), *[picture], 60, 40, 99, 98], greedy(1)))
    world.run()
    assert seq.num_cached_tokens == 8 + 3 + 2


# -- the same in any order ----------------------------------------------------------------------------------------


BASE = [*range(10, 16), *[feature("a", 5)], 16, 17, 18, *[feature("b", 3)], *range(20, 40)]
PROMPTS = st.builds(
    lambda keep, tail, shift: ([*BASE[:keep], *tail], shift),
    st.integers(0, len(BASE)),
    st.lists(st.one_of(st.integers(8, 10), st.just(feature("c", 4))), min_size=1, max_size=6),
    st.sampled_from([None, None, 0, -1, 3]),
)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), PROMPTS, st.integers(1, 14), st.sampled_from([None, None, "salt"])),
        st.tuples(st.just("step"), st.integers(1, 5)),
        st.tuples(st.just("abort"), st.integers(0, 20)),
        st.tuples(st.just("clear")),
    ),
    min_size=4,
    max_size=30,
)


def near(number: int, prompt: tuple[list[Any], int | None], length: int, salt: str | None) -> PreparedRequest:
    """A prompt that begins as all others; a shift moves all positions behind its first item."""
    parts, shift = prompt
    request = make_request(str(number), parts, greedy(length), cache_salt=salt)
    if shift is None:
        return request
    count = len(request.token_ids)
    first = min((r.end for r in request.ranges), default=count)
    extra = {"positions": positions_of(count, first, shift), "decode_delta": shift if first < count else 0}
    return make_request(str(number), parts, greedy(length), cache_salt=salt, **extra)


def check_salts(world: World) -> None:
    """Have every copy's source be of the same salt as its target."""
    launch = world.runner.launch

    def checked(batch: ScheduledBatch) -> LaunchedStep:
        for source, target, _ in batch.transfers.copies:
            owner = next(s.seq for s in batch.sequences if target in s.tables["self"])
            content = world.scheduler.prefix.content(source)
            assert content is None or content.salt == owner.request.cache_salt, "copied across salts"
        return launch(batch)

    world.runner.launch = checked  # type: ignore[method-assign]


@settings(max_examples=150, deadline=None)
@given(
    actions=ACTIONS,
    overlap=st.booleans(),
    policy=st.sampled_from(["reuse", "fcfs"]),
    copy_tokens=st.integers(1, 5),
    block_size=st.sampled_from([4, 8, 16]),
    num_blocks=st.integers(14, 40),
    max_tokens=st.integers(3, 64),
    max_num_seqs=st.integers(1, 6),
    slots=st.sampled_from([0, 6]),
    faults=st.one_of(st.none(), st.integers(0, 1000)),
)
def test_random_lives_of_near_equal_prompts(
    actions: list[tuple[Any, ...]], slots: int, faults: int | None, **world_settings: Any
) -> None:
    world = World(encoder_rows=16, tiers=Tiers(slots) if slots else None, **world_settings)
    check_salts(world)
    if faults is not None:
        world.runner.faults = random_faults(faults, 0.1)
    aborted: set[str] = set()
    for name, *values in actions:
        if name == "add":
            request = near(len(world.sequences), *values)
            if len(request.token_ids) + request.params.max_tokens <= world.scheduler.sources.max_length(request):
                world.add(request)
        elif name == "step":
            for _ in range(values[0]):
                world.step()
        elif name == "clear":
            world.core.handle(ClearCache())
        elif world.sequences:
            gone = world.sequences[-1 - values[0] % len(world.sequences)].request.request_id
            world.core.handle(Abort(gone))
            aborted.add(gone)
        world.scheduler.check_integrity()
    world.run()
    for seq in world.sequences:
        wanted = expected_tokens(seq.request, seq.params.max_tokens or 0)
        ended_early = seq.request.request_id in aborted or seq.request.request_id in world.errors
        assert seq.output_token_ids == (wanted[: seq.num_output_tokens] if ended_early else wanted)
    assert faults is not None or not world.errors
    check_empty(world)


# -- what tokens are beside their ids -----------------------------------------------------------------------------


def layout(*items: tuple[str, int, int], places: np.ndarray[Any, Any] | None = None, **other: Any) -> Layout:
    placed = tuple(PlacedItem(key.encode(), offset, end) for key, offset, end in items)
    return Layout(other.get("context", b""), placed, places, other.get("prompt_len", 32), other.get("delta", 0))


@pytest.mark.parametrize(
    ("other", "until"),
    [
        (layout(("a", 4, 9), ("b", 12, 14)), 16),
        (layout(("a", 4, 9)), 12),
        (layout(("a", 4, 9), ("x", 12, 14)), 12),
        (layout(("a", 4, 9), ("b", 13, 15)), 12),
        (layout(("a", 4, 9), ("b", 12, 13)), 13),
        (layout(("a", 3, 8), ("b", 12, 14)), 8),  # begins within a, at another of its rows
        (layout(("a", 4, 9), ("b", 12, 14), ("c", 16, 20)), 16),
        (layout(("a", 4, 9), ("b", 12, 14), context=b"salt"), 8),
        (layout(("a", 4, 9), ("b", 12, 14), places=positions_of(32, 32, 0)), 16),
        (layout(("a", 4, 9), ("b", 12, 14), places=positions_of(32, 11, -1)), 11),
        (layout(("a", 4, 9), ("b", 12, 14), places=positions_of(10, 10, 0), prompt_len=10, delta=0), 16),
        (layout(("a", 4, 9), ("b", 12, 14), places=positions_of(10, 10, 0), prompt_len=10, delta=5), 10),
        (layout(("a", 4, 9), ("b", 12, 14), delta=5, prompt_len=10), 16),  # no positions: the indices, always
    ],
)
def test_same_until(other: Layout, until: int) -> None:
    own = layout(("a", 4, 9), ("b", 12, 14))
    assert own.same_until(other, 8, 16) == other.same_until(own, 8, 16) == until


def test_one_axis_out_of_three_is_enough_to_differ() -> None:
    places = positions_of(32, 32, 0)
    places[2, 13] += 1
    assert layout(places=places).same_until(layout(places=positions_of(32, 32, 0)), 8, 16) == 13


# -- with a model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_answers_are_those_of_an_engine_without_reuse(tmp_path: Path, dtype: str) -> None:
    path = make_tiny_qwen2vl(tmp_path)
    greedy_ = SamplingParams(max_tokens=6, temperature=0)
    text = [20 + index % 150 for index in range(70)]
    prompts = [TextPrompt(prompt_token_ids=[*text[:keep], 30, 31, 32]) for keep in (70, 61, 40, 12, 70)]
    fox = "The quick brown fox jumps over the lazy dog. Describe"
    prompts += [ask(picture(7, 84, 84), f"{fox} {what}.") for what in ("this image", "what is in the picture", "that")]
    prompts += [ask(picture(8, 84, 84), "Describe this image.")]
    answers = []
    for reuse in (True, False):
        kv = KvCacheConfig(num_blocks=256, enable_block_reuse=reuse, dtype=dtype)
        with Engine.from_pretrained(path, device="cpu", kv_cache_config=kv, show_progress=False) as engine:
            answers.append([engine.generate(prompt, greedy_)[0] for prompt in prompts])
            copied = engine.stats()["copied_tokens"]
            settle(engine)
        assert (copied > 40) == reuse
    assert [o.token_ids for o in answers[0]] == [o.token_ids for o in answers[1]]
    assert [o.usage.cached_tokens for o in answers[0][:5]] == [0, 61, 40, 12, 64]
    behind = [o.usage.cached_tokens for o in answers[0][6:8]]
    assert min(behind) > 16
    assert all(tokens % 16 for tokens in behind), "into the text behind the picture"
