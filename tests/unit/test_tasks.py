"""Tasks: a family's generators of requests. A plugin of these tests adds some to the tiny Qwen2-VL."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.e2e import check_message, settle
from support.tiny import make_tiny_qwen2vl

import mm_plugin_qwen2vl
from mm_core import AsyncEngine, Engine, KvCacheConfig, SamplingParams, hookimpl
from mm_core.errors import (
    BatchError,
    ConfigError,
    EngineClosedError,
    InvalidParamsError,
    InvalidPromptError,
    MMError,
    PluginError,
)
from mm_core.plugins import PluginRegistry
from mm_core.types import ModelFamily, RequestOutput, TaskRequest

SHORT = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=None, temperature=0, ignore_eos=True)
Task = Generator[list[TaskRequest], list[RequestOutput], Any]
log: list[str] = []


def echo(text: str, times: int = 1, *, params: SamplingParams = SHORT) -> Task:
    """`times` requests one after another, each with what the one before answered."""
    said: list[str] = []
    for _ in range(times):
        (output,) = yield [TaskRequest(text + "".join(said), params)]
        said.append(output.text)
    return said


def fan(texts: list[str], params: Any = SHORT) -> Task:
    outputs = yield [TaskRequest(text, params) for text in texts]
    return [output.text for output in outputs]


def careful(text: str) -> Task:
    """Asks again where a request fails."""
    try:
        yield [TaskRequest(text, SHORT), TaskRequest("a long one", ENDLESS)]
    except InvalidPromptError as error:
        log.append(error.code)
    (output,) = yield [TaskRequest("instead", SHORT)]
    return output.text


def stubborn(text: str) -> Task:
    while True:
        try:
            yield [TaskRequest(text, ENDLESS)]
        except MMError as error:
            log.append(error.code)


def hold(text: str, block: Callable[[], None] = lambda: None) -> Task:
    try:
        block()
        yield [TaskRequest(text, ENDLESS)]
    finally:
        log.append("closed")


def breaks(how: str) -> Task:
    if how == "early":
        raise KeyError("secret")
    if how == "mm":
        raise InvalidParamsError("how='mm' makes no sense. Use another.")
    if how == "empty":
        yield []
    if how == "text":
        yield "not a list of requests"  # type: ignore[misc]
    yield [TaskRequest("x", SHORT)]
    raise ZeroDivisionError("secret")


def named(name: str) -> Task:
    (output,) = yield [TaskRequest(name, SHORT)]
    return output.text


def no_generator(text: str = "") -> Any:
    return text


def nothing() -> Task:
    return "done"
    yield []


def transcribe(audio: Any, language: str | None = None) -> Task:
    (output,) = yield [TaskRequest(f"{language}: {audio}", SHORT)]
    return SimpleNamespace(text=output.text, audio=audio)


TASKS = {t.__name__: t for t in (echo, fan, careful, stubborn, hold, breaks, named, no_generator, nothing, transcribe)}


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
        assert family == "tasked"
        assert checkpoint.config
        return TASKS


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen2vl(tmp_path_factory.mktemp("tiny"))


def start(path: Path, **options: Any) -> Engine:
    kv = KvCacheConfig(num_blocks=256)
    return Engine.from_pretrained(path, plugins=[WithTasks()], kv_cache_config=kv, show_progress=False, **options)


@pytest.fixture(scope="module")
def engine(path: Path) -> Iterator[Engine]:
    with start(path) as made:
        yield made


@pytest.fixture(autouse=True)
def empty_log() -> None:
    log.clear()


def wait_for(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_a_task_is_what_its_requests_give(engine: Engine) -> None:
    first = engine.generate("Hello", SHORT)[0].text
    second = engine.generate("Hello" + first, SHORT)[0].text
    assert engine.task("echo", text="Hello", times=2) == [first, second]
    assert engine.task("nothing") == "done"
    assert engine.task("named", name="Hello") == first
    texts = [f"number {i}" for i in range(5)]
    assert engine.task("fan", texts=texts) == [o.text for o in engine.generate(texts, SHORT)]
    settle(engine)


def test_many_share_steps_and_keep_their_order(engine: Engine) -> None:
    inputs = [{"text": f"Say {i}", "times": 1 + i % 3} for i in range(12)]
    wanted = [engine.task("echo", **each) for each in inputs]
    alone = engine.stats()["steps"]
    assert engine.tasks("echo", inputs) == wanted
    assert engine.stats()["steps"] - alone < 5 * 3 * 4, "one after another"
    assert [len(said) for said in wanted] == [1 + i % 3 for i in range(12)]
    assert engine.tasks("echo", []) == []
    settle(engine)


def test_progress_is_shown_for_several(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Bar:
        def __init__(self, **settings: Any) -> None:
            self.settings, self.count = settings, 0
            made.append(self)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def update(self) -> None:
            self.count += 1

    monkeypatch.setattr("mm_core.engine.engine.tqdm", Bar)
    shown = engine._frontend.config.model_copy(update={"show_progress": True})
    monkeypatch.setattr(engine._frontend, "config", shown)
    with pytest.raises(BatchError):
        engine.tasks("echo", [{"text": "Hello"}, {"text": ""}, {"text": "Hello"}])
    engine.task("echo", text="Hello")
    assert [(bar.settings["total"], bar.settings["disable"], bar.count) for bar in made] == [
        (3, False, 3),
        (1, True, 1),
    ]


def test_few_are_open_at_a_time(path: Path) -> None:
    open_now, most = 0, 0

    def counted(text: str) -> Task:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        yield [TaskRequest(text, SHORT)]
        open_now -= 1

    with start(path, max_num_seqs=2) as small:
        small._frontend.model.tasks["counted"] = counted  # type: ignore[index]
        small.tasks("counted", [{"text": f"{i}"} for i in range(20)])
        del small._frontend.model.tasks["counted"]  # type: ignore[attr-defined]
    assert 2 < most <= 4


def test_transcribe_is_the_short_form(engine: Engine) -> None:
    one = engine.transcribe("a.wav", language="de")
    assert (one.audio, one.text) == ("a.wav", engine.generate("de: a.wav", SHORT)[0].text)
    several = engine.transcribe(["a.wav", ("samples", 16000)])
    assert [s.audio for s in several] == ["a.wav", ("samples", 16000)]
    assert engine.transcribe(("samples", 16000)).audio == ("samples", 16000)
    assert engine.transcribe([]) == []


def test_wrong_calls_name_the_remedy(engine: Engine) -> None:
    with pytest.raises(ConfigError, match=r"no task 'sing'.*breaks, careful, echo, fan, hold") as unknown:
        engine.task("sing", text="x")
    with pytest.raises(InvalidParamsError, match=r"does not take 'tekst'.*text, times, params") as misspelt:
        engine.task("echo", tekst="x")
    with pytest.raises(InvalidParamsError, match=r"needs 'text'.*text, times, params"):
        engine.task("echo", times=2)
    with pytest.raises(InvalidParamsError, match="list of dicts"):
        engine.tasks("echo", "text")  # type: ignore[arg-type]
    with pytest.raises(InvalidParamsError, match="SamplingParams"):
        engine.task("fan", texts=["x"], params="greedy")
    check_message(unknown.value)
    assert misspelt.value.param == "tekst"


def test_a_family_without_tasks(tmp_path: Path) -> None:
    with Engine.from_pretrained(make_tiny_qwen2vl(tmp_path), plugins=["qwen2vl"], show_progress=False) as plain:
        assert plain._frontend.model.family == "qwen2vl"
        with pytest.raises(ConfigError, match=r"has no task 'transcribe'.*generate\(\)"):
            plain.transcribe("a.wav")


@pytest.mark.parametrize(
    ("how", "text"), [("early", "KeyError"), ("late", "ZeroDivisionError"), ("empty", "no request"), ("text", "str")]
)
def test_faults_of_the_plugin_are_called_so(engine: Engine, how: str, text: str) -> None:
    with pytest.raises(PluginError, match=f"'tasked': task 'breaks'.*{text}") as caught:
        engine.task("breaks", how=how)
    check_message(caught.value)
    assert "secret" not in str(caught.value)
    settle(engine)


def test_other_faults(engine: Engine) -> None:
    with pytest.raises(PluginError, match=r"gave a str\. A task is a generator function"):
        engine.task("no_generator")
    with pytest.raises(InvalidParamsError, match="how='mm'"):
        engine.task("breaks", how="mm")


def test_one_of_many_fails_alone(engine: Engine) -> None:
    wanted = engine.task("echo", text="Hello")
    with pytest.raises(BatchError) as caught:
        engine.tasks("echo", [{"text": "Hello"}, {"text": ""}, {"tekst": 1}, {"text": "Hello"}])
    assert caught.value.outputs == [wanted, None, None, wanted]
    assert {i: type(e) for i, e in caught.value.errors.items()} == {1: InvalidPromptError, 2: InvalidParamsError}
    with pytest.raises(InvalidPromptError):
        engine.task("echo", text="")
    settle(engine)


def test_a_requests_error_is_thrown_into_the_task(engine: Engine) -> None:
    """And the other requests of the same list are aborted."""
    assert engine.task("careful", text="") == engine.generate("instead", SHORT)[0].text
    assert log == ["invalid_prompt"]
    settle(engine)


def test_ctrl_c_leaves_nothing_behind(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    real = engine._frontend.add

    def add(*args: Any, **kwargs: Any) -> str:
        made = real(*args, **kwargs)
        if len(engine._frontend._live) == 3:
            raise KeyboardInterrupt
        return made

    monkeypatch.setattr(engine._frontend, "add", add)
    with pytest.raises(KeyboardInterrupt):
        engine.tasks("hold", [{"text": f"{i}"} for i in range(5)])
    monkeypatch.undo()
    assert log == ["closed"] * 3
    wait_for(lambda: len(engine._frontend._live) <= 1)
    for request_id in list(engine._frontend._live):  # the one that nobody was told the id of
        engine._frontend.abort(request_id)
    settle(engine)


def test_close_ends_tasks_that_never_give_up(path: Path) -> None:
    engine = start(path)
    failed: list[MMError] = []

    def call() -> None:
        try:
            engine.tasks("stubborn", [{"text": "x"}, {"text": "y"}])
        except MMError as error:
            failed.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    wait_for(lambda: len(engine._frontend._live) == 2)
    engine.close()
    thread.join(10)
    assert not thread.is_alive()
    assert isinstance(failed[0], BatchError)
    assert [type(e) for e in failed[0].errors.values()] == [EngineClosedError] * 2
    assert log == ["engine_closed"] * 2
    with pytest.raises(EngineClosedError):
        engine.task("echo", text="x")


# --- asyncio --------------------------------------------------------------------------------------


def test_awaited_tasks(engine: Engine) -> None:
    shared = AsyncEngine(engine._frontend)

    async def main() -> None:
        texts = ["one", "two"]
        assert await shared.task("fan", texts=texts) == engine.task("fan", texts=texts)
        assert await shared.task("careful", text="") == engine.task("careful", text="")
        assert (await shared.transcribe("a.wav")).text == engine.transcribe("a.wav").text
        assert [s.audio for s in await shared.transcribe(["a", "b"])] == ["a", "b"]
        assert await shared.transcribe([]) == []
        with pytest.raises(ConfigError, match="no task"):
            await shared.task("sing")
        with pytest.raises(BatchError) as caught:
            await shared.tasks("echo", [{"text": "Hello"}, {"text": ""}])
        assert caught.value.outputs == [engine.task("echo", text="Hello"), None]
        with pytest.raises(PluginError, match="ZeroDivisionError"):
            await shared.task("breaks", how="late")

    asyncio.run(main())
    settle(engine)


@pytest.mark.parametrize("working", [False, True])
def test_cancelling_closes_the_task(engine: Engine, working: bool) -> None:
    """While its requests run, and while it works itself."""
    shared = AsyncEngine(engine._frontend)
    begun, go = threading.Event(), threading.Event()

    def block() -> None:
        begun.set()
        assert go.wait(10)

    async def main() -> None:
        job = asyncio.ensure_future(shared.task("hold", text="x", block=block))
        await asyncio.to_thread(begun.wait)
        if not working:
            go.set()
            while not engine._frontend._live:
                await asyncio.sleep(0.001)
        job.cancel()
        await asyncio.sleep(0.01)
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await job
        assert log == ["closed"]

    asyncio.run(main())
    settle(engine)


# --- the hook -------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, [echo], {"echo": "text"}])
def test_what_the_hook_gives_is_checked(given: Any) -> None:
    class Wrong(WithTasks):
        @hookimpl
        def mm_tasks(self) -> Any:
            return given

    registry = PluginRegistry([Wrong()], installed=())
    owner = registry.resolve(["Qwen2VLForConditionalGeneration"])
    assert registry.implements("mm_tasks", owner)
    with pytest.raises(PluginError, match=r"mm_tasks\(family, checkpoint\).*mapping from names to tasks"):
        registry.call_owner("mm_tasks", owner, family="tasked", checkpoint=None)
