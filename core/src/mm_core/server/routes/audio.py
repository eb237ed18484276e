"""/v1/audio/transcriptions and /v1/audio/translations: the family's task "transcribe", over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from mm_core.errors import (
    BodyTooLargeError,
    ClientTimeoutError,
    MediaError,
    NotFoundError,
    RequestAbortedError,
    RequestError,
)
from mm_core.server.config import ServerConfig
from mm_core.server.context import Call, ServerContext, call_of, context_of
from mm_core.server.logs import log_asked
from mm_core.server.multipart import Form, FormLimits, read_form
from mm_core.server.params import check_model
from mm_core.server.protocol.audio import (
    FILE,
    MIME,
    AudioRequest,
    TextDelta,
    TextDone,
    TokenUsage,
    Transcript,
    VerboseTranscript,
    as_json,
    as_text,
    read_request,
    read_result,
)
from mm_core.server.replies import DONE, event
from mm_core.server.routing import Route
from mm_core.server.salts import combine
from mm_core.server.streaming import EventStream, attend, json_reply, warning_headers
from mm_core.types import RequestOutput, TaskOptions

Task = Literal["transcribe", "translate"]
_TASK = "transcribe"
_CUT_OFF = "The recording is cut off: its file announces more than it holds. What is there was heard."
# What a task calls its arguments → what the form calls them.
_NAMES = {"audio": FILE, "multi_modal_data": FILE, "initial_prompt": "prompt"}


async def transcriptions(request: Request) -> Response:
    """What is said in a recording, in its own language."""
    return await _reply(request, "transcribe")


async def translations(request: Request) -> Response:
    """What is said in a recording, in English."""
    return await _reply(request, "translate")


async def _reply(request: Request, task: Task) -> Response:
    context, call = context_of(request), call_of(request)
    _check_task(context)
    asked = read_request(await _form(request, context.config))
    check_model(asked.model, context)
    if context.config.log_prompts:
        log_asked(call.request_id, asked.model_dump(exclude={FILE}, exclude_none=True))
    hearing = _Hearing(context, call, asked, task)
    limit = context.config.request_timeout_s
    if asked.stream:
        return EventStream(_events(hearing), call, limit)
    heard = await attend(hearing.run(), call, limit)
    if asked.response_format in MIME:
        text = as_text(heard, asked.response_format)
        return Response(text, headers={"content-type": MIME[asked.response_format], **warning_headers(call)})
    return json_reply(as_json(heard, asked.response_format), call)


def _check_task(context: ServerContext) -> None:
    info = context.engine.info
    if _TASK not in info.tasks:
        reads = " and ".join(("text", *info.modalities))
        raise NotFoundError(
            f"The model {context.model_name!r} does not transcribe. It reads {reads}, and answers at "
            "/v1/chat/completions.",
            param="model",
            code="task_not_supported",
        )


async def _form(request: Request, config: ServerConfig) -> Form:
    """The call's form, in time and within all ceilings."""
    limits = FormLimits(file_bytes=config.media.max_part_bytes)
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > config.max_body_bytes:
        raise _too_large(config.max_body_bytes)
    chunks = _counted(request.stream(), config.max_body_bytes)
    try:
        async with asyncio.timeout(config.body_timeout_s):
            return await read_form(chunks, request.headers.get("content-type"), limits)
    except TimeoutError:
        raise ClientTimeoutError(f"The body did not arrive within {config.body_timeout_s:g} s.") from None
    except ClientDisconnect:
        raise RequestAbortedError("The client closed the connection before the end of its call.") from None


async def _counted(chunks: AsyncIterator[bytes], limit: int) -> AsyncIterator[bytes]:
    size = 0
    async for chunk in chunks:
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        yield chunk


def _too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"The body is larger than {limit} bytes.")


@dataclass(eq=False)
class _Hearing:
    """One call's task. usage: of its requests so far."""

    context: ServerContext
    call: Call
    asked: AudioRequest
    task: Task
    usage: TokenUsage = field(default_factory=TokenUsage)

    async def run(self, on_segments: Callable[[Any], None] | None = None) -> VerboseTranscript:
        """From the file to the transcript, inside the gate. on_segments: told each window's as it is understood.
        Raises MMError."""
        call, engine = self.call, self.context.engine
        salt = combine(call.caller, self.asked.cache_salt)
        call.phase = "queue"
        try:
            async with self.context.gate.enter(call):
                call.phase = "prepare"
                sound = await engine.decode_audio(self.asked.file)
                # A small file may hold hours. Twice: the task has a copy of its own.
                self.context.gate.hold(call, 2 * sound.samples.nbytes)
                if sound.cut_off:
                    call.warnings.append(_CUT_OFF)
                call.phase = "decode"
                options = TaskOptions(salt, False, on_segments, self._count)
                result = await engine.task(_TASK, options, audio=(sound.samples, sound.rate), **self._arguments())
        except RequestError as error:
            error.param = _NAMES.get(error.param or "", error.param)
            if isinstance(error, MediaError):
                error.param = FILE
            raise
        return read_result(result, self.task, call.warnings)

    def _arguments(self) -> dict[str, Any]:
        """What the task is told beside the sound; what is left out is the family's choice."""
        asked = self.asked
        given: dict[str, Any] = {"language": asked.language, "initial_prompt": asked.prompt, "seed": asked.seed}
        if self.task == "translate":
            given["task"] = self.task
        if asked.temperature:  # 0 means the family's own ladder, as in OpenAI's API
            given["temperature"] = asked.temperature
        return {name: value for name, value in given.items() if value is not None}

    def _count(self, output: RequestOutput) -> None:
        call, usage, times = self.call, output.usage, output.metrics
        # The call's wait is the first request's; those behind it begin when they are asked.
        later = self.usage.total_tokens > 0
        self.context.metrics.on_output(replace(call, arrival=times.arrival) if times and later else call, output)
        self.usage = self.usage.plus(usage.prompt_tokens, usage.completion_tokens)
        call.prompt_tokens, call.completion_tokens = self.usage.input_tokens, self.usage.output_tokens


async def _events(hearing: _Hearing) -> AsyncGenerator[bytes, None]:
    """The text as it grows, then all of it. Errors before the first event are raised."""
    news: asyncio.Queue[Sequence[Any] | None] = asyncio.Queue()
    job = asyncio.ensure_future(hearing.run(news.put_nowait))
    job.add_done_callback(lambda _: news.put_nowait(None))
    heard, told = "", ""
    try:
        while (segments := await news.get()) is not None:
            heard += "".join(str(segment.text) for segment in segments)
            if text := heard.strip()[len(told) :]:
                told += text
                yield event(TextDelta(delta=text).model_dump())
        result = await job
        if text := result.text.removeprefix(told) if result.text.startswith(told) else "":
            yield event(TextDelta(delta=text).model_dump())
        done = TextDone(text=result.text, usage=hearing.usage, warnings=result.warnings)
        yield event(done.model_dump(exclude_none=True)) + DONE
    finally:
        job.cancel()
        await asyncio.gather(job, return_exceptions=True)


_REPLIES = {
    200: (Transcript, VerboseTranscript, "text/plain", *("application/x-subrip", "text/vtt"), "text/event-stream")
}
_FORM = "multipart/form-data"

ROUTES = (
    Route(
        "/v1/audio/transcriptions", "POST", transcriptions, AudioRequest, _REPLIES, "What is said", request_mime=_FORM
    ),
    Route(
        "/v1/audio/translations",
        "POST",
        translations,
        AudioRequest,
        _REPLIES,
        "The same in English",
        request_mime=_FORM,
    ),
)
