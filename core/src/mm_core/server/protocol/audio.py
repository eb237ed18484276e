"""Bodies of /v1/audio/transcriptions and /v1/audio/translations: the form, and what comes back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from mm_core.config import MAX_SEED
from mm_core.errors import InvalidBodyError, InvalidParamsError, PluginError
from mm_core.server.body import refuse
from mm_core.server.multipart import Form
from mm_core.server.protocol.common import Body, Salt
from mm_core.server.subtitles import to_srt, to_vtt

MAX_PROMPT_CHARS = 8192
FILE = "file"
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,4})?")
_LISTS = ("timestamp_granularities",)

Format = Literal["json", "text", "srt", "verbose_json", "vtt"]
MIME: dict[str, str] = {
    "text": "text/plain; charset=utf-8",
    "srt": "application/x-subrip; charset=utf-8",
    "vtt": "text/vtt; charset=utf-8",
}


def _value(text: Any) -> Any:
    """A field's text as the number or truth value that it spells, as JSON would; else as it is, to be refused."""
    if text in ("true", "false") or (isinstance(text, str) and _NUMBER.fullmatch(text)):
        return json.loads(text)
    return text


def _without_null(schema: dict[str, Any]) -> None:
    """A form has no null: what may be left out is left out."""
    for field in schema["properties"].values():
        if "anyOf" in field:
            field.update(field.pop("anyOf")[0])
            field.pop("default", None)


class AudioRequest(Body):
    """The form of both routes. Empty fields count as left out."""

    model_config = ConfigDict(loc_by_alias=False, json_schema_extra=_without_null)

    file: Annotated[bytes, WithJsonSchema({"type": "string", "format": "binary"})] = Field(
        description="A recording: WAV, FLAC, Ogg, MP3, or the sound of MP4 and WebM."
    )
    model: str = Field(min_length=1, max_length=1024, description="The served model's name.")
    language: Annotated[str, Field(max_length=64)] | None = Field(
        default=None, description="Of the speech, a code such as en; left out: it is found out."
    )
    prompt: Annotated[str, Field(max_length=MAX_PROMPT_CHARS)] | None = Field(
        default=None, description="Text that is taken to come before: names, spelling, style."
    )
    response_format: Format = "json"
    temperature: Annotated[float, Field(ge=0.0, le=1.0), BeforeValidator(_value)] | None = Field(
        default=None, description="0 or left out: raised by itself where an answer is poor."
    )
    timestamp_granularities: list[Literal["word", "segment"]] | None = Field(
        default=None, alias="timestamp_granularities[]", max_length=2, description="With verbose_json: segment."
    )
    stream: Annotated[bool, BeforeValidator(_value)] | None = Field(
        default=None, description="Events as each part of the recording is understood; with json or text."
    )
    seed: Annotated[int, Field(ge=0, le=MAX_SEED), BeforeValidator(_value)] | None = None
    cache_salt: Salt | None = Field(default=None, description="Only calls with the same salt share cached work.")


def read_request(form: Form) -> AudioRequest:
    """A form's values. Raises InvalidBodyError, and InvalidParamsError for values that do not go together."""
    values: dict[str, Any] = dict(form.files)
    for name, texts in form.fields.items():
        plain = name.removesuffix("[]")
        if plain in _LISTS:
            values.setdefault(f"{plain}[]", []).extend(text for text in texts if text)
        elif len(texts) > 1:
            raise InvalidBodyError(f"{name[:40]!r} is given {len(texts)} times. Send it once.", param=name[:40])
        elif texts[0] or name not in AudioRequest.model_fields:
            values[name] = texts[0]
    if FILE not in values:
        raise InvalidBodyError("There is no 'file'. Send the recording as the form's file.", param=FILE)
    try:
        asked = AudioRequest.model_validate(values)
    except ValidationError as error:
        refuse(error)
    _check_together(asked)
    return asked


def _check_together(asked: AudioRequest) -> None:
    granularities = asked.timestamp_granularities or []
    if "word" in granularities:
        raise InvalidParamsError(
            "The model tells when segments are said, not when each word is. Ask for segment, or leave it out.",
            param="timestamp_granularities",
        )
    if granularities and asked.response_format != "verbose_json":
        raise InvalidParamsError(
            "timestamp_granularities needs response_format=verbose_json.", param="timestamp_granularities"
        )
    if asked.stream and asked.response_format not in ("json", "text"):
        raise InvalidParamsError(
            f"A stream is of plain text: {asked.response_format} is known at the end only. Leave stream out, or "
            "response_format.",
            param="stream",
        )


class DurationUsage(BaseModel):
    """What was heard, in seconds."""

    type: Literal["duration"] = "duration"
    seconds: float


class TokenUsage(BaseModel):
    """Tokens over all of a call's requests: each window's, those asked again, and that for the language."""

    type: Literal["tokens"] = "tokens"
    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0

    def plus(self, prompt: int, completion: int) -> TokenUsage:
        """With one more request's."""
        read, said = self.input_tokens + prompt, self.output_tokens + completion
        return TokenUsage(input_tokens=read, output_tokens=said, total_tokens=read + said)


class Segment(BaseModel):
    """A piece of speech, from `start` to `end` in seconds. What the model does not tell is null; `seek` is the window
    it was heard in, in hundredths of a second."""

    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: list[int]
    temperature: float | None
    avg_logprob: float | None
    compression_ratio: float | None
    no_speech_prob: float | None


class Transcript(BaseModel):
    """response_format=json. warnings: what of the recording could not be used; absent if all could."""

    text: str
    usage: DurationUsage
    warnings: list[str] | None = None


class VerboseTranscript(Transcript):
    """response_format=verbose_json. language: a code; duration: in seconds."""

    task: Literal["transcribe", "translate"]
    language: str
    duration: float
    segments: list[Segment]


class TextDelta(BaseModel):
    """An event: more of the text."""

    type: Literal["transcript.text.delta"] = "transcript.text.delta"
    delta: str


class TextDone(BaseModel):
    """The last event: all of the text."""

    type: Literal["transcript.text.done"] = "transcript.text.done"
    text: str
    usage: TokenUsage
    warnings: list[str] | None = None


def read_result(result: Any, task: Literal["transcribe", "translate"], warnings: Sequence[str]) -> VerboseTranscript:
    """What a family's task gave. Raises PluginError where it is no transcription."""
    try:
        segments = [_segment(number, each) for number, each in enumerate(result.segments)]
        duration = float(result.duration)
        return VerboseTranscript(
            text=str(result.text), usage=DurationUsage(seconds=duration), warnings=list(warnings) or None, task=task,
            language=str(result.language), duration=duration, segments=segments,
        )  # fmt: skip
    except (AttributeError, TypeError, ValueError) as error:
        raise PluginError(
            "The model's task 'transcribe' gave no transcription (text, segments, language, duration). "
            "Report it to the plugin's author."
        ) from error


def _segment(number: int, given: Any) -> Segment:
    return Segment(
        id=number, seek=int(getattr(given, "seek", 0)), start=float(given.start), end=float(given.end),
        text=str(given.text), tokens=list(getattr(given, "tokens", ())), temperature=_known(given, "temperature"),
        avg_logprob=_known(given, "avg_logprob"), compression_ratio=_known(given, "compression_ratio"),
        no_speech_prob=_known(given, "no_speech_prob"),
    )  # fmt: skip


def _known(given: Any, name: str) -> float | None:
    value = getattr(given, name, None)
    return float(value) if value is not None and math.isfinite(value) else None


def as_text(heard: VerboseTranscript, form: Format) -> str:
    """The reply's body in one of the formats that are no JSON."""
    if form == "text":
        return f"{heard.text}\n"
    spans = [(each.start, each.end, each.text) for each in heard.segments]
    return to_srt(spans) if form == "srt" else to_vtt(spans)


def as_json(heard: VerboseTranscript, form: Format) -> dict[str, Any]:
    """The reply's body in one of the formats that are JSON."""
    body = heard.model_dump()
    if heard.warnings is None:
        del body["warnings"]
    if form == "verbose_json":
        return body
    return {name: value for name, value in body.items() if name in Transcript.model_fields}
