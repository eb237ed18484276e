"""/v1/chat/completions: what it takes and what it gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, RootModel, model_validator
from typing_extensions import TypedDict

from mm_core.config import MAX_LOGPROBS
from mm_core.errors import InvalidParamsError
from mm_core.inputs.messages import MAX_MESSAGES, MAX_PARTS
from mm_core.server.protocol.common import (
    BY_SHAPE,
    Body,
    Choices,
    Extras,
    FinishReason,
    Grammar,
    Label,
    List,
    SamplingFields,
    StopReason,
    Text,
    UsageDict,
    Uuid,
    ignored,
    refused,
)


class TextPart(Body):
    """A piece of text."""

    type: Literal["text"]
    text: str


class MediaUrl(Body):
    """Where content is: a `data:` URL, or an address that the server may read."""

    url: Annotated[str, Field(min_length=1)]


class ImageUrl(MediaUrl):
    """A picture's address."""

    detail: Literal["auto"] | None = Field(
        default=None, description="Use min_pixels and max_pixels of mm_processor_kwargs instead."
    )


class AudioData(Body):
    """Sound, encoded and in base64. format: ignored, the content tells."""

    data: Annotated[str, Field(min_length=1)]
    format: Annotated[str, Field(max_length=32)] | None = None


class ImagePart(Body):
    """A picture; null and a uuid: the one that was given under that uuid before."""

    type: Literal["image_url"]
    image_url: ImageUrl | None = None
    uuid: Uuid | None = None


class VideoPart(Body):
    """A video, as `ImagePart`."""

    type: Literal["video_url"]
    video_url: MediaUrl | None = None
    uuid: Uuid | None = None


class AudioUrlPart(Body):
    """Sound, as `ImagePart`."""

    type: Literal["audio_url"]
    audio_url: MediaUrl | None = None
    uuid: Uuid | None = None


class AudioPart(Body):
    """Sound in the body, as `ImagePart`."""

    type: Literal["input_audio"]
    input_audio: AudioData | None = None
    uuid: Uuid | None = None


Part = Annotated[TextPart | ImagePart | VideoPart | AudioUrlPart | AudioPart, Field(discriminator="type")]
TextParts = Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]
Parts = Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]
Content = Annotated[Annotated[str, Text] | Annotated[Parts, List], BY_SHAPE]
TextContent = Annotated[Annotated[str, Text] | Annotated[TextParts, List], BY_SHAPE]
_NO_TOOLS = "Tools are not supported."


class _Message(Body):
    name: Label | None = ignored()

    def plain(self) -> dict[str, Any]:
        """Role and content, as the engine takes them."""
        kept = ("role", "content")
        return {name: value for name, value in self.model_dump(exclude_unset=True).items() if name in kept}


class UserMessage(_Message):
    """What the user says and shows."""

    role: Literal["user"]
    content: Content


class SystemMessage(_Message):
    """What the user does not say; media belong to users."""

    role: Literal["system"]
    content: TextContent


class DeveloperMessage(_Message):
    """The same, by its newer name."""

    role: Literal["developer"]
    content: TextContent


class ToolMessage(_Message):
    """A tool's result, put into the prompt as text."""

    role: Literal["tool"]
    content: TextContent
    tool_call_id: Label | None = ignored()


class AssistantMessage(_Message):
    """An earlier answer, as this server gave it."""

    role: Literal["assistant"]
    content: TextContent
    refusal: refused("A refusal is not supported. Send it as content.") = None  # type: ignore[valid-type]
    annotations: refused("Annotations are not supported.", or_empty=True) = None  # type: ignore[valid-type]
    audio: refused("Audio of an assistant is not supported.") = None  # type: ignore[valid-type]
    tool_calls: refused(_NO_TOOLS, or_empty=True) = None  # type: ignore[valid-type]
    function_call: refused(_NO_TOOLS, or_empty=True) = None  # type: ignore[valid-type]


Message = Annotated[
    UserMessage | SystemMessage | DeveloperMessage | ToolMessage | AssistantMessage, Field(discriminator="role")
]


class PlainFormat(Body):
    """text: anything goes. json_object: any JSON object."""

    type: Literal["text", "json_object"]


class JsonSchema(Body):
    """A schema with the names that OpenAI's clients give it."""

    name: Label
    schema_: Mapping[str, Any] | None = Field(default=None, alias="schema")
    description: Annotated[str, Field(max_length=4096)] | None = ignored()
    strict: bool | None = ignored("A schema is always kept to.")


class SchemaFormat(Body):
    """An answer that fits a JSON schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class RegexFormat(Body):
    """An answer that matches a regular expression."""

    type: Literal["regex"]
    pattern: Grammar


class ChoiceFormat(Body):
    """An answer that is one of these."""

    type: Literal["choice"]
    choices: Choices


ResponseFormat = Annotated[PlainFormat | SchemaFormat | RegexFormat | ChoiceFormat, Field(discriminator="type")]
_TEMPLATE = "The model's own chat template is always used, and cannot be changed by a call. Leave this field out."


class ChatRequest(SamplingFields):
    """A conversation to answer."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = Field(
        default=None, description="As max_completion_tokens, which is its newer name."
    )
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = Field(
        default=None, description="Tokens of one answer; null: as far as the model's context and the server go."
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(
        default=None, description="Needs logprobs: true."
    )
    response_format: ResponseFormat | None = None
    metadata: Annotated[dict[Label, Label], Field(max_length=16)] | None = ignored()
    store: bool | None = ignored("Nothing is stored.")
    service_tier: Literal["auto", "default"] | None = ignored()
    safety_identifier: Label | None = ignored()
    prompt_cache_key: Label | None = ignored("Reuse needs no key.")
    parallel_tool_calls: bool | None = ignored()
    tool_choice: Literal["none"] | None = ignored("Tools are not supported.")
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = ignored("Answers are text.")
    tools: refused(_NO_TOOLS, or_empty=True) = None  # type: ignore[valid-type]
    functions: refused(_NO_TOOLS, or_empty=True) = None  # type: ignore[valid-type]
    function_call: refused(_NO_TOOLS, or_empty=True) = None  # type: ignore[valid-type]
    audio: refused("Answers are text: audio is not supported.") = None  # type: ignore[valid-type]
    prediction: refused("Predicted outputs are not supported.") = None  # type: ignore[valid-type]
    web_search_options: refused("Searching the web is not supported.") = None  # type: ignore[valid-type]
    chat_template: refused(_TEMPLATE) = None  # type: ignore[valid-type]
    chat_template_kwargs: refused(_TEMPLATE) = None  # type: ignore[valid-type]
    add_generation_prompt: refused(_TEMPLATE) = None  # type: ignore[valid-type]
    continue_final_message: refused(_TEMPLATE) = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise InvalidParamsError(
                "max_tokens and max_completion_tokens differ. Give one of them.", param="max_tokens"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidParamsError("top_logprobs needs logprobs: true.", param="top_logprobs")
        return self


class TopLogprobDict(TypedDict):
    """One token's log-probability. bytes: null where the token alone is no whole character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobDict(TopLogprobDict):
    """A token of the answer, with the most likely ones in its place."""

    top_logprobs: list[TopLogprobDict]


class LogprobsDict(TypedDict):
    """One entry a token of the content."""

    content: list[TokenLogprobDict]
    refusal: None


class MessageDict(TypedDict):
    """The answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoiceDict(TypedDict):
    """One of the n answers. stop_reason: the stop string, or token, that ended it."""

    index: int
    message: MessageDict
    logprobs: LogprobsDict | None
    finish_reason: FinishReason
    stop_reason: StopReason
    token_ids: NotRequired[list[int]]


class ChatReplyDict(Extras):
    """The whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoiceDict]
    usage: UsageDict
    prompt_token_ids: NotRequired[list[int]]


class DeltaDict(TypedDict):
    """What is new of an answer."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]


class ChunkChoiceDict(TypedDict):
    """What is new of one of the n answers."""

    index: int
    delta: DeltaDict
    logprobs: LogprobsDict | None
    finish_reason: FinishReason | None
    stop_reason: NotRequired[StopReason]
    token_ids: NotRequired[list[int]]


class ChatChunkDict(Extras):
    """One event of a stream. usage: of the last one before [DONE] where stream_options ask for it, null before."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoiceDict]
    usage: NotRequired[UsageDict | None]
    prompt_token_ids: NotRequired[list[int]]


class ChatReply(RootModel[ChatReplyDict]):
    """The whole answer."""


class ChatChunk(RootModel[ChatChunkDict]):
    """One event of a stream."""
