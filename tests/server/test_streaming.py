"""How calls end before their answer does, and what a reader sees who is slow, leaves, or waits too long.

The app is driven by hand, message by message; its engine gives the updates that the test puts in.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest

from mm_core.config import EngineConfig
from mm_core.engine.async_engine import AsyncEngine
from mm_core.engine.health import EngineHealth, ModelInfo
from mm_core.errors import (
    ContextLengthError,
    EngineDiedError,
    InvalidPromptError,
    RequestAbortedError,
    RequestTimeoutError,
)
from mm_core.server.app import build_app, build_context
from mm_core.server.config import ServerConfig
from mm_core.server.context import ANYBODY, Call
from mm_core.server.streaming import attend
from mm_core.types import CompletionOutput, RequestMetrics, RequestOutput, Usage

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def output(text: str, end: str | None = None) -> RequestOutput:
    size = len(text)
    return RequestOutput(
        "r", (1,), (CompletionOutput(0, text, (0,) * size, end),), Usage(1, 0, size), end is not None,
        RequestMetrics(0.0, 0.0, 0.0, 0.0),
    )  # fmt: skip


class Engine:
    """An AsyncEngine as far as the routes know one. A request is an asyncio.Queue of updates and errors."""

    def __init__(self) -> None:
        self.config = EngineConfig()
        self.info = ModelInfo("m", "fake", ("image",), 128, 100)
        self.requests: list[asyncio.Queue[RequestOutput | Exception]] = []
        self.prompts: list[Any] = []
        self.aborted = 0

    def health(self, stall_timeout_s: float = 30.0) -> EngineHealth:
        return EngineHealth("ready")

    async def detokenize(self, ids: list[int]) -> str:
        if max(ids) >= 90:  # of the 100 that the logits have
            raise InvalidPromptError("No such token.", param="tokens")
        return "".join(map(chr, ids))

    async def stream(self, prompt: Any, params: Any, **options: Any) -> AsyncIterator[RequestOutput]:
        assert options == {"allow_paths": False, "latest": True}
        updates: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()
        self.requests.append(updates)
        self.prompts.append(prompt)
        ended = False
        try:
            while not ended:
                update = await updates.get()
                if isinstance(update, Exception):
                    ended = True
                    raise update
                ended = update.finished
                yield update
        finally:
            self.aborted += not ended

    async def generate(self, prompt: Any, params: Any, **options: Any) -> RequestOutput:
        async for update in self.stream(prompt, params, **options, latest=True):
            last = update
        return last


class Talk:
    """One call of the app. sent: what it answered so far."""

    def __init__(self, app: Any, path: str, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._messages.put_nowait({"type": "http.request", "body": data, "more_body": False})
        self.sent: list[dict[str, Any]] = []
        self.reading = asyncio.Event()
        self.reading.set()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers,
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
        }  # fmt: skip
        self.task = asyncio.ensure_future(app(scope, self._messages.get, self._send))

    async def _send(self, message: dict[str, Any]) -> None:
        await self.reading.wait()
        self.sent.append(message)

    def leave(self) -> None:
        self._messages.put_nowait({"type": "http.disconnect"})

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    @property
    def whole(self) -> bool:
        """Whether the reply was ended, so that a client knows it has all of it."""
        return bool(self.sent) and self.sent[-1].get("more_body") is False

    @property
    def events(self) -> list[Any]:
        texts = [part.removeprefix(b"data: ") for part in self.body.split(b"\n\n") if part]
        return [text.decode() if text == b"[DONE]" else json.loads(text) for text in texts]

    @property
    def text(self) -> str:
        choices = [c for event in self.events if isinstance(event, dict) for c in event.get("choices", ())]
        return "".join(c["delta"].get("content", "") if "delta" in c else c["text"] for c in choices)


async def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.002)


class Rig:
    """An app around the engine above."""

    def __init__(self, **config: Any) -> None:
        self.engine = Engine()
        self.context = build_context(self.engine, ServerConfig(**config))  # type: ignore[arg-type]
        self.app = build_app(self.context)

    def chat(self, **fields: Any) -> Talk:
        return Talk(self.app, "/v1/chat/completions", {**CHAT, **fields})

    async def chat_begun(self, **fields: Any) -> tuple[Talk, asyncio.Queue[RequestOutput | Exception]]:
        """A call whose request is in the engine."""
        before = len(self.engine.requests)
        talk = self.chat(**fields)
        await until(lambda: len(self.engine.requests) > before)
        return talk, self.engine.requests[-1]

    def check_idle(self) -> None:
        assert (self.context.gate.running, self.context.gate.waiting) == (0, 0)


def run(test: Callable[[Rig], Coroutine[Any, Any, None]], **config: Any) -> None:
    async def body() -> None:
        rig = Rig(**config)
        await asyncio.wait_for(test(rig), 20)
        rig.check_idle()
        assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []

    asyncio.run(body())


def test_the_status_waits_for_the_first_update() -> None:
    async def test(rig: Rig) -> None:
        talk, updates = await rig.chat_begun(stream=True)
        await asyncio.sleep(0.02)
        assert talk.sent == []
        updates.put_nowait(output("a"))
        await until(lambda: talk.text == "a")
        assert talk.status == 200
        headers = dict(talk.sent[0]["headers"])
        assert headers[b"content-type"].startswith(b"text/event-stream")
        assert b"content-length" not in headers
        updates.put_nowait(output("ab"))
        updates.put_nowait(output("abc", "stop"))
        await talk.task
        assert (talk.text, talk.events[-1], talk.whole) == ("abc", "[DONE]", True)
        assert rig.engine.aborted == 0

    run(test)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("error", "status"), [(ContextLengthError("Too long."), 400), (EngineDiedError("Gone."), 503)])
def test_errors_before_the_first_update_are_proper_replies(error: Exception, status: int, stream: bool) -> None:
    async def test(rig: Rig) -> None:
        talk, updates = await rig.chat_begun(stream=stream)
        updates.put_nowait(error)
        await talk.task
        assert talk.status == status
        assert json.loads(talk.body)["error"]["code"] == error.code  # type: ignore[attr-defined]

    run(test)


def test_a_later_error_is_the_stream_s_last_event() -> None:
    async def test(rig: Rig) -> None:
        talk, updates = await rig.chat_begun(stream=True)
        updates.put_nowait(output("a"))
        await until(lambda: talk.text == "a")
        updates.put_nowait(EngineDiedError("The engine's process ended."))
        await talk.task
        assert talk.events[-1]["error"]["code"] == "engine_died"
        assert talk.whole

    run(test)


@pytest.mark.parametrize("early", [True, False])
def test_what_an_unforeseen_error_says_is_not_told(early: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def test(rig: Rig) -> None:
        talk, updates = await rig.chat_begun(stream=True)
        if not early:
            updates.put_nowait(output("a"))
            await until(lambda: talk.text == "a")
        updates.put_nowait(KeyError("/secret/path at 0x7f0000000000"))
        await talk.task
        found = json.loads(talk.body) if early else talk.events[-1]
        assert found["error"]["code"] == "internal_error"
        assert b"secret" not in talk.body
        assert "secret" in caplog.text

    run(test)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_request_at_once(stream: bool) -> None:
    async def test(rig: Rig) -> None:
        talk, updates = await rig.chat_begun(stream=stream)
        if stream:
            updates.put_nowait(output("a"))
            await until(lambda: talk.text == "a")
        talk.leave()
        start = time.perf_counter()
        await talk.task
        assert time.perf_counter() - start < 1
        assert rig.engine.aborted == 1

    run(test)


def test_a_client_that_leaves_while_it_waits_leaves_the_queue() -> None:
    async def test(rig: Rig) -> None:
        first, updates = await rig.chat_begun(stream=True)
        second = rig.chat(stream=True)
        await until(lambda: rig.context.gate.waiting == 1)
        second.leave()
        await second.task
        assert rig.context.gate.waiting == 0
        assert len(rig.engine.requests) == 1
        updates.put_nowait(output("a", "stop"))
        await first.task
        assert first.text == "a"

    run(test, max_running=1)


def test_a_client_that_leaves_while_its_media_are_read_frees_its_place() -> None:
    async def test(rig: Rig) -> None:
        begun, ended = asyncio.Event(), asyncio.Event()

        async def read_messages(messages: Any, call: Call) -> Any:
            begun.set()
            try:
                await asyncio.sleep(60)
            finally:
                ended.set()

        rig.context.intake.read_messages = read_messages  # type: ignore[method-assign]
        talk = rig.chat(stream=True)
        await begun.wait()
        assert rig.context.gate.running == 1
        talk.leave()
        await talk.task
        assert ended.is_set()
        assert rig.engine.requests == []

    run(test)


def test_a_client_that_leaves_without_reading_is_not_waited_for() -> None:
    async def test(rig: Rig) -> None:
        talk, updates = await rig.chat_begun(stream=True)
        talk.reading.clear()  # its buffers are full
        updates.put_nowait(output("a"))
        await until(updates.empty)
        talk.leave()
        await talk.task
        assert rig.engine.aborted == 1

    run(test)


def test_an_answer_that_is_there_holds_no_place_however_slowly_it_is_read() -> None:
    async def test(rig: Rig) -> None:
        slow, updates = await rig.chat_begun(stream=True)
        slow.reading.clear()
        updates.put_nowait(output("a"))
        updates.put_nowait(output("ab", "stop"))
        await until(lambda: rig.context.gate.running == 0)
        _, updates = other = await rig.chat_begun(stream=True)
        updates.put_nowait(output("c", "stop"))
        await other[0].task
        slow.reading.set()
        await slow.task
        assert (other[0].text, slow.text) == ("c", "ab")

    run(test, max_running=1)


def test_a_stream_that_was_given_up_unread_is_no_success() -> None:
    async def test(rig: Rig) -> None:
        talk, updates = await rig.chat_begun(stream=True)
        talk.reading.clear()
        updates.put_nowait(output("a", "stop"))
        await until(lambda: rig.context.gate.running == 0)
        await asyncio.sleep(0.05)
        talk.leave()
        talk.reading.set()  # as a server does that has given the connection up
        await talk.task
        assert "[DONE]" not in talk.events
        assert sum(rig.context.metrics._aborts.values()) == 1

    run(test)


def test_nobody_waits_behind_what_another_fetches() -> None:
    async def test(rig: Rig) -> None:
        part = {"type": "image_url", "image_url": {"url": "https://slow.example/a.png"}}
        fetched = asyncio.Event()
        read = rig.context.intake.read_messages

        async def read_messages(messages: Any, call: Call) -> Any:
            if isinstance(messages[0]["content"], list):
                await fetched.wait()
                return messages
            return await read(messages, call)

        rig.context.intake.read_messages = read_messages  # type: ignore[method-assign]
        slow = [rig.chat(stream=stream, messages=[{"role": "user", "content": [part]}]) for stream in (True, False)]
        quick, updates = await rig.chat_begun()
        updates.put_nowait(output("a", "stop"))
        await quick.task
        assert len(rig.engine.requests) == 1
        fetched.set()
        for _ in slow:
            begun = len(rig.engine.requests)
            await until(lambda begun=begun: len(rig.engine.requests) > begun)  # type: ignore[misc]
            rig.engine.requests[-1].put_nowait(output("b", "stop"))
        for talk in slow:
            await talk.task
            assert talk.status == 200

    run(test, max_running=1)


@pytest.mark.parametrize("begun", [True, False])
def test_time_that_is_up_ends_the_request(begun: bool) -> None:
    async def test(rig: Rig) -> None:
        talk, updates = await rig.chat_begun(stream=True)
        if begun:
            updates.put_nowait(output("a"))
        await talk.task
        found = talk.events[-1] if begun else json.loads(talk.body)
        assert found["error"]["code"] == "timeout"
        assert talk.status == (200 if begun else 504)
        assert rig.engine.aborted == 1

    run(test, request_timeout_s=0.2)


def test_too_many_calls_are_refused_before_anything_of_them_is_read() -> None:
    async def test(rig: Rig) -> None:
        first, updates = await rig.chat_begun(stream=True)
        second = rig.chat(stream=True)
        await second.task
        assert second.status == 429
        assert b"retry-after" in dict(second.sent[0]["headers"])
        updates.put_nowait(output("a", "stop"))
        await first.task

    run(test, max_running=1, max_waiting=0)


def test_several_prompts_grow_side_by_side() -> None:
    async def test(rig: Rig) -> None:
        talk = Talk(rig.app, "/v1/completions", {"model": "m", "prompt": ["x", "y"], "stream": True})
        await until(lambda: len(rig.engine.requests) == 2)
        one, two = rig.engine.requests
        two.put_nowait(output("b"))
        await until(lambda: talk.text == "b")
        one.put_nowait(output("a", "stop"))
        await until(lambda: talk.text == "ba")
        two.put_nowait(output("bc", "stop"))
        await talk.task
        assert [prompt.prompt for prompt in rig.engine.prompts] == ["x", "y"]
        indices = [choice["index"] for event in talk.events[:-1] for choice in event["choices"]]
        assert (talk.text, indices, talk.events[-1]) == ("bac", [1, 0, 1], "[DONE]")

    run(test)


@pytest.mark.parametrize("leaves", [True, False])
def test_several_prompts_do_not_wait_for_a_reader(leaves: bool) -> None:
    async def test(rig: Rig) -> None:
        talk = Talk(rig.app, "/v1/completions", {"model": "m", "prompt": ["x", "y"], "stream": True})
        await until(lambda: len(rig.engine.requests) == 2)
        one, two = rig.engine.requests
        one.put_nowait(output("a"))
        await until(lambda: talk.text == "a")
        talk.reading.clear()
        for size in range(2, 50):
            one.put_nowait(output("a" * size))
            two.put_nowait(output("b" * size))
        await until(lambda: one.empty() and two.empty())
        if leaves:
            talk.leave()
            await talk.task
            assert rig.engine.aborted == 2
            return
        talk.reading.set()
        one.put_nowait(output("a" * 50, "stop"))
        two.put_nowait(output("b" * 50, "stop"))
        await talk.task
        assert (talk.text.count("a"), talk.text.count("b")) == (50, 50)
        assert len(talk.events) < 10

    run(test)


def test_an_error_of_one_prompt_ends_the_stream_of_all() -> None:
    async def test(rig: Rig) -> None:
        talk = Talk(rig.app, "/v1/completions", {"model": "m", "prompt": ["x", "y"], "stream": True})
        await until(lambda: len(rig.engine.requests) == 2)
        rig.engine.requests[0].put_nowait(output("a"))
        await until(lambda: talk.text == "a")
        rig.engine.requests[1].put_nowait(EngineDiedError("The engine's process ended."))
        await talk.task
        assert talk.events[-1]["error"]["code"] == "engine_died"
        assert rig.engine.aborted == 1

    run(test)


@pytest.mark.parametrize("stream", [True, False])
def test_warnings_are_in_the_reply_and_its_header(stream: bool) -> None:
    async def test(rig: Rig) -> None:
        async def read_messages(messages: Any, call: Call) -> Any:
            call.warnings.append("The sound ends early \u2013 see the docs.")
            return messages

        rig.context.intake.read_messages = read_messages  # type: ignore[method-assign]
        talk, updates = await rig.chat_begun(stream=stream)
        updates.put_nowait(output("a", "stop"))
        await talk.task
        found = talk.events[0] if stream else json.loads(talk.body)
        assert found["warnings"] == ["The sound ends early \u2013 see the docs."]
        assert dict(talk.sent[0]["headers"])[b"x-mm-warnings"] == b"The sound ends early \\u2013 see the docs."

    run(test)


@pytest.mark.parametrize("echo", [True, False])
def test_ids_that_no_text_has_are_refused(echo: bool) -> None:
    async def test(rig: Rig) -> None:
        for prompt in ([65, 90], [[65], [90]]):
            talk = Talk(rig.app, "/v1/completions", {"model": "m", "prompt": prompt, "echo": echo})
            await talk.task
            assert talk.status == 400
            error = json.loads(talk.body)["error"]
            assert (error["code"], error["param"]) == ("invalid_prompt", "prompt")
        assert rig.engine.requests == []
        talk = Talk(rig.app, "/v1/completions", {"model": "m", "prompt": [65, 66], "echo": echo})
        await until(lambda: rig.engine.requests)
        rig.engine.requests[0].put_nowait(output("c", "stop"))
        await talk.task
        assert json.loads(talk.body)["choices"][0]["text"] == ("ABc" if echo else "c")

    run(test)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("leaves", [True, False])
def test_when_one_of_several_prompts_fails_or_nobody_waits_the_others_are_freed(stream: bool, leaves: bool) -> None:
    async def test(rig: Rig) -> None:
        talk = Talk(rig.app, "/v1/completions", {"model": "m", "prompt": ["x", "y", "z"], "stream": stream})
        await until(lambda: len(rig.engine.requests) == 3)
        if leaves:
            talk.leave()
        else:
            rig.engine.requests[1].put_nowait(ContextLengthError("Too long."))
        await talk.task
        assert rig.engine.aborted == (3 if leaves else 2)
        if not leaves:
            assert (talk.status, json.loads(talk.body)["error"]["code"]) == (400, "context_length_exceeded")

    run(test)


def test_attended_work_gives_its_result_or_its_error() -> None:
    async def give(value: Any) -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    async def test() -> None:
        assert await attend(give(5), Call("/", ANYBODY), 10.0) == 5
        with pytest.raises(KeyError):
            await attend(give(KeyError("x")), Call("/", ANYBODY), 10.0)

    asyncio.run(test())


def test_attended_work_has_ended_before_its_call_does() -> None:
    async def test() -> None:
        ended = []

        async def work() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0.02)
                ended.append(True)

        call = Call("/", ANYBODY)
        asyncio.get_running_loop().call_later(0.02, call.disconnected.set)
        with pytest.raises(RequestAbortedError):
            await attend(work(), call, 10.0)
        assert ended == [True]
        with pytest.raises(RequestTimeoutError):
            await attend(work(), Call("/", ANYBODY), 0.05)
        assert ended == [True] * 2
        waiting = asyncio.ensure_future(attend(work(), Call("/", ANYBODY), 10.0))
        await asyncio.sleep(0.02)
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            await waiting
        assert ended == [True] * 3

    asyncio.run(test())


class Frontend:
    """As much of the engine's as AsyncEngine needs of a request."""

    config = EngineConfig()
    info = ModelInfo("m", "fake", ("image",), 128, 100)

    def __init__(self) -> None:
        self.listener: Any = None
        self.aborted = 0

    def add(self, prompt: Any, params: Any, listener: Any, **options: Any) -> str:
        assert options["stream"]
        self.listener = listener
        return "r"

    def abort(self, request_id: str) -> None:
        self.aborted += 1


def test_a_slow_reader_gets_everything_in_fewer_pieces() -> None:
    async def test() -> None:
        frontend = Frontend()
        context = build_context(AsyncEngine(frontend), ServerConfig())  # type: ignore[arg-type]
        talk = Talk(build_app(context), "/v1/chat/completions", {**CHAT, "stream": True})
        await until(lambda: frontend.listener)
        frontend.listener(output("a"))
        await until(lambda: talk.text == "a")
        talk.reading.clear()
        for size in range(2, 60):
            frontend.listener(output("a" * size))
            await asyncio.sleep(0)
        talk.reading.set()
        await until(lambda: len(talk.text) == 59)
        frontend.listener(output("a" * 60, "length"))
        await talk.task
        assert talk.text == "a" * 60
        assert len(talk.events) <= 6  # role, first, what was on its way, all that came meanwhile, the end, [DONE]

    asyncio.run(test())
