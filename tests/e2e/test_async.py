"""AsyncEngine: the same answers awaited, and nothing left behind by whoever stops waiting."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from support.e2e import GREEDY, ask, check_message, settle
from support.pictures import picture

from mm_core import AsyncEngine, Engine, KvCacheConfig, RequestOutput, SamplingParams, TextPrompt
from mm_core.errors import EngineClosedError, InvalidParamsError, InvalidPromptError, MMError, RequestAbortedError

TEXT = "The quick brown fox jumps over the lazy"
LONG = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=None, temperature=0, ignore_eos=True)


@pytest.fixture
def shared(engine: Engine) -> AsyncEngine:
    """The module's engine, awaited."""
    return AsyncEngine(engine._frontend)


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(10):
        while not await true():
            await asyncio.sleep(0.001)


async def running(engine: AsyncEngine) -> int:
    return int((await engine.stats())["running"])


def test_answers_are_those_of_the_engine(engine: Engine, shared: AsyncEngine) -> None:
    talk = [{"role": "user", "content": "Describe"}]
    prompts: list[Any] = [TEXT, ask(picture(1)), {"prompt": "The cat"}]
    wanted = [engine.generate(p, LONG)[0] for p in prompts] + engine.chat(talk, LONG)

    async def main() -> list[RequestOutput]:
        return list(await asyncio.gather(*(shared.generate(p, LONG) for p in [*prompts, talk])))

    steps = engine.stats()["steps"]
    outputs = asyncio.run(main())
    assert engine.stats()["steps"] - steps < 3 * 40, "the requests did not share steps"
    assert [(o.token_ids, o.text) for o in outputs] == [(o.token_ids, o.text) for o in wanted]
    settle(engine)


def test_from_pretrained_stream_and_close(tiny_path: Path) -> None:
    kv = KvCacheConfig(num_blocks=64)

    async def main() -> None:
        async with await AsyncEngine.from_pretrained(tiny_path, kv_cache_config=kv, show_progress=False) as engine:
            whole = await engine.generate(TEXT, LONG)
            updates = [update async for update in engine.stream(TEXT, LONG)]
            assert len(updates) > 20
            assert [u.finished for u in updates] == [False] * (len(updates) - 1) + [True]
            assert all(whole.text.startswith(u.text) for u in updates)
            assert (updates[-1].text, updates[-1].token_ids) == (whole.text, whole.token_ids)
            assert (await engine.stats())["finished"] == {"length": 2}
        for call in (engine.generate(TEXT, LONG), anext(aiter(engine.stream(TEXT, LONG)))):
            with pytest.raises(EngineClosedError):
                await call
        await engine.close()

    threads = threading.active_count()
    asyncio.run(main())
    assert threading.active_count() == threads


def test_errors_reach_only_their_own_waiter(engine: Engine, shared: AsyncEngine) -> None:
    wanted = engine.generate(TEXT, LONG)[0].token_ids

    async def main() -> list[Any]:
        calls = [shared.generate("", LONG), shared.generate(TEXT, LONG), shared.generate(ask(b"x"), LONG),
                 shared.generate(TEXT, {"max_tokens": 3}), shared.generate(TEXT, {})]  # type: ignore[arg-type] # fmt: skip
        return list(await asyncio.gather(*calls, return_exceptions=True))

    empty, good, image, params, falsy = asyncio.run(main())
    assert isinstance(empty, InvalidPromptError)
    assert good.token_ids == wanted
    assert image.code == "unsupported_media"
    assert isinstance(params, InvalidParamsError)
    assert isinstance(falsy, InvalidParamsError)
    for error in (empty, image, params, falsy):
        check_message(error)
    settle(engine)


def test_cancelling_a_task_frees_everything(engine: Engine, shared: AsyncEngine) -> None:
    async def main(prompt: Any) -> None:
        task = asyncio.create_task(shared.generate(prompt, ENDLESS))

        async def started() -> bool:
            return await running(shared) == 1

        await until(started)
        assert (await shared.stats())["blocks"]["in_use"] > 0
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await running(shared) == 0

    for prompt in (TEXT, ask(picture(2))):
        asyncio.run(main(prompt))
        settle(engine)


@pytest.mark.parametrize("how", ["aclosing", "break", "exception"])
def test_leaving_a_stream_frees_everything(engine: Engine, shared: AsyncEngine, how: str) -> None:
    async def leave() -> None:
        if how == "aclosing":
            async with aclosing(shared.stream(ask(picture(3)), ENDLESS)) as updates:  # type: ignore[type-var]
                async for update in updates:
                    if len(update.token_ids) > 2:
                        return
        async for update in shared.stream(ask(picture(3)), ENDLESS):
            if len(update.token_ids) > 2:
                assert await running(shared) == 1
                if how == "exception":
                    raise KeyError(how)
                break

    async def main() -> None:
        try:
            await leave()
        except KeyError:
            assert how == "exception"
        gc.collect()

        async def stopped() -> bool:
            return await running(shared) == 0

        await until(stopped)

    aborted = engine.stats()["finished"].get("abort", 0)
    asyncio.run(main())
    assert engine.stats()["finished"]["abort"] == aborted + 1
    settle(engine)


def test_a_stream_that_nobody_iterates_starts_nothing(engine: Engine, shared: AsyncEngine) -> None:
    async def main() -> None:
        shared.stream(TEXT, ENDLESS)
        await asyncio.sleep(0)
        assert engine._frontend._live == {}

    asyncio.run(main())
    settle(engine)


def test_cancelling_while_media_are_prepared(
    engine: Engine, shared: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = engine._frontend.model.processor
    go, entered, real = threading.Event(), threading.Event(), processor.prepare

    def prepare(*args: Any) -> Any:
        entered.set()
        assert go.wait(10)
        return real(*args)

    async def main() -> None:
        task = asyncio.create_task(shared.generate(ask(picture(4)), ENDLESS))
        assert await asyncio.to_thread(entered.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine._frontend._live == {}
        go.set()

    monkeypatch.setattr(processor, "prepare", prepare)
    steps = engine.stats()["steps"]
    asyncio.run(main())
    assert engine.generate("x", GREEDY)[0].finished
    assert engine.stats()["steps"] - steps < 20, "the cancelled request ran"
    settle(engine)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=SLOW), pytest.param(2, marks=SLOW)])
def test_forty_at_once_a_third_cancelled(engine: Engine, shared: AsyncEngine, seed: int) -> None:
    """Nothing leaks, and whoever stays gets exactly what it gets alone."""
    rng = random.Random(seed)
    prompts: list[Any] = [
        TextPrompt(prompt=f"{TEXT} {i}") if i % 2 else ask(picture(i % 7), f"{i}?") for i in range(40)
    ]
    params = [LONG.model_copy(update={"max_tokens": rng.randint(10, 60)}) for _ in prompts]
    if seed == 2:  # sampled, but repeatable
        params = [p.model_copy(update={"temperature": 1.0, "seed": i}) for i, p in enumerate(params)]
    wanted = [engine.generate(p, q)[0].token_ids for p, q in zip(prompts, params, strict=True)]
    engine.clear_cache()
    victims = set(rng.sample(range(40), 13))

    async def ask_one(index: int) -> RequestOutput:
        if index % 3:
            return await shared.generate(prompts[index], params[index])
        last: RequestOutput | None = None
        async for update in shared.stream(prompts[index], params[index]):
            last = update
        assert last is not None
        return last

    async def cancel(task: asyncio.Task[RequestOutput], delay: float) -> None:
        await asyncio.sleep(delay)
        task.cancel()

    async def main() -> list[Any]:
        tasks = [asyncio.create_task(ask_one(index)) for index in range(40)]
        cancels = [cancel(tasks[index], rng.choice((0.01, 0.1, 0.25)) * rng.random()) for index in victims]
        await asyncio.gather(*cancels)
        return list(await asyncio.gather(*tasks, return_exceptions=True))

    results = asyncio.run(main())
    settle(engine)
    cancelled = {i for i, r in enumerate(results) if isinstance(r, asyncio.CancelledError)}
    assert cancelled <= victims
    assert len(cancelled) >= 3, "nothing was cancelled in time: this proves nothing"
    wrong = [i for i, r in enumerate(results) if i not in cancelled and r.token_ids != wanted[i]]
    assert wrong == []


def test_close_while_running_ends_the_waiters(tiny_path: Path) -> None:
    kv = KvCacheConfig(num_blocks=1024)  # endless answers are let in only where they fit together

    async def main() -> tuple[AsyncEngine, list[Any]]:
        engine = await AsyncEngine.from_pretrained(tiny_path, kv_cache_config=kv, show_progress=False)
        tasks = [asyncio.create_task(engine.generate(f"{TEXT} {i}", ENDLESS)) for i in range(6)]
        tasks.append(asyncio.create_task(engine.generate(ask(picture(1)), ENDLESS)))

        async def started() -> bool:
            return await running(engine) > 3

        await until(started)
        await engine.close()
        async with asyncio.timeout(5):
            return engine, list(await asyncio.gather(*tasks, return_exceptions=True))

    engine, results = asyncio.run(main())
    for result in results:
        assert isinstance(result, EngineClosedError | RequestAbortedError), result
        assert isinstance(result, MMError)
        check_message(result)
    frontend = engine._frontend
    assert frontend._live == {}
    assert frontend._core.scheduler.pool.counts()["in_use"] == 0
    frontend._core.scheduler.check_integrity()


def test_a_loop_that_ended_does_not_disturb_the_engine(engine: Engine, shared: AsyncEngine) -> None:
    """asyncio.run cancels what is left and closes the loop while tokens are still on their way."""

    async def main() -> None:
        task = asyncio.create_task(shared.generate(TEXT, ENDLESS))
        await asyncio.sleep(0.02)
        assert not task.done()

    for _ in range(5):
        asyncio.run(main())
    assert engine.generate(TEXT, GREEDY)[0].finished
    settle(engine)
