"""/v1/completions: what it takes and what it gives."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Discriminator, Field, RootModel, Tag, model_validator
from typing_extensions import TypedDict

from mm_core.config import MAX_LOGPROBS
from mm_core.errors import InvalidParamsError
from mm_core.inputs.messages import MAX_PARTS
from mm_core.server.protocol.common import (
    Extras,
    FinishReason,
    SamplingFields,
    StopReason,
    TokenId,
    UsageDict,
    Uuid,
    refused,
)

MAX_ANSWERS = 128
DEFAULT_MAX_TOKENS = 16

Modality = Literal["image", "video", "audio"]
Url = Annotated[str, Field(min_length=1)]
Urls = Annotated[list[Url | None], Field(max_length=MAX_PARTS, fail_fast=True)]
Uuids = Annotated[list[Uuid | None], Field(max_length=MAX_PARTS, fail_fast=True)]
Ids = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_ANSWERS, fail_fast=True)]
ManyIds = Annotated[list[Ids], Field(min_length=1, max_length=MAX_ANSWERS, fail_fast=True)]


def _shape(value: Any) -> str:
    """What a prompt is to be read as; the brackets keep the name out of error messages."""
    if not isinstance(value, list):
        return "(text)"
    first = value[0] if value else 0
    return "(texts)" if isinstance(first, str) else "(lists)" if isinstance(first, list) else "(ids)"


Prompt = Annotated[
    Annotated[str, Tag("(text)")]
    | Annotated[Ids, Tag("(ids)")]
    | Annotated[Texts, Tag("(texts)")]
    | Annotated[ManyIds, Tag("(lists)")],
    Discriminator(_shape),
]


class CompletionRequest(SamplingFields):
    """Prompts to go on with, as they are: special tokens are read as such, and no chat template is applied, but to a
    prompt with media and without placeholders."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = Field(
        default=None, description=f"Tokens of one answer; null: {DEFAULT_MAX_TOKENS}."
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = Field(default=None, description="Begin the text with the prompt; excludes logprobs.")
    multi_modal_data: dict[Modality, Url | Urls] | None = Field(
        default=None,
        description="Media of the one prompt: a data: URL, or an address that the server may read, or a list; null "
        "in a list stands for what was given under the uuid before.",
    )
    multi_modal_uuids: dict[Modality, Uuid | Uuids] | None = Field(
        default=None, description="Names of the media, as many as there are."
    )
    suffix: refused("suffix is not supported: the model cannot fill gaps.") = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.num_prompts * (self.n or 1) > MAX_ANSWERS:
            raise InvalidParamsError(f"Prompts times n is at most {MAX_ANSWERS}. Send several calls.", param="prompt")
        if self.echo and self.logprobs is not None:
            raise InvalidParamsError("echo with logprobs is not supported. Leave one of them out.", param="echo")
        if (self.multi_modal_data or self.multi_modal_uuids) and self.num_prompts > 1:
            raise InvalidParamsError("A call with media has one prompt. Send several calls.", param="prompt")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """All prompts, as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        first = self.prompt[0]
        return [self.prompt] if isinstance(first, int) else self.prompt  # type: ignore[return-value]

    @property
    def num_prompts(self) -> int:
        """How many there are."""
        return len(self.prompts)


class LegacyLogprobsDict(TypedDict):
    """Lists with one entry a token. text_offset: where it begins, in characters of the text."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float]] | None


class CompletionChoiceDict(TypedDict):
    """One answer, or what is new of it; index: that of its prompt times n, plus its own among the prompt's n."""

    index: int
    text: str
    logprobs: LegacyLogprobsDict | None
    finish_reason: FinishReason | None
    stop_reason: NotRequired[StopReason]
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]


class CompletionReplyDict(Extras):
    """The whole reply, or one event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoiceDict]
    usage: NotRequired[UsageDict | None]


class CompletionReply(RootModel[CompletionReplyDict]):
    """The whole reply, or one event of a stream."""
