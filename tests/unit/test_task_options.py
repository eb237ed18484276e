"""What a task's caller may choose: its caches, whether paths are read, and to be told of its progress."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.pictures import picture
from support.tiny import make_tiny_qwen2vl

import mm_plugin_qwen2vl
from mm_core import AsyncEngine, Engine, KvCacheConfig, SamplingParams, TextPrompt, hookimpl
from mm_core.errors import InvalidPromptError, MediaError, MMError
from mm_core.inputs.messages import ChatPrompt
from mm_core.types import ModelFamily, RequestOutput, TaskOptions, TaskProgress, TaskRequest

SHORT = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
Task = Generator[Sequence[TaskRequest] | TaskProgress, Sequence[RequestOutput], Any]


def ask(prompts: list[Any]) -> Task:
    outputs = yield [TaskRequest(prompt, SHORT) for prompt in prompts]
    return list(outputs)


def tell(parts: list[str]) -> Task:
    nothing = yield TaskProgress("begun")
    assert not nothing
    said = []
    for part in parts:
        (output,) = yield [TaskRequest(part, SHORT)]
        said.append(output.text)
        yield TaskProgress(output.text)
        yield TaskProgress(len(said))
    return said


class WithTasks:
    """The plugin of Qwen2-VL with tasks."""

    def __init__(self) -> None:
        for hook in ("mm_processor", "mm_encoder", "mm_fusion"):
            setattr(self, hook, getattr(mm_plugin_qwen2vl, hook))

    @hookimpl
    def mm_families(self) -> list[ModelFamily]:
        return [ModelFamily("tasked", ("Qwen2VLForConditionalGeneration",), ("image", "video"))]

    @hookimpl
    def mm_tasks(self, family: str, checkpoint: Any) -> Any:
        return {"ask": ask, "tell": tell}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen2vl(tmp_path_factory.mktemp("tiny"))


OPTIONS: dict[str, Any] = {"kv_cache_config": KvCacheConfig(num_blocks=256, block_size=16), "show_progress": False}


@pytest.fixture(scope="module")
def engine(path: Path) -> Iterator[Engine]:
    with Engine.from_pretrained(path, plugins=[WithTasks()], **OPTIONS) as made:
        yield made


def prompts() -> list[Any]:
    """One of each kind that a task may ask, long enough to be cached."""
    text = "a text that is long enough to fill some blocks " * 4
    media = {"image": [picture(7)]}
    return [
        f"1 {text}", {"prompt": f"2 {text}"}, TextPrompt(prompt=f"3 {IMAGE} {text}", multi_modal_data=media),
        [{"role": "user", "content": f"4 {text}"}],
        ChatPrompt([{"role": "system", "content": f"5 {text}"}, {"role": "user", "content": "Go on."}]),
    ]  # fmt: skip


def test_a_salt_reaches_every_request(engine: Engine) -> None:
    def cached(salt: str | None) -> list[int]:
        outputs = engine.task("ask", TaskOptions(cache_salt=salt), prompts=prompts())
        texts.append([o.text for o in outputs])
        return [o.usage.cached_tokens for o in outputs]

    texts: list[list[str]] = []
    # Where the two chats begin alike, the second one reuses the first one's beginning.
    for salt in ("tenant-a", "tenant-b", None):
        assert max(cached(salt)) < 16
        assert min(cached(salt)) > 32
    assert texts == texts[:1] * 6, "a salt changes no token"


def test_a_callers_salt_goes_before_the_tasks(engine: Engine) -> None:
    mine = [TextPrompt(prompt="some words to remember " * 8, cache_salt="of-the-task")]
    engine.task("ask", prompts=mine)
    assert engine.task("ask", prompts=mine)[0].usage.cached_tokens
    assert not engine.task("ask", TaskOptions(cache_salt="tenant-c"), prompts=mine)[0].usage.cached_tokens
    with pytest.raises(InvalidPromptError, match="cache_salt"):
        engine.task("ask", TaskOptions(cache_salt="no/salt"), prompts=mine)


def test_paths_are_refused_where_they_are_not_allowed(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    picture(3).save(file)
    asked = [TextPrompt(prompt=IMAGE, multi_modal_data={"image": [str(file)]})]
    assert engine.task("ask", prompts=asked)
    with pytest.raises(MediaError):
        engine.task("ask", TaskOptions(allow_paths=False), prompts=asked)


def test_progress_is_told_in_order(engine: Engine) -> None:
    told: list[Any] = []
    outputs: list[RequestOutput] = []
    said = engine.task("tell", TaskOptions(on_progress=told.append, on_output=outputs.append), parts=["one", "two"])
    assert [output.text for output in outputs] == said
    assert told == ["begun", said[0], 1, said[1], 2]
    assert engine.task("tell", parts=["one", "two"]) == said


def test_a_listener_that_fails_is_its_own_matter(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    def broken(value: Any) -> None:
        raise ZeroDivisionError

    assert engine.task("tell", TaskOptions(on_progress=broken), parts=["one"]) == engine.task("tell", parts=["one"])
    assert "its listener failed" in caplog.text


def test_asyncio_is_told_in_its_loop_and_before_the_end(path: Path) -> None:
    async def main() -> None:
        engine = await AsyncEngine.from_pretrained(path, plugins=[WithTasks()], **OPTIONS)
        async with engine:
            told: list[Any] = []
            threads: set[int] = set()
            waiting = asyncio.Event()

            def listen(value: Any) -> None:
                told.append(value)
                threads.add(threading.get_ident())
                if value == 1:
                    waiting.set()

            said = await engine.task("tell", TaskOptions("salt", on_progress=listen), parts=["one", "two"])
            assert told == ["begun", said[0], 1, said[1], 2]
            assert threads == {threading.get_ident()}
            told.clear()
            waiting.clear()
            long = asyncio.create_task(
                engine.task("tell", TaskOptions(on_progress=listen), parts=["one", *map(str, range(300))])
            )
            await waiting.wait()
            assert not long.done(), "told at the end only"
            long.cancel()
            with pytest.raises(asyncio.CancelledError):
                await long
            assert engine._frontend.num_live == 0
            with pytest.raises(MMError):
                await engine.task(
                    "ask",
                    TaskOptions(allow_paths=False),
                    prompts=[{"prompt": IMAGE, "multi_modal_data": {"image": ["/x.png"]}}],
                )

    asyncio.run(main())
