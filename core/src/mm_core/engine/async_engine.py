"""AsyncEngine: the same engine for asyncio programs."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from mm_core.config import EngineConfig, SamplingParams
from mm_core.engine.cache import AsyncCacheControl
from mm_core.engine.frontend import Frontend
from mm_core.engine.health import EngineHealth, ModelInfo
from mm_core.engine.tasks import Outcome, TaskRun, unwrap
from mm_core.errors import MMError
from mm_core.media.audio import Audio
from mm_core.tracing import Span
from mm_core.types import RequestOutput, TaskOptions, TaskRequest, TextPrompt, TextPromptDict


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
        allow_paths: bool = True,
    ) -> RequestOutput:
        """Answer one prompt, or one conversation. allow_paths: as in `stream`."""
        last: RequestOutput | None = None
        async for update in self._updates(prompt, sampling_params, False, apply_chat_template, allow_paths):
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
        allow_paths: bool = True,
        latest: bool = False,
    ) -> AsyncIterator[RequestOutput]:
        """The text so far after each token. Leaving the loop (with `aclosing`, or by cancelling) aborts.

        latest: a reader slower than the engine gets the newest update, not each (all hold the whole text).
        allow_paths=False: media given as str must be `data:` URLs (prompts that come from a network).
        """
        return self._updates(prompt, sampling_params, True, apply_chat_template, allow_paths, latest)

    async def task(self, name: str, options: TaskOptions | None = None, /, **inputs: Any) -> Any:
        """Run one of the family's tasks, as `Engine.task`; what it does between requests is done in a thread.
        The listeners of `options` are called in the event loop."""
        options = _told_here(options or TaskOptions())
        run = await asyncio.to_thread(TaskRun, self._frontend, name, inputs, options)
        try:
            requests = await _advance(run, ())
            while requests is not None:
                requests = await _advance(run, await self._outcome(requests, options.allow_paths))
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

    async def _outcome(self, requests: Sequence[TaskRequest], allow_paths: bool) -> Outcome:
        """The outputs of a task's requests, or the first error; then the others are aborted."""
        asked = (
            self.generate(r.prompt, r.params, apply_chat_template=r.apply_chat_template, allow_paths=allow_paths)
            for r in requests
        )
        jobs = [asyncio.ensure_future(each) for each in asked]
        try:
            return await asyncio.gather(*jobs)
        except MMError as error:
            return error
        finally:
            await _stop(jobs)

    async def _updates(
        self,
        prompt: Any,
        params: SamplingParams | None,
        stream: bool,
        apply_chat_template: bool | None,
        allow_paths: bool = True,
        latest: bool = False,
    ) -> AsyncIterator[RequestOutput]:
        loop = asyncio.get_running_loop()
        updates = _Updates(latest)

        def listener(update: RequestOutput | MMError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                updates.put(update, loop)

        request_id = self._frontend.add(
            prompt,
            SamplingParams() if params is None else params,
            listener,
            stream=stream,
            apply_chat_template=apply_chat_template,
            allow_paths=allow_paths,
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

    async def warm_grammars(self) -> None:
        """Do now what the first request with structured output would wait for, about a second. Raises MMError."""
        await asyncio.to_thread(self._frontend.pipeline.warm_grammars)

    @property
    def info(self) -> ModelInfo:
        """What is loaded."""
        return self._frontend.info

    @property
    def config(self) -> EngineConfig:
        """The settings it was made with."""
        return self._frontend.config

    @property
    def num_started(self) -> int:
        """Requests that have a token and have not ended."""
        return self._frontend.num_started

    def health(self, stall_timeout_s: float = 30.0) -> EngineHealth:
        """How the engine's loop does; costs nothing."""
        return self._frontend.health(stall_timeout_s)

    async def tokenize(self, prompt: Any, *, apply_chat_template: bool | None = None) -> list[int]:
        """A prompt's (or conversation's) ids, one placeholder for each item of media."""
        return await asyncio.to_thread(self._frontend.pipeline.tokenize, prompt, apply_chat_template)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of ids, special tokens shown. Raises InvalidPromptError for ids outside the vocabulary."""
        return await asyncio.to_thread(self._frontend.detokenize, token_ids)

    async def decode_audio(self, data: bytes) -> Audio:
        """A recording's samples within the engine's ceilings, at the rate that the model hears: for tasks on media
        from a network. Raises MediaError and its kinds."""
        return await asyncio.wrap_future(self._frontend.pipeline.decode_audio(data))

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


class _Updates:
    """A request's updates between the engine's threads and its reader; of those that wait, only the newest where
    latest is set. The reader's loop is woken once for all that came before it looks."""

    def __init__(self, latest: bool) -> None:
        self._waiting: deque[RequestOutput | MMError] = deque(maxlen=1 if latest else None)
        self._ready = asyncio.Event()
        self._woken = False

    def put(self, update: RequestOutput | MMError, loop: asyncio.AbstractEventLoop) -> None:
        self._waiting.append(update)
        if not self._woken:
            self._woken = True
            loop.call_soon_threadsafe(self._ready.set)

    async def get(self) -> RequestOutput | MMError:
        while True:
            self._woken = False  # before the look: what is put behind it wakes
            if self._waiting:
                return self._waiting.popleft()
            self._ready.clear()
            if not self._waiting:
                await self._ready.wait()


def _told_here(options: TaskOptions) -> TaskOptions:
    """The options of a task that runs in threads: its listeners are called in the running loop, before its end."""
    loop = asyncio.get_running_loop()

    def passed_on(listener: Callable[[Any], None] | None) -> Callable[[Any], None] | None:
        def pass_on(value: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(listener, value)  # type: ignore[arg-type]

        return None if listener is None else pass_on

    return replace(options, on_progress=passed_on(options.on_progress), on_output=passed_on(options.on_output))


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
