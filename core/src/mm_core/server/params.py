"""From a body's fields to SamplingParams: names, ceilings, and what an answer has to match."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from mm_core.config import SamplingParams, StructuredOutput
from mm_core.errors import InvalidParamsError, NotFoundError
from mm_core.server.config import MediaConfig, ServerConfig
from mm_core.server.context import Call, ServerContext
from mm_core.server.protocol.chat import ChatRequest, PlainFormat, RegexFormat, SchemaFormat
from mm_core.server.protocol.common import SamplingFields, StructuredOutputs
from mm_core.server.protocol.completions import DEFAULT_MAX_TOKENS, CompletionRequest
from mm_core.server.salts import combine

# Fields that SamplingParams has by the same names.
_SAME = (
    "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "min_tokens",
    "logit_bias",
)  # fmt: skip
MAX_KWARGS_CHARS = 4096


def check_model(given: str, context: ServerContext) -> None:
    """Raise NotFoundError unless `given` is the served model's name."""
    if given != context.model_name:
        raise NotFoundError(
            f"The model that was asked for is not served here; {context.model_name!r} is.",
            param="model",
            code="model_not_found",
        )


def chat_params(body: ChatRequest, config: ServerConfig) -> SamplingParams:
    """SamplingParams of a chat. Raises InvalidParamsError."""
    asked = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    values = _values(body, asked, config.max_completion_tokens)
    if body.logprobs:
        values["logprobs"] = body.top_logprobs or 0
    return _with_structure(values, _chat_structure(body))


def completion_params(body: CompletionRequest, config: ServerConfig) -> SamplingParams:
    """SamplingParams of a completion. Raises InvalidParamsError."""
    ceiling = config.max_completion_tokens
    default = DEFAULT_MAX_TOKENS if ceiling is None else min(DEFAULT_MAX_TOKENS, ceiling)
    values = _values(body, body.max_tokens, ceiling, default=default)
    if body.logprobs is not None:
        values["logprobs"] = body.logprobs
    return _with_structure(values, _structure(body.structured_outputs))


def _values(
    body: SamplingFields, max_tokens: int | None, ceiling: int | None, default: int | None = None
) -> dict[str, Any]:
    if max_tokens is not None and ceiling is not None and max_tokens > ceiling:
        raise InvalidParamsError(
            f"max_tokens={max_tokens} is above this server's ceiling of {ceiling}.", param="max_tokens"
        )
    values: dict[str, Any] = {name: getattr(body, name) for name in _SAME if getattr(body, name) is not None}
    chosen = default if max_tokens is None else max_tokens
    values["max_tokens"] = ceiling if chosen is None else chosen
    return values


def prompt_options(body: SamplingFields, call: Call, context: ServerContext) -> dict[str, Any]:
    """What prompts take beside text and media. Raises InvalidParamsError."""
    kwargs = body.mm_processor_kwargs
    if kwargs:
        check_processor_kwargs(kwargs, context.config.media)
    return {"mm_processor_kwargs": kwargs or None, "cache_salt": combine(call.caller, body.cache_salt)}


def check_processor_kwargs(kwargs: Mapping[str, Any], media: MediaConfig) -> None:
    """Raise InvalidParamsError where a setting is above the server's ceiling; the rest is for the model's processor
    to check, which knows its options."""
    ceilings = {
        "min_pixels": media.max_image_pixels,
        "max_pixels": media.max_image_pixels,
        "num_frames": media.max_video_frames,
        "min_frames": media.max_video_frames,
        "max_frames": media.max_video_frames,
    }
    if _size(kwargs) > MAX_KWARGS_CHARS:
        raise _bad_kwargs(f"they take more than {MAX_KWARGS_CHARS} characters.")
    for name, value in kwargs.items():
        ceiling = ceilings.get(name)
        if ceiling is not None and isinstance(value, int | float) and not value <= ceiling:
            raise _bad_kwargs(f"{name} is above this server's ceiling of {ceiling}.")


def _size(kwargs: Mapping[str, Any]) -> float:
    try:
        return len(json.dumps(dict(kwargs)))
    except RecursionError:
        return math.inf


def _bad_kwargs(text: str) -> InvalidParamsError:
    return InvalidParamsError(f"mm_processor_kwargs: {text}", param="mm_processor_kwargs")


def _chat_structure(body: ChatRequest) -> dict[str, Any] | None:
    """Fields of a StructuredOutput, of response_format or structured_outputs."""
    own = _structure(body.structured_outputs)
    wanted = _format(body)
    if own is not None and wanted is not None:
        raise InvalidParamsError(
            "response_format and structured_outputs exclude each other. Give one of them.", param="response_format"
        )
    return own if wanted is None else wanted


def _format(body: ChatRequest) -> dict[str, Any] | None:
    wanted = body.response_format
    if wanted is None:
        return None
    if isinstance(wanted, PlainFormat):
        return {"json_object": True} if wanted.type == "json_object" else None
    if isinstance(wanted, SchemaFormat):
        return {"json_schema": wanted.json_schema.schema_ or {}}
    if isinstance(wanted, RegexFormat):
        return {"regex": wanted.pattern}
    return {"choice": tuple(wanted.choices)}


def _structure(given: StructuredOutputs | None) -> dict[str, Any] | None:
    if given is None:
        return None
    fields = {
        "json_schema": given.json_,
        "regex": given.regex,
        "choice": None if given.choice is None else tuple(given.choice),
        "grammar": given.grammar,
    }
    found = {name: value for name, value in fields.items() if value is not None}
    if len(found) != 1:
        raise InvalidParamsError(
            "structured_outputs has exactly one of json, regex, choice and grammar.", param="structured_outputs"
        )
    return found


def _with_structure(values: dict[str, Any], structure: dict[str, Any] | None) -> SamplingParams:
    if structure is not None:
        values["structured"] = StructuredOutput(**structure)
    return SamplingParams(**values)
