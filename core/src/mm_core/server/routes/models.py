"""/v1/models, /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from mm_core.errors import InvalidPromptError, NotFoundError
from mm_core.inputs.messages import ChatPrompt
from mm_core.server.body import read_model
from mm_core.server.context import ServerContext, context_of
from mm_core.server.failures import json_reply
from mm_core.server.protocol.chat import Message
from mm_core.server.protocol.common import Body, TokenId
from mm_core.server.routing import Route
from mm_core.types import TextPrompt

MAX_TOKENS = 2**20


class ModelCard(BaseModel):
    """One model, as OpenAI shows it, with what it reads and how far its context goes."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mm-core"
    root: str
    max_model_len: int
    family: str
    modalities: list[str]
    tasks: list[str]


class ModelList(BaseModel):
    """All models: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeRequest(Body):
    """A text, or a conversation with its chat template. An item of media counts as one placeholder."""

    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    prompt: Annotated[str, Field(min_length=1)] | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)] | None = None
    return_token_strs: bool | None = Field(default=None, description="Also the text of each token.")


class TokenizeReply(BaseModel):
    """The prompt's ids, how many, and how many a request may have with its answer."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    """Ids to make text of."""

    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS, fail_fast=True)]


class DetokenizeReply(BaseModel):
    """Their text, special tokens shown."""

    prompt: str


async def tokenize(request: Request) -> Response:
    """The ids of a text (special tokens parsed, as /v1/completions does), or of a conversation."""
    body = await read_model(request, TokenizeRequest)
    context = context_of(request)
    check_model(context, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidPromptError("Give exactly one of prompt and messages.", param="prompt")
    if body.messages is None:
        ids = await context.engine.tokenize(TextPrompt(prompt=body.prompt))
    else:
        ids = await context.engine.tokenize(ChatPrompt([message.plain() for message in body.messages]))
    texts = None
    if body.return_token_strs:
        known = {each: await context.engine.detokenize([each]) for each in set(ids)}
        texts = [known[each] for each in ids]
    reply = TokenizeReply(tokens=ids, count=len(ids), max_model_len=context.engine.info.max_model_len, token_strs=texts)
    return json_reply(reply.model_dump())


async def detokenize(request: Request) -> Response:
    """The text of ids."""
    body = await read_model(request, DetokenizeRequest)
    context = context_of(request)
    check_model(context, body.model)
    return json_reply(DetokenizeReply(prompt=await context.engine.detokenize(body.tokens)).model_dump())


async def list_models(request: Request) -> Response:
    """The model that is served."""
    return json_reply(ModelList(data=[_card(context_of(request))]).model_dump())


async def show_model(request: Request) -> Response:
    """The model of that name; 404 for any other."""
    context = context_of(request)
    check_model(context, request.path_params["model_id"], "model_id")
    return json_reply(_card(context).model_dump())


def check_model(context: ServerContext, name: str | None, param: str = "model") -> None:
    """Raises NotFoundError "model_not_found" for a model that is not served; None stands for the one that is."""
    if name is not None and name != context.model_name:
        raise NotFoundError("This server has no such model; GET /v1/models lists what it has.", param=param,
                            code="model_not_found")  # fmt: skip


def _card(context: ServerContext) -> ModelCard:
    info = context.engine.info
    return ModelCard(
        id=context.model_name,
        created=context.created,
        root=info.family,
        max_model_len=info.max_model_len,
        family=info.family,
        modalities=list(info.modalities),
        tasks=list(info.tasks),
    )


ROUTES = (
    Route("/v1/models", "GET", list_models, None, {200: ModelList}, "The models"),
    Route("/v1/models/{model_id:path}", "GET", show_model, None, {200: ModelCard}, "One model"),
    Route("/tokenize", "POST", tokenize, TokenizeRequest, {200: TokenizeReply}, "Ids of a prompt"),
    Route("/detokenize", "POST", detokenize, DetokenizeRequest, {200: DetokenizeReply}, "Text of ids"),
)
