"""/v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import Response

from mm_core.config import SamplingParams
from mm_core.inputs.messages import ChatPrompt
from mm_core.server.body import read_model
from mm_core.server.context import Call, ServerContext, call_of, context_of
from mm_core.server.intake import points_elsewhere
from mm_core.server.params import chat_params, check_model, prompt_options
from mm_core.server.protocol.chat import ChatReply, ChatRequest
from mm_core.server.protocol.common import SamplingFields
from mm_core.server.replies import ChatEvents, Shape, chat_reply
from mm_core.server.routing import Route
from mm_core.server.streaming import Ask, EventStream, answers, attend, json_reply, updates

_NAMES = dict.fromkeys(("multi_modal_data", "multi_modal_uuids", "prompt"), "messages")


async def chat(request: Request) -> Response:
    """Answer a conversation."""
    context, call = context_of(request), call_of(request)
    body = await read_model(request, ChatRequest)
    check_model(body.model, context)
    params = chat_params(body, context.config)
    ask = _ask(body, context, call)
    shape = shape_of("chatcmpl", body, body.model, params, call)
    if body.stream:
        return EventStream(_events(context, call, ask, shape), call, context.config.request_timeout_s)
    (output,) = await attend(answers(context, call, [ask], params), call, context.config.request_timeout_s)
    return json_reply(chat_reply(output, shape, call), call)


def _ask(body: ChatRequest, context: ServerContext, call: Call) -> Ask:
    options = prompt_options(body, call, context)
    messages = [message.plain() for message in body.messages]
    parts = [part for message in messages if isinstance(content := message.get("content"), list) for part in content]

    async def make() -> ChatPrompt:
        return ChatPrompt(await context.intake.read_messages(messages, call), **options)

    structured = "structured_outputs" if body.response_format is None else "response_format"
    return Ask(make, points_elsewhere(parts), _NAMES | {"structured": structured})


async def _events(context: ServerContext, call: Call, ask: Ask, shape: Shape) -> AsyncGenerator[bytes, None]:
    events, output = ChatEvents(shape, call), None
    async with aclosing(updates(context, call, [ask], shape.params)) as outputs:
        async for _, output in outputs:
            yield events.update(output)
    if output is not None:
        yield events.end(output)


def shape_of(kind: str, body: SamplingFields, model: str, params: SamplingParams, call: Call) -> Shape:
    """What the reply to a body holds."""
    options = body.stream_options
    continuous = bool(options and options.continuous_usage_stats)
    return Shape(
        id=f"{kind}-{call.request_id.removeprefix('req-')}",
        model=model,
        created=int(time.time()),
        params=params,
        usage=continuous or bool(options and options.include_usage),
        continuous=continuous,
        token_ids=bool(body.return_token_ids),
    )


ROUTES = (
    Route(
        "/v1/chat/completions",
        "POST",
        chat,
        request_model=ChatRequest,
        replies={200: (ChatReply, "text/event-stream")},
        summary="Answer a conversation with text, pictures, sound and videos in it",
    ),
)
