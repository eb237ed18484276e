"""`engine.cache`: lookups, counters, events, wrong arguments, and all of it awaited."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.cached import BLOCK, FEATURE, ROWS, SMALL, TEXT, answer, check, flood, shot, start, turn, work
from support.e2e import GREEDY, ask, check_message, settle
from support.pictures import picture

from mm_core import AsyncEngine, Engine, KvCacheConfig, TextPrompt
from mm_core.errors import (
    EngineClosedError,
    InvalidParamsError,
    InvalidPromptError,
    MediaNotCachedError,
    MMError,
    UnsupportedMediaError,
)
from mm_core.inputs import ChatPrompt
from mm_core.types import CacheEvent


@pytest.fixture
def fresh(tiny_path: Path) -> Iterator[Engine]:
    with start(tiny_path) as engine:
        yield engine
        check(engine)


# -- lookup ----------------------------------------------------------------------------------------


def test_a_lookup_tells_what_a_request_then_finds(fresh: Engine) -> None:
    prompts: list[Any] = [TEXT, turn(shot(1), "a"), turn(shot(1), "a", text=TEXT), ask(shot(1)), ask(shot(2))]
    for _ in range(2):
        for prompt in prompts:
            with work(fresh) as done:
                found = fresh.cache.lookup(prompt)
            assert (done.encoded, done.steps, done.prepared, done.cached) == (0, 0, 0, 0)
            output = answer(fresh, prompt)
            assert found.prompt_tokens == output.usage.prompt_tokens
            assert found.device_tokens == found.cached_tokens
            assert output.usage.cached_tokens == found.device_tokens
            media = 0 if prompt is TEXT else 1
            encoded = output.usage.encoded_media_tokens
            assert (found.media, found.encoded_media) == (media, int(media and not encoded))


def test_a_lookup_leaves_no_trace(tiny_path: Path) -> None:
    """Room for two features: the one looked up is as old as before, the new one does not come in."""
    with start(tiny_path, processor_cache_size=int(2.5 * FEATURE)) as engine:
        for uuid, seed in (("old", 1), ("young", 2)):
            answer(engine, turn(shot(seed), uuid))
        before = engine.cache.stats()
        for _ in range(3):
            engine.cache.lookup(turn(uuid="old"))
            engine.cache.lookup(turn(shot(1), "old"))
            assert engine.cache.lookup(turn(shot(3), "young")).encoded_media == 0
            engine.cache.lookup(turn(shot(3), "new"))
        assert engine.cache.stats() == before
        with pytest.raises(MediaNotCachedError):
            engine.cache.lookup(turn(uuid="new"))
        answer(engine, turn(shot(4), "next"))
        with pytest.raises(MediaNotCachedError):
            answer(engine, turn(uuid="old"))
        with work(engine) as done:
            answer(engine, turn(uuid="young"))
        assert done.encoded == 0, "the name still means what it was given for"
        check(engine)


# -- stats -----------------------------------------------------------------------------------------


def test_stats_count_tokens_rows_and_items_by_level(tiny_path: Path) -> None:
    with start(tiny_path, **SMALL) as engine:
        outputs = [answer(engine, turn(shot(seed), f"u{seed}")) for seed in (1, 1, 2, 3, 4, 5, 6, 7, 8, 1)]
        stats = engine.cache.stats()
        usage = [o.usage for o in outputs]
        device = stats.device
        assert (device.unit, device.capacity) == ("tokens", 40 * BLOCK)
        assert device.queries == sum(u.prompt_tokens for u in usage)
        assert device.hits == sum(u.cached_tokens for u in usage) > 0
        assert device.stored_tokens == device.stored * BLOCK
        assert device.stored - device.entries == device.evicted > 0
        assert 0 < device.used <= device.capacity
        assert device.hit_rate == device.hits / device.queries
        encoder = stats.encoder
        assert (encoder.unit, encoder.capacity) == ("rows", 4 * ROWS)
        assert encoder.queries == encoder.hits + encoder.stored_tokens
        assert encoder.stored_tokens == sum(u.encoded_media_tokens for u in usage)
        assert encoder.stored - encoder.entries == encoder.evicted > 0
        processor = stats.processor
        assert (processor.unit, processor.queries) == ("items", 10)
        assert processor.hits + processor.stored == 10
        assert processor.stored - processor.entries == processor.evicted > 0
        assert processor.used <= processor.capacity == SMALL["processor_cache_size"]
        assert (stats.host.capacity, stats.disk.capacity, stats.host.hit_rate) == (0, 0, 0.0)


# -- events ----------------------------------------------------------------------------------------


def replay(events: list[CacheEvent]) -> dict[str, set[bytes]]:
    """What can be found on the device, if these events are all there is."""
    found: dict[str, set[bytes]] = {"kv": set(), "encoder": set()}
    for event in events:
        if event.level == "device" and event.kind == "evicted":
            found[event.cache].remove(event.key)
        elif event.level == "device":
            assert event.key not in found[event.cache]
            found[event.cache].add(event.key)
    return found


def drain(stream: Any, until: Callable[[], bool]) -> list[CacheEvent]:
    """What came by now: a reply of the engine comes behind the events before it."""
    assert until()
    events = []
    while (event := stream._feed.poll()[0]) is not None:
        events.append(event)
    return events


def test_replayed_events_are_what_lookups_find(tiny_path: Path) -> None:
    """A router that rebuilds the tree from events finds the same prefixes as the engine."""
    with start(tiny_path, **SMALL) as engine:
        answer(engine, turn(shot(1), "early"))
        events: list[CacheEvent] = []
        with engine.cache.events() as stream:
            for round_ in range(6):
                flood(engine, 10 * round_, 3)
                answer(engine, turn(shot(1), "early"))
                if round_ == 2:
                    engine.cache.pin("early")
                if round_ == 3:
                    engine.cache.evict("early")
                if round_ == 4:
                    engine.clear_cache()
                settle(engine)
                events += drain(stream, lambda: bool(engine.cache.stats()))
                core = engine._frontend._core.scheduler
                found = replay(events)
                assert found["kv"] == {content.key for _, content in core.prefix.contents()}
                assert found["encoder"] == {*core.encoder_cache.keys()}
                tree = {e.key: e for e in events if e.cache == "kv"}
                for seed in (1, 10 * round_, 10 * round_ + 2):
                    prompt = turn(shot(seed), "early") if seed == 1 else turn(shot(seed), text=f"Number {seed}?")
                    request = engine._frontend.pipeline.submit("r", prompt, GREEDY, peek=True).result()
                    run = 0
                    for key in request.block_keys[: (len(request.token_ids) - 1) // BLOCK]:
                        if key not in found["kv"]:
                            break
                        start_ = run * BLOCK
                        assert tree[key].token_ids == request.token_ids[start_ : start_ + BLOCK]
                        run += 1
                    assert engine.cache.lookup(prompt).device_tokens // BLOCK == run
            assert stream.lost == 0
        named = [e for e in events if e.uuids]
        assert named
        assert {uuid for e in named for uuid in e.uuids} == {"early"}
        assert list(stream) == []


def test_events_hold_no_salt(fresh: Engine) -> None:
    stream = fresh.cache.events()
    fresh.chat([ChatPrompt(turn(shot(1), "a"), cache_salt="secret-salt")], GREEDY)
    fresh.cache.evict(salt="secret-salt")
    stream.close()
    events = list(stream)
    assert {e.kind for e in events} == {"stored", "evicted"}
    assert "secret-salt" not in repr(events)


def test_a_slow_reader_loses_the_oldest_and_is_told_how_many(fresh: Engine) -> None:
    answer(fresh, TEXT)
    with fresh.cache.events(max_waiting=3) as slow, fresh.cache.events() as quick:
        answer(fresh, turn(shot(1), "a"))
        assert fresh.cache.stats()
    every, some = list(quick), list(slow)
    assert quick.lost == 0
    assert len(some) < len(every)
    assert slow.lost == len(every) - len(some)
    assert some == every[-len(some) :]


def test_listeners_are_called_until_they_unsubscribe(fresh: Engine, caplog: pytest.LogCaptureFixture) -> None:
    answer(fresh, TEXT)
    told: list[CacheEvent] = []

    def fails(event: CacheEvent) -> None:
        raise ValueError("mine")

    leave, leave_too = fresh.cache.subscribe(told.append), fresh.cache.subscribe(fails)
    answer(fresh, turn(shot(1), "a"))
    leave()
    leave_too()
    count = len(told)
    assert {e.kind for e in told} == {"stored"}
    assert replay(told)["kv"] == {c.key for _, c in fresh._frontend._core.scheduler.prefix.contents()}
    answer(fresh, turn(shot(2), "b"))
    assert len(told) == count
    assert "a listener of cache events failed" in caplog.text
    core = fresh._frontend._core
    assert not core.keeper.log.on
    assert core.keeper.log not in core.scheduler.prefix.observers
    leave()  # once more is no harm


def test_an_engine_that_nobody_asks_keeps_no_index(fresh: Engine) -> None:
    answer(fresh, turn(shot(1), "a"))
    fresh.cache.warm(TEXT)
    fresh.cache.lookup(TEXT)
    fresh.cache.stats()
    core = fresh._frontend._core
    assert core.scheduler.prefix.observers == []
    assert core.keeper._pins is None


# -- wrong arguments -------------------------------------------------------------------------------

ODD: list[Any] = ["", "x" * 129, "../etc", "a\0b", "a b", "ümlaut", "\ud800", 5, b"bytes", ["nested"], True]


@pytest.mark.parametrize("odd", ODD, ids=ascii)
def test_odd_names_and_salts_are_refused_everywhere(engine: Engine, odd: Any) -> None:
    cache = engine.cache
    calls: list[Callable[[], Any]] = [
        lambda: cache.pin(odd),
        lambda: cache.pin("a", odd),
        lambda: cache.unpin(odd),
        lambda: cache.unpin("a", odd),
        lambda: cache.evict(odd),
        lambda: cache.evict("a", cache_salt=odd),
        lambda: cache.evict(salt=odd),
        lambda: cache.warm(picture(1), odd),
        lambda: cache.warm(picture(1), cache_salt=odd),
        lambda: cache.warm(TEXT, cache_salt=odd),
        lambda: cache.lookup(TextPrompt(prompt=TEXT, cache_salt=odd)),
        lambda: cache.lookup(ask(picture(1), uuid=odd)),
    ]
    for call in calls:
        with pytest.raises((InvalidParamsError, InvalidPromptError), match="1 to 128") as caught:
            call()
        check_message(caught.value)
    settle(engine)


def test_calls_that_do_not_say_what_they_mean(engine: Engine) -> None:
    cache = engine.cache
    wrong: list[tuple[Callable[[], Any], type[MMError], str]] = [
        (lambda: cache.evict(), InvalidParamsError, "clear"),
        (lambda: cache.evict("a", salt="s"), InvalidParamsError, "takes a uuid"),
        (lambda: cache.evict(cache_salt="s"), InvalidParamsError, "salt="),
        (lambda: cache.warm(picture(1), pin=True), InvalidParamsError, "uuid"),
        (lambda: cache.warm([]), InvalidParamsError, "not empty"),
        (lambda: cache.warm([picture(1)], ["a", "b"]), InvalidParamsError, "as many"),
        (lambda: cache.warm([picture(1)], "a"), InvalidParamsError, "as many"),
        (lambda: cache.warm(ask(picture(1), uuid="a"), "b"), InvalidPromptError, "Name the items"),
        (lambda: cache.warm(TextPrompt(prompt=TEXT), "b"), InvalidPromptError, "Name the items"),
        (lambda: cache.warm(b"what is this"), UnsupportedMediaError, "modality="),
        (lambda: cache.warm(object()), UnsupportedMediaError, "modality="),
        (lambda: cache.warm(picture(1), modality="audio"), UnsupportedMediaError, "audio"),
        (lambda: cache.warm(Path("/nowhere/at/all.png")), UnsupportedMediaError, "path"),
        (lambda: cache.warm(TextPrompt(prompt="a", cache_salt="x"), cache_salt="y"), InvalidParamsError, "own"),
        (lambda: cache.warm(None, "never", modality="image"), MediaNotCachedError, "with the content"),
        (lambda: cache.warm(""), InvalidPromptError, "empty"),
    ]
    for call, kind, text in wrong:
        with pytest.raises(kind, match=text) as caught:
            call()
        check_message(caught.value)
    settle(engine)


def test_a_closed_engine_answers_nothing(tiny_path: Path) -> None:
    engine = start(tiny_path)
    stream = engine.cache.events()
    engine.cache.warm(TEXT)
    engine.close()
    assert {e.kind for e in stream} == {"stored"}
    for call in (
        lambda: engine.cache.warm(TEXT),
        lambda: engine.cache.lookup(TEXT),
        lambda: engine.cache.stats(),
        lambda: engine.cache.evict("a"),
        lambda: engine.cache.clear(),
        lambda: engine.cache.events(),
    ):
        with pytest.raises(EngineClosedError):
            call()
    stream.close()


# -- asyncio ---------------------------------------------------------------------------------------


def test_the_same_for_asyncio(tiny_path: Path) -> None:
    async def main() -> None:
        kv = KvCacheConfig(num_blocks=256)
        engine = await AsyncEngine.from_pretrained(tiny_path, kv_cache_config=kv, show_progress=False)
        async with engine:
            told: list[CacheEvent] = []
            leave = await engine.cache.subscribe(told.append)
            stream = await engine.cache.events()
            warmed = await engine.cache.warm([shot(1), TEXT], ["a", None])
            assert [w.media_tokens for w in warmed] == [ROWS, 0]
            assert (await engine.cache.warm(shot(1), "a", pin=True)).cached_tokens >= ROWS
            assert (await engine.cache.pin("a")).encoder_rows == ROWS
            found = await engine.cache.lookup(turn(uuid="a"))
            output = await engine.chat(turn(uuid="a"), GREEDY)
            assert output.usage.cached_tokens >= found.device_tokens >= ROWS
            assert (await engine.cache.stats()).encoder.pinned == ROWS
            await engine.cache.unpin("a")
            assert (await engine.cache.evict("a")).encoder_items == 1
            with pytest.raises(MediaNotCachedError):
                await engine.cache.lookup(turn(uuid="a"))
            with pytest.raises(MediaNotCachedError):
                await engine.cache.pin("a")
            assert (await engine.cache.clear()).kv_blocks > 0
            await asyncio.to_thread(leave)
            await stream.aclose()
            events = [event async for event in stream]
            assert events == told
            assert replay(events) == {"kv": set(), "encoder": set()}
            check(engine)  # type: ignore[arg-type]

    asyncio.run(main())


def test_a_cancelled_warming_leaves_nothing_running(tiny_path: Path) -> None:
    async def main() -> None:
        kv = KvCacheConfig(num_blocks=512)
        options: dict[str, Any] = {"max_num_batched_tokens": 64, "max_num_seqs": 4}
        engine = await AsyncEngine.from_pretrained(tiny_path, kv_cache_config=kv, show_progress=False, **options)
        async with engine:
            prompts = [TextPrompt(prompt_token_ids=list(range(n, n + 300))) for n in range(40)]
            task = asyncio.ensure_future(engine.cache.warm(prompts))
            while not engine._frontend.num_live:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            end = time.monotonic() + 10
            while engine._frontend.num_live and time.monotonic() < end:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(settle, engine)

    asyncio.run(main())
