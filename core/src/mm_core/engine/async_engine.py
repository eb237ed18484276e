"""AsyncEngine: the same engine for asyncio programs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from mm_core.config import EngineConfig, SamplingParams
from mm_core.engine.frontend import Frontend
from mm_core.errors import MMError
from mm_core.tracing import Span
from mm_core.types import RequestOutput, TextPrompt, TextPromptDict


class AsyncEngine:
    """A loaded model whose answers are awaited.

        engine = await AsyncEngine.from_pretrained(model)
        output = await engine.generate("Hello")
        async for output in engine.stream("Hello"): ...

    Cancelling the awaiting task aborts its request and frees all it holds.
    """

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

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
