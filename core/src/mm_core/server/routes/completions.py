"""/v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mm_core.errors import InvalidPromptError
from mm_core.server.body import read_model
from mm_core.server.context import Call, ServerContext, call_of, context_of
from mm_core.server.intake import points_elsewhere
from mm_core.server.params import check_model, completion_params, prompt_options
from mm_core.server.protocol.completions import CompletionReply, CompletionRequest
from mm_core.server.replies import CompletionEvents, Shape, completion_reply
from mm_core.server.routes.chat import shape_of
from mm_core.server.routing import Route
from mm_core.server.streaming import Ask, EventStream, answers, attend, json_reply, updates
from mm_core.types import TextPrompt


async def completions(request: Request) -> Response:
    """Go on with prompts."""
    context, call = context_of(request), call_of(request)
    body = await read_model(request, CompletionRequest)
    check_model(body.model, context)
    params = completion_params(body, context.config)
    asks = _asks(body, context, call)
    shape = shape_of("cmpl", body, body.model, params, call)
    echoes = await _echoes(body, context)
    if body.stream:
        events = _events(context, call, asks, CompletionEvents(echoes, shape, call), shape)
        return EventStream(events, call, context.config.request_timeout_s)
    outputs = await attend(answers(context, call, asks, params), call, context.config.request_timeout_s)
    return json_reply(completion_reply(outputs, echoes, shape, call), call)


async def _echoes(body: CompletionRequest, context: ServerContext) -> list[str]:
    """What goes before the answers to each prompt. Raises InvalidPromptError for ids that no text has: logits are often
    wider than the vocabulary."""
    texts = [each if isinstance(each, str) else await _text_of(each, context) for each in body.prompts]
    return texts if body.echo else [""] * len(texts)


async def _text_of(ids: list[int], context: ServerContext) -> str:
    if len(ids) >= context.engine.info.max_model_len:
        return ""  # the engine refuses it
    try:
        return await context.engine.detokenize(ids)
    except InvalidPromptError as error:
        error.param = "prompt"
        raise


def _asks(body: CompletionRequest, context: ServerContext, call: Call) -> list[Ask]:
    """For each prompt, what makes the engine's of it. Raises InvalidPromptError, InvalidParamsError."""
    options = prompt_options(body, call, context)
    data: dict[str, Any] = dict((body.multi_modal_data or {}).items())
    uuids: dict[str, Any] = dict((body.multi_modal_uuids or {}).items())
    if not (data or uuids) and not all(body.prompts):
        raise InvalidPromptError("The prompt is empty. Write some text.", param="prompt")

    urls = [url for given in data.values() for url in (given if isinstance(given, list) else [given])]

    def ask_for(prompt: str | list[int]) -> Ask:
        async def make() -> TextPrompt:
            media: dict[str, Any] = {}
            if data or uuids:
                media["multi_modal_data"] = await context.intake.read_media_data(data, uuids, call)
                media["multi_modal_uuids"] = uuids or None
            if isinstance(prompt, str):
                return TextPrompt(prompt=prompt, **media, **options)
            return TextPrompt(prompt_token_ids=prompt, **media, **options)

        return Ask(make, points_elsewhere(urls), {"structured": "structured_outputs"})

    return [ask_for(prompt) for prompt in body.prompts]


async def _events(
    context: ServerContext, call: Call, asks: Sequence[Ask], events: CompletionEvents, shape: Shape
) -> AsyncGenerator[bytes, None]:
    async with aclosing(updates(context, call, asks, shape.params)) as outputs:
        async for place, output in outputs:
            yield events.update(place, output)
    yield events.end()


ROUTES = (
    Route(
        "/v1/completions",
        "POST",
        completions,
        request_model=CompletionRequest,
        replies={200: (CompletionReply, "text/event-stream")},
        summary="Go on with prompts as they are",
    ),
)
