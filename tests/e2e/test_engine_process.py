"""The engine in a process of its own: the same answers, and what happens when it dies, hangs or is full."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from support.e2e import GREEDY, IMAGE, ask, check_message, turn
from support.pictures import picture
from support.processes import LONG, open_files, pid_of, same, settle, start, wait_for

from mm_core import AsyncEngine, Engine, SamplingParams, TextPrompt
from mm_core.engine.frontend import Frontend
from mm_core.errors import (
    ConfigError,
    EngineDiedError,
    InvalidParamsError,
    InvalidPromptError,
    MediaNotCachedError,
)


@pytest.fixture(scope="module")
def away(tiny_path: Path) -> Iterator[Engine]:
    """An engine whose core is in another process."""
    before = open_files()
    with start(tiny_path) as made:
        process = psutil.Process(pid_of(made))
        yield made
        settle(made)
    assert not process.is_running()
    assert open_files() == before


def two(first: int, second: int, **more: Any) -> TextPrompt:
    images = [picture(first, 84, 56), picture(second, 56, 84)]
    return TextPrompt(prompt=turn(IMAGE + IMAGE + "What differs?"), multi_modal_data={"image": images}, **more)


# -- answers ---------------------------------------------------------------------------------------


def test_the_same_answers(engine: Engine, away: Engine) -> None:
    cases: list[tuple[Any, SamplingParams]] = [
        ("The quick brown fox", GREEDY),
        (ask(picture(1, 84, 56)), GREEDY),
        (two(2, 3), GREEDY),
        (two(2, 2), GREEDY),  # one item twice
        (TextPrompt(prompt_token_ids=list(range(40, 70)), cache_salt="a"), GREEDY),
        ("The cat", SamplingParams(n=3, temperature=1.0, seed=7, max_tokens=12)),
        (ask(picture(4, 56, 56)), SamplingParams(temperature=0.9, top_p=0.9, top_k=40, seed=2**62, max_tokens=12)),
        ("A system reads", SamplingParams(temperature=0, max_tokens=6, logprobs=3, logprob_token_ids=(5, 6))),
        ("A system", SamplingParams(temperature=0, max_tokens=9, logit_bias={65: 100.0}, stop_token_ids=(65,))),
        ("You are", SamplingParams(temperature=0, max_tokens=20, stop=("e",), repetition_penalty=1.3)),
    ]
    prompts, params = [p for p, _ in cases], [p for _, p in cases]
    for here, there in zip(engine.generate(prompts, params), away.generate(prompts, params), strict=True):
        same(here, there)
        assert here.usage.prompt_tokens == there.usage.prompt_tokens
        assert here.usage.media_tokens == there.usage.media_tokens
    settle(away)


def test_streams_and_the_order_of_times(away: Engine) -> None:
    prompt = ask(picture(5, 84, 56))
    whole = away.generate(prompt, GREEDY)[0]
    updates = list(away.stream(prompt, GREEDY))
    same(updates[-1], whole)
    assert [len(u.token_ids) for u in updates] == list(range(1, len(updates) + 1))
    for metrics in (updates[-1].metrics, whole.metrics):
        assert metrics is not None
        times = (metrics.arrival, metrics.prepared, metrics.started, metrics.first_token, metrics.last_token)
        assert None not in times
        assert list(times) == sorted(times)  # type: ignore[type-var]
        assert time.perf_counter() - metrics.arrival < 60


def test_the_start_is_known_in_one_process_too(engine: Engine) -> None:
    metrics = engine.generate("The quick brown fox", GREEDY)[0].metrics
    assert metrics is not None
    assert metrics.prepared <= metrics.started <= metrics.first_token  # type: ignore[operator]


def test_names(away: Engine) -> None:
    image = picture(6, 84, 56)
    first = away.generate(ask(image, uuid="named"), GREEDY)[0]
    same(away.generate(ask(None, uuid="named"), GREEDY)[0], first)
    with pytest.raises(MediaNotCachedError):
        away.generate(ask(None, uuid="absent"), GREEDY)


def test_many_at_once_and_aborts(away: Engine) -> None:
    wanted = [away.generate(ask(picture(20 + i, 56, 56)), GREEDY)[0] for i in range(6)]

    async def some() -> list[Any]:
        shared = AsyncEngine(away._frontend)
        jobs = [asyncio.ensure_future(shared.generate(ask(picture(20 + i % 6, 56, 56)), GREEDY)) for i in range(24)]
        long = [asyncio.ensure_future(shared.generate(ask(picture(40 + i, 56, 56)), LONG)) for i in range(4)]
        await asyncio.sleep(0.05)
        for job in long:
            job.cancel()
        return await asyncio.gather(*jobs)

    for i, output in enumerate(asyncio.run(some())):
        same(output, wanted[i % 6])
    settle(away)


def test_faults_of_requests(away: Engine) -> None:
    for prompt, params, kind in (
        (TextPrompt(prompt_token_ids=[10**9]), GREEDY, InvalidPromptError),
        ("a", SamplingParams(logit_bias={10**6: 1.0}), InvalidParamsError),
        ("a", SamplingParams(logits_processors=[lambda logits, rows: logits]), InvalidParamsError),
    ):
        with pytest.raises(kind) as caught:
            away.generate(prompt, params)
        check_message(caught.value)
    assert "engine_process=False" in str(caught.value)
    assert caught.value.param == "logits_processors"
    assert away.generate("The cat", GREEDY)[0].token_ids
    settle(away)


def test_what_cannot_cross_at_all(tiny_path: Path) -> None:
    with pytest.raises(ConfigError, match="engine_process=False"):
        start(tiny_path, plugins=[SimpleNamespace()])


def test_counters_and_facts(engine: Engine, away: Engine) -> None:
    assert away._frontend.info.max_model_len == engine._frontend.info.max_model_len
    assert away._frontend.info == engine._frontend.info
    assert set(engine.stats()) | {"engine_process"} == set(away.stats())
    before = away.stats()["generated_tokens"]
    away.generate("The quick", GREEDY)
    assert away.stats()["generated_tokens"] == before + 8
    assert away._frontend.health().ready
    assert away.stats()["startup"]["ready"] > 0


def test_caches_under_control(engine: Engine, away: Engine) -> None:
    image = picture(50, 84, 56)
    told = []
    for each in (engine, away):
        each.cache.clear()
        with each.cache.events() as events:
            warmed = each.cache.warm(image, "kept", pin=True)
            found = each.cache.lookup(ask(None, uuid="kept"))
            kinds = [next(events).kind for _ in range(2)]
        stats = each.cache.stats()
        sizes = (stats.encoder.entries, stats.encoder.pinned, stats.device.entries, stats.device.pinned)
        evicted = each.cache.evict("kept")
        told.append((warmed, found, kinds, sizes, evicted))
    assert told[0] == told[1]
    assert told[1][0].encoded_media_tokens > 0
    with pytest.raises(MediaNotCachedError):
        away.cache.pin("kept")
    settle(away)


# -- its end ---------------------------------------------------------------------------------------


def test_a_frozen_process_is_seen_and_goes_on(away: Engine) -> None:
    pid = pid_of(away)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert wait_for(lambda: away._frontend.health().state == "stuck", 10) < 4
        begun = time.monotonic()
        away.stats()  # what is known, and soon
        assert time.monotonic() - begun < 4
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: away._frontend.health().ready)
    assert away.generate("The cat", GREEDY)[0].token_ids


def test_a_killed_process_is_started_again(away: Engine, engine: Engine) -> None:
    named, other = ask(picture(60, 84, 56), uuid="survives"), ask(picture(61, 84, 56))
    wanted = engine.generate([named, other], GREEDY)
    same(away.generate(named, GREEDY)[0], wanted[0])
    away.cache.pin("survives")
    streams = [away.stream(prompt, LONG) for prompt in (other, "The quick brown fox")]
    for stream in streams:
        next(stream)
    feed, pid = away.cache.events(), pid_of(away)
    begun = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    for stream in streams:
        with pytest.raises(EngineDiedError) as caught:
            list(stream)
        check_message(caught.value)
    assert time.monotonic() - begun < 3
    list(feed)  # it ended
    assert away._frontend.health().state in ("dead", "starting")
    for refused in (lambda: away.generate("a", GREEDY), away.cache.stats, lambda: away.cache.lookup("a")):
        with pytest.raises(EngineDiedError):
            refused()
    assert time.monotonic() - begun < 5
    wait_for(lambda: away._frontend.health().ready)
    assert away._frontend.health().restarts == 1
    assert pid_of(away) != pid
    same(away.generate(ask(None, uuid="survives"), GREEDY)[0], wanted[0])
    same(away.generate(other, GREEDY)[0], wanted[1])
    assert away.cache.stats().encoder.pinned > 0, "pins hold for what is computed anew"
    with away.cache.events() as again:
        assert next(again).kind == "stored"
    away.cache.unpin("survives")
    settle(away)


def test_a_death_while_pins_are_told_of_is_not_the_last_one() -> None:
    """It would end the thread that starts the next process."""
    told: list[str] = []

    def ask(*_: Any) -> None:
        raise EngineDiedError("It died once more.")

    desk = SimpleNamespace(come_up=lambda: told.append("up"), ask=ask)
    pinned = SimpleNamespace(media=SimpleNamespace(pinned=[SimpleNamespace(uuid="a", salt=None)]))
    Frontend._on_restart(SimpleNamespace(desk=desk, pipeline=pinned))  # type: ignore[arg-type]
    assert told == ["up"]
