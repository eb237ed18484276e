"""Where a call's requests are put to the engine, and how its answer is sent while it grows.

A call ends early when its client is gone or its time is up: what it has in the gate, in preparation or in the engine
is let go of at once.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from mm_core.config import SamplingParams
from mm_core.errors import MMError, RequestAbortedError, RequestError, RequestTimeoutError
from mm_core.server.context import Call, ServerContext
from mm_core.server.failures import body_of, log_unforeseen
from mm_core.server.replies import encode, event
from mm_core.types import RequestOutput

T = TypeVar("T")

_READ_AT_ONCE_S = 0.01
_LAST_WORD_S = 5.0  # how long a client may take to read that its stream failed


@dataclass(frozen=True)
class Ask:
    """One prompt of a call. make: gives the engine's, media loaded. fetches: whether some are on other servers. names:
    what the call's body calls the arguments of the engine that errors name, where that is something else."""

    make: Callable[[], Awaitable[Any]]
    fetches: bool = False
    names: Mapping[str, str] = field(default_factory=dict)


async def attend(work: Coroutine[Any, Any, T], call: Call, timeout_s: float) -> T:
    """The result of `work`, unless the client leaves or the time is up before: then it is cancelled, and has ended.

    Raises RequestAbortedError, RequestTimeoutError, and what `work` raises.
    """
    job = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(call.disconnected.wait())
    try:
        left = call.arrival + timeout_s - time.perf_counter()
        await asyncio.wait((job, gone), timeout=max(left, 0.0), return_when=asyncio.FIRST_COMPLETED)
        if job.done():
            return job.result()
        error: MMError
        if gone.done():
            error = RequestAbortedError("The client closed the connection.")
        else:
            error = RequestTimeoutError(f"The answer took longer than the {timeout_s:g} s that this server allows.")
    finally:
        job.cancel()
        gone.cancel()
        await asyncio.gather(job, gone, return_exceptions=True)
    raise error


async def run(
    context: ServerContext, call: Call, prompt: Any, params: SamplingParams, *, stream: bool = True
) -> AsyncGenerator[RequestOutput, None]:
    """A request's outputs, each holding everything so far; only the newest where the reader is slow, and only the
    last one without `stream`. Leaving it aborts the request. For calls that are inside the gate."""
    call.phase = "prepare" if stream else "engine"
    gaps = context.metrics.token_gaps()
    if not stream:
        output = await context.engine.generate(prompt, params, allow_paths=False)
        gaps.add(output)
        _warn(call, output)
        _count(context, call, output)
        yield output
        return
    updates = context.engine.stream(prompt, params, allow_paths=False, latest=True)
    async with aclosing(updates) as outputs:  # type: ignore[type-var]
        async for output in outputs:
            call.phase = "decode"
            gaps.add(output)
            _warn(call, output)
            if output.finished:
                _count(context, call, output)
            yield output


def _warn(call: Call, output: RequestOutput) -> None:
    """What the engine says of the request's media, once."""
    call.warnings += [text for text in output.warnings if text not in call.warnings]


def _count(context: ServerContext, call: Call, output: RequestOutput) -> None:
    """A request's last output: to the metrics, and to the access log."""
    context.metrics.on_output(call, output)
    call.prompt_tokens = (call.prompt_tokens or 0) + output.usage.prompt_tokens
    call.completion_tokens = (call.completion_tokens or 0) + output.usage.completion_tokens


async def answers(
    context: ServerContext, call: Call, asks: Sequence[Ask], params: SamplingParams
) -> list[RequestOutput]:
    """Finished outputs of a call's prompts, in order, each answered as soon as it has its places in the gate."""
    call.phase = "queue"
    jobs = [asyncio.ensure_future(_answer(context, call, ask, params)) for ask in asks]
    try:
        return await asyncio.gather(*jobs)
    finally:
        await _stop(jobs)


async def _answer(context: ServerContext, call: Call, ask: Ask, params: SamplingParams) -> RequestOutput:
    async with (
        _inside(context, call, ask, params) as prompt,
        aclosing(run(context, call, prompt, params, stream=False)) as outputs,
    ):
        return await anext(outputs)


@asynccontextmanager
async def _inside(context: ServerContext, call: Call, ask: Ask, params: SamplingParams) -> AsyncIterator[Any]:
    """The prompt, with its places in the gate. What it points to is fetched before: nobody waits behind a server that
    takes its time but whoever named it."""
    async with AsyncExitStack() as fetching:
        prompt = None
        if ask.fetches:
            await fetching.enter_async_context(context.intake.fetching.of(call.caller.name))
            prompt = await ask.make()
        async with context.gate.enter(call, params.n):
            await fetching.aclose()
            try:
                yield prompt if ask.fetches else await ask.make()
            except RequestError as error:
                if (name := ask.names.get(error.param or "")) is None:
                    raise
                named = copy.copy(error)  # others may wait for the same picture, and get the same error
                named.param = name
                raise named from error.__cause__


async def updates(
    context: ServerContext, call: Call, asks: Sequence[Ask], params: SamplingParams
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Outputs of a call's prompts while they grow, whichever comes, each with its prompt's place; of those that wait
    for the reader, the newest of each prompt. A prompt's places in the gate are free when its answers are there,
    however slowly they are read."""
    call.phase = "queue"
    latest: dict[int, RequestOutput] = {}
    news = asyncio.Event()

    async def pump(place: int, ask: Ask) -> None:
        async with (
            _inside(context, call, ask, params) as prompt,
            aclosing(run(context, call, prompt, params)) as outputs,
        ):
            async for output in outputs:
                latest[place] = output
                news.set()

    async def pump_all() -> None:
        jobs = [asyncio.ensure_future(pump(place, ask)) for place, ask in enumerate(asks)]
        try:
            await asyncio.gather(*jobs)
        finally:
            await _stop(jobs)

    pumping = asyncio.ensure_future(pump_all())
    pumping.add_done_callback(lambda _: news.set())
    try:
        ended = False
        while not ended:
            await news.wait()
            news.clear()
            ended = pumping.done()  # looked at first: nothing comes behind it
            for place in tuple(latest):
                yield place, latest.pop(place)
        pumping.result()
    finally:
        await _stop([pumping])


async def _stop(jobs: Sequence[asyncio.Future[Any]]) -> None:
    """Cancel what still runs, and wait until it let go of what it holds."""
    for job in jobs:
        job.cancel()
    await asyncio.gather(*jobs, return_exceptions=True)


class EventStream(Response):
    """Server-sent events. The status is sent with the first event; errors before that are proper replies, later ones
    an event of their own, the last one."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], call: Call, timeout_s: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._call = call
        self._timeout_s = timeout_s
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send all events."""
        try:
            await attend(self._send_events(send), self._call, self._timeout_s)
        except Exception as error:
            if not self._started:
                raise
            self._call.error_code = getattr(error, "code", "internal_error")
            log_unforeseen(error, {"request_id": self._call.request_id, "route": self._call.route})
            if self._call.disconnected.is_set():
                return
            failure = event(body_of(error, self._call.request_id))
            with suppress(TimeoutError):
                await asyncio.wait_for(_send_last(send, failure), _LAST_WORD_S)
        else:
            await _send_last(send, b"")

    async def _send_events(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            async for body in events:
                if not self._started:
                    self.headers.update(warning_headers(self._call))
                    self._started = True  # from here on, whether or not the client reads it
                    head: Message = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                    await self._send(send, head)
                if body:
                    await self._send(send, {"type": "http.response.body", "body": body, "more_body": True})

    async def _send(self, send: Send, message: Message) -> None:
        begun = time.perf_counter()
        await send(message)
        if time.perf_counter() - begun > _READ_AT_ONCE_S:  # it waited for the client: until it read, or was gone
            await asyncio.sleep(0)
            if self._call.disconnected.is_set():
                raise RequestAbortedError("The client closed the connection.")


async def _send_last(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": False})


def json_reply(content: Any, call: Call) -> Response:
    """A whole reply."""
    return Response(encode(content), media_type="application/json", headers=warning_headers(call))


def warning_headers(call: Call) -> dict[str, str]:
    """The call's warnings, where there are any, as a header too."""
    if not call.warnings:
        return {}
    text = " ".join("; ".join(call.warnings).split())
    return {"x-mm-warnings": text.encode("ascii", "backslashreplace").decode()[:1024]}
