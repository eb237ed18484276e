"""What chat and completions share: sampling fields, grammars, usage, and how a body is read: strictly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from mm_core.config import (
    MAX_LOGIT_BIAS,
    MAX_N,
    MAX_SEED,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
)
from mm_core.errors import InvalidParamsError

MAX_CHOICES = 1024
MAX_GRAMMAR_CHARS = 2**18
MAX_IGNORED_CHARS = 512


class Body(BaseModel):
    """Base of all bodies: strict types (true is not 1, "3" is not 3), no NaN, no unknown names. Null is the default."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


def refused(why: str, *, or_empty: bool = False) -> Any:
    """The type of a field that OpenAI's API has and this server has not: null (or an empty list), else `why`."""

    def check(value: Any) -> None:
        if value is not None and not (or_empty and value == []):
            raise PydanticCustomError("not_supported", "{why}", {"why": why})

    null = {"type": "null"}
    schema: dict[str, Any] = {"anyOf": [null, {"type": "array", "maxItems": 0}]} if or_empty else dict(null)
    return Annotated[None, BeforeValidator(check), WithJsonSchema({**schema, "description": why})]


def ignored(more: str = "") -> Any:
    """The default of a field that is taken without effect."""
    return Field(default=None, description=f"Taken, and without effect. {more}".strip())


def text_or_list(value: Any) -> str:
    """Which of the two a value is to be read as; the brackets keep the name out of error messages."""
    return "(list)" if isinstance(value, list | tuple) else "(text)"


BY_SHAPE = Discriminator(text_or_list)  # a text or a list: told from the value alone, so that errors are about that one
Text = Tag("(text)")
List = Tag("(list)")

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)]
Stop = Annotated[Annotated[StopString, Text] | Annotated[StopStrings, List], BY_SHAPE]
BiasKey = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]
Bias = Annotated[float, Field(ge=-100.0, le=100.0)]
Label = Annotated[str, Field(max_length=MAX_IGNORED_CHARS)]
Grammar = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)]
Choice = Annotated[str, Field(min_length=1, max_length=4096)]
Choices = Annotated[list[Choice], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
Uuid = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")]
Salt = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]


class StreamOptions(Body):
    """What a stream tells beside the text."""

    include_usage: bool | None = Field(default=None, description="One more chunk at the end, with the usage.")
    continuous_usage_stats: bool | None = Field(default=None, description="The usage so far in every chunk.")
    include_obfuscation: bool | None = ignored()


class StructuredOutputs(Body):
    """What an answer has to match; exactly one of the four."""

    json_: Grammar | Mapping[str, Any] | None = Field(default=None, alias="json", description="A JSON schema.")
    regex: Grammar | None = None
    choice: Choices | None = None
    grammar: Grammar | None = Field(default=None, description="In the notation of llguidance (Lark's).")


class SamplingFields(Body):
    """How tokens are chosen, and how the answer comes."""

    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0.0, le=10.0)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None
    logit_bias: Annotated[dict[BiasKey, Bias], Field(max_length=MAX_LOGIT_BIAS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    return_token_ids: bool | None = Field(default=None, description="Also the ids of the prompt and of each answer.")
    mm_processor_kwargs: Mapping[str, Any] | None = Field(
        default=None, description="Settings of the model's processor, up to the server's ceilings."
    )
    cache_salt: Salt | None = Field(default=None, description="Only calls with the same salt share cached work.")
    user: Label | None = ignored()
    best_of: refused("best_of is not supported. Use n, and choose among the answers.") = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidParamsError("stream_options needs stream: true.", param="stream_options")
        return self


class TokenDetails(TypedDict):
    """What of a prompt was not computed anew. cached_tokens: from the KV cache. media_tokens: of the prompt stand for
    media; encoded_media_tokens of them were encoded for this call."""

    cached_tokens: int
    media_tokens: int
    encoded_media_tokens: int


class UsageDict(TypedDict):
    """Token counts of a call, over all its prompts and answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: TokenDetails


class ReuseDict(TypedDict):
    """What was reused, and how long it took (this server's own addition to OpenAI's replies).

    cached_tokens: of the prompt, from the KV cache. media_tokens: of the prompt; encoder_hit_tokens of them needed no
    encoding. ttft_ms: from the call's arrival to the first token. total_ms: to the last one. tokens_per_second: of
    all answers together, from the first token on; null for a single token.
    """

    cached_tokens: int
    media_tokens: int
    encoder_hit_tokens: int
    ttft_ms: float | None
    total_ms: float | None
    tokens_per_second: float | None


class Extras(TypedDict):
    """Additions of this server to a reply. warnings: what of the media could not be used; absent if all could."""

    mm: NotRequired[ReuseDict]
    warnings: NotRequired[list[str]]


FinishReason = Literal["stop", "length"]
StopReason = str | int | None
