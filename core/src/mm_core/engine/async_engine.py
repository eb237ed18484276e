"""AsyncEngine: the same engine for asyncio programs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from mm_core.config import EngineConfig, SamplingParams
from mm_core.engine.cache import AsyncCacheControl
from mm_core.engine.frontend import Frontend
from mm_core.engine.tasks import Outcome, TaskRun, unwrap
from mm_core.errors import MMError
from mm_core.tracing import Span
from mm_core.types import RequestOutput, TaskRequest, TextPrompt, TextPromptDict


class AsyncEngine:
    """A loaded model whose answers are awaited.

        engine = await AsyncEngine.from_pretrained(model)
        output = await engine.generate("Hello")
        async for output in engine.stream("Hello"): ...

    Cancelling the awaiting task aborts its request and frees all it holds.
    """

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    @property
    def cache(self) -> AsyncCacheControl:
        """What is cached: warm, pin, evict, look up, watch."""
        return AsyncCacheControl(self._frontend)

    @classmethod
    async def from_pretrained(cls, model: str | Any, *, plugins: Sequence[Any] | None = None, **options: Any) -> Self:
        """As `Engine.from_pretrained`, in a worker thread."""
        return cls(await asyncio.to_thread(Frontend, str(model), EngineConfig(**options), plugins))

    async def generate(
        self,
        prompt: str | TextPrompt | TextPromptDict | Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        *,
        apply_chat_template: bool | None = None,
    ) -> RequestOutput:
        """Answer one prompt, or one conversation."""
        last: RequestOutput | None = None
        async for update in self._updates(prompt, sampling_params, False, apply_chat_template):
            last = update
        if last is None:  # pragma: no cover - a request ends with an output or an error
            raise RuntimeError("a request ended without an output")
        return last

    async def chat(
        self, messages: Sequence[Mapping[str, Any]], sampling_params: SamplingParams | None = None
    ) -> RequestOutput:
        """Answer one conversation (OpenAI messages)."""
        return await self.generate(messages, sampling_params)

    def stream(
        self,
        prompt: str | TextPrompt | TextPromptDict | Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        *,
        apply_chat_template: bool | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """The text so far after each token. Leaving the loop (with `aclosing`, or by cancelling) aborts."""
        return self._updates(prompt, sampling_params, True, apply_chat_template)

    async def task(self, name: str, /, **inputs: Any) -> Any:
        """Run one of the family's tasks, as `Engine.task`; what it does between requests is done in a thread."""
        run = await asyncio.to_thread(TaskRun, self._frontend, name, inputs)
        try:
            requests = await _advance(run, ())
            while requests is not None:
                requests = await _advance(run, await self._outcome(requests))
        finally:
            run.close()
        return run.result

    async def tasks(self, name: str, inputs: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Run a task for each of `inputs`, all at once; results and errors as `Engine.tasks`."""
        jobs = [asyncio.ensure_future(self.task(name, **each)) for each in inputs]
        try:
            if jobs:
                await asyncio.wait(jobs)
            return unwrap([_result_of(job) for job in jobs])
        finally:
            await _stop(jobs)

    async def transcribe(self, audio: Any, **options: Any) -> Any:
        """Short form of `task("transcribe", audio=…, **options)`; a list of clips gives a list of results."""
        if isinstance(audio, list):
            return await self.tasks("transcribe", [{"audio": clip, **options} for clip in audio])
        return await self.task("transcribe", audio=audio, **options)

    async def _outcome(self, requests: Sequence[TaskRequest]) -> Outcome:
        """The outputs of a task's requests, or the first error; then the others are aborted."""
        asked = (self.generate(r.prompt, r.params, apply_chat_template=r.apply_chat_template) for r in requests)
        jobs = [asyncio.ensure_future(each) for each in asked]
        try:
            return await asyncio.gather(*jobs)
        except MMError as error:
            return error
        finally:
            await _stop(jobs)

    async def _updates(
        self, prompt: Any, params: SamplingParams | None, stream: bool, apply_chat_template: bool | None
    ) -> AsyncIterator[RequestOutput]:
        loop = asyncio.get_running_loop()
        updates: asyncio.Queue[RequestOutput | MMError] = asyncio.Queue()

        def listener(update: RequestOutput | MMError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(updates.put_nowait, update)

        request_id = self._frontend.add(
            prompt,
            SamplingParams() if params is None else params,
            listener,
            stream=stream,
            apply_chat_template=apply_chat_template,
        )
        try:
            while True:
                update = await updates.get()
                if isinstance(update, MMError):
                    raise update
                yield update
                if update.finished:
                    return
        finally:
            self._frontend.abort(request_id)

    async def stats(self) -> dict[str, Any]:
        """Counters, as `Engine.stats`."""
        return await asyncio.to_thread(self._frontend.stats)

    def timeline(self) -> list[Span]:
        """What ran when, as `Engine.timeline`."""
        return self._frontend.timeline()

    async def close(self) -> None:
        """Abort what runs and release the memory."""
        await asyncio.to_thread(self._frontend.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def _advance(run: TaskRun, outcome: Outcome) -> list[TaskRequest] | None:
    """A task's next step, in a thread. Whoever stops waiting waits for its end: it cannot be closed before."""
    step = asyncio.ensure_future(asyncio.to_thread(run.advance, outcome))
    try:
        return await asyncio.shield(step)
    except asyncio.CancelledError:
        await asyncio.gather(step, return_exceptions=True)
        raise


async def _stop(jobs: Sequence[asyncio.Future[Any]]) -> None:
    """Cancel what still runs, and wait until it let go of what it holds."""
    for job in jobs:
        job.cancel()
    await asyncio.gather(*jobs, return_exceptions=True)


def _result_of(job: asyncio.Future[Any]) -> Any:
    """A result, or the MMError in its place."""
    try:
        return job.result()
    except MMError as error:
        return error
