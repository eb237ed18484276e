"""From the engine's outputs to OpenAI's replies and stream events. Plain dicts, made JSON by msgspec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from mm_core.config import SamplingParams
from mm_core.server.context import Call
from mm_core.server.protocol.chat import LogprobsDict, TokenLogprobDict, TopLogprobDict
from mm_core.server.protocol.common import ReuseDict, UsageDict
from mm_core.server.protocol.completions import LegacyLogprobsDict
from mm_core.types import CompletionOutput, Logprob, RequestOutput

DONE = b"data: [DONE]\n\n"
_LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's number for "never"
_REPLACEMENT = "\ufffd"

encode = msgspec.json.Encoder().encode


def event(data: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(data) + b"\n\n"


@dataclass(frozen=True)
class Shape:
    """What a reply holds beside the text. created: seconds of the epoch. usage: in a chunk of its own at a stream's
    end; continuous: in every chunk. token_ids: of prompt and answers."""

    id: str
    model: str
    created: int
    params: SamplingParams
    usage: bool = False
    continuous: bool = False
    token_ids: bool = False

    @property
    def logprobs(self) -> int | None:
        """How many best tokens are told of each; None: no log-probabilities at all."""
        return self.params.logprobs

    @property
    def tokenwise(self) -> bool:
        """Whether tokens without text are news."""
        return self.token_ids or self.params.logprobs is not None

    def head(self, kind: str) -> dict[str, Any]:
        """How every reply and chunk begins."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of an answer. first: place of its first token among the answer's."""

    answer: CompletionOutput
    text: str
    first: int

    @property
    def token_ids(self) -> list[int]:
        """Tokens since the piece before."""
        return list(self.answer.token_ids[self.first :])


class Progress:
    """How much of one answer was told. Told text is never taken back: where a family rewrites the whole answer at its
    end, the stream keeps what it had."""

    __slots__ = ("ended", "text", "tokens", "tokenwise")

    def __init__(self, tokenwise: bool) -> None:
        self.tokenwise = tokenwise
        self.text = ""
        self.tokens = 0
        self.ended = False

    def advance(self, answer: CompletionOutput) -> Piece | None:
        """What is new since the last look; None: nothing that is worth a chunk."""
        if self.ended:
            return None
        text, told = answer.text, self.text
        new = ""
        if len(text) > len(told) and text.startswith(told):
            new, self.text = text[len(told) :], text
        self.ended = answer.finish_reason is not None
        if not new and not self.ended and not (self.tokenwise and len(answer.token_ids) > self.tokens):
            return None
        first, self.tokens = self.tokens, len(answer.token_ids)
        return Piece(answer, new, first)


def usage_of(outputs: Sequence[RequestOutput]) -> UsageDict:
    """Token counts of a call's prompts and answers together."""
    usages = [output.usage for output in outputs]
    prompt = sum(usage.prompt_tokens for usage in usages)
    completion = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": sum(usage.cached_tokens for usage in usages),
            "media_tokens": sum(usage.media_tokens for usage in usages),
            "encoded_media_tokens": sum(usage.encoded_media_tokens for usage in usages),
        },
    }


def reuse_of(outputs: Sequence[RequestOutput], call: Call) -> ReuseDict:
    """What was reused, and how long it took since the call came."""
    usage = usage_of(outputs)
    details = usage["prompt_tokens_details"]
    times = [output.metrics for output in outputs if output.metrics is not None]
    first = min((t.first_token for t in times if t.first_token is not None), default=None)
    last = max((t.last_token for t in times if t.last_token is not None), default=None)
    span = 0.0 if first is None or last is None else last - first
    return {
        "cached_tokens": details["cached_tokens"],
        "media_tokens": details["media_tokens"],
        "encoder_hit_tokens": details["media_tokens"] - details["encoded_media_tokens"],
        "ttft_ms": _ms(first, call),
        "total_ms": _ms(last, call),
        "tokens_per_second": round((usage["completion_tokens"] - 1) / span, 1) if span > 0 else None,
    }


def _ms(when: float | None, call: Call) -> float | None:
    return None if when is None else round(1000 * (when - call.arrival), 2)


def extras_of(outputs: Sequence[RequestOutput], call: Call) -> dict[str, Any]:
    """This server's additions to a whole reply, or to the chunk that holds the usage."""
    extras: dict[str, Any] = {"mm": reuse_of(outputs, call)}
    return {**extras, "warnings": list(call.warnings)} if call.warnings else extras


def chat_reply(output: RequestOutput, shape: Shape, call: Call) -> dict[str, Any]:
    """ChatReplyDict of a finished request."""
    reply = {
        **shape.head("chat.completion"),
        "choices": [_chat_choice(answer, shape) for answer in output.outputs],
        "usage": usage_of([output]),
        **extras_of([output], call),
    }
    return {**reply, "prompt_token_ids": list(output.prompt_token_ids)} if shape.token_ids else reply


def _chat_choice(answer: CompletionOutput, shape: Shape) -> dict[str, Any]:
    choice = {
        "index": answer.index,
        "message": {"role": "assistant", "content": answer.text, "refusal": None},
        "logprobs": chat_logprobs(answer, 0, shape),
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }
    return {**choice, "token_ids": list(answer.token_ids)} if shape.token_ids else choice


class ChatEvents:
    """Events of one request's chat stream, from outputs that each hold everything so far."""

    def __init__(self, shape: Shape, call: Call) -> None:
        self._shape = shape
        self._call = call
        self._head = shape.head("chat.completion.chunk")
        self._progress = [Progress(shape.tokenwise) for _ in range(shape.params.n)]
        self._begun = False

    def update(self, output: RequestOutput) -> bytes:
        """What is new; empty where nothing is. The first ones tell the role."""
        usage = self._usage(output)
        parts = [] if self._begun else self._start(output, usage)
        for progress, answer in zip(self._progress, output.outputs, strict=True):
            piece = progress.advance(answer)
            if piece is not None:
                parts.append(event({**self._head, "choices": [self._choice(piece)], **usage}))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def end(self, output: RequestOutput) -> bytes:
        """The usage, where it is asked for, and the end."""
        if not self._shape.usage:
            return DONE
        extras = extras_of([output], self._call)
        return event({**self._head, "choices": [], "usage": usage_of([output]), **extras}) + DONE

    def _usage(self, output: RequestOutput) -> dict[str, Any]:
        if self._shape.continuous:
            return {"usage": usage_of([output])}
        return {"usage": None} if self._shape.usage else {}

    def _start(self, output: RequestOutput, usage: dict[str, Any]) -> list[bytes]:
        self._begun = True
        more: dict[str, Any] = {"warnings": list(self._call.warnings)} if self._call.warnings else {}
        if self._shape.token_ids:
            more["prompt_token_ids"] = list(output.prompt_token_ids)
        delta = {"role": "assistant", "content": ""}
        return [
            event({
                **self._head,
                "choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}],
                **usage,
                **more,
            })
            for index in range(self._shape.params.n)
        ]  # fmt: skip

    def _choice(self, piece: Piece) -> dict[str, Any]:
        answer = piece.answer
        choice: dict[str, Any] = {
            "index": answer.index,
            "delta": {"content": piece.text} if piece.text or answer.finish_reason is None else {},
            "logprobs": chat_logprobs(answer, piece.first, self._shape),
            "finish_reason": answer.finish_reason,
        }
        if answer.finish_reason is not None:
            choice["stop_reason"] = answer.stop_reason
        if self._shape.token_ids:
            choice["token_ids"] = piece.token_ids
        return choice


def chat_logprobs(answer: CompletionOutput, first: int, shape: Shape) -> LogprobsDict | None:
    """Of the answer's tokens from `first` on."""
    if shape.logprobs is None or answer.logprobs is None:
        return None
    last = len(answer.token_ids) - answer.hidden_tokens
    rows = zip(answer.token_ids[first:last], answer.logprobs[first:last], strict=True)
    return {"content": [_token_logprob(token, found, shape.logprobs) for token, found in rows], "refusal": None}


def _token_logprob(token: int, found: Mapping[int, Logprob], top: int) -> TokenLogprobDict:
    own = _one_logprob(found[token])
    best = [_one_logprob(each) for each in _best(found, top)]
    return {"token": own["token"], "logprob": own["logprob"], "bytes": own["bytes"], "top_logprobs": best}


def _best(found: Mapping[int, Logprob], top: int) -> list[Logprob]:
    """The `top` best tokens, best first; the chosen one may be found beside them."""
    return sorted((each for each in found.values() if each.rank <= top), key=lambda each: each.rank)[:top]


def _one_logprob(found: Logprob) -> TopLogprobDict:
    token = found.decoded_token
    whole = _REPLACEMENT not in token
    return {
        "token": token,
        "logprob": max(found.logprob, _LEAST_LOGPROB),
        "bytes": list(token.encode()) if whole else None,
    }


def completion_reply(
    outputs: Sequence[RequestOutput], echoes: Sequence[str], shape: Shape, call: Call
) -> dict[str, Any]:
    """CompletionReplyDict of finished requests, one a prompt. echoes: what goes before the texts of each."""
    choices = []
    for place, (output, echo) in enumerate(zip(outputs, echoes, strict=True)):
        for answer in output.outputs:
            piece = Piece(answer, echo + answer.text, 0)
            choices.append(_completion_choice(place, piece, shape, legacy_logprobs(answer, 0, 0, shape)))
            if shape.token_ids:
                choices[-1]["prompt_token_ids"] = list(output.prompt_token_ids)
    return {
        **shape.head("text_completion"),
        "choices": choices,
        "usage": usage_of(outputs),
        **extras_of(outputs, call),
    }


def _completion_choice(place: int, piece: Piece, shape: Shape, logprobs: LegacyLogprobsDict | None) -> dict[str, Any]:
    answer = piece.answer
    choice: dict[str, Any] = {
        "index": place * shape.params.n + answer.index,
        "text": piece.text,
        "logprobs": logprobs,
        "finish_reason": answer.finish_reason,
    }
    if answer.finish_reason is not None:
        choice["stop_reason"] = answer.stop_reason
    if shape.token_ids:
        choice["token_ids"] = piece.token_ids
    return choice


class CompletionEvents:
    """Events of a completion's stream. echoes: what goes before the texts of each prompt's answers."""

    def __init__(self, echoes: Sequence[str], shape: Shape, call: Call) -> None:
        self._shape = shape
        self._call = call
        self._head = shape.head("text_completion")
        self._echoes = echoes
        self._progress = [[Progress(shape.tokenwise) for _ in range(shape.params.n)] for _ in echoes]
        self._offsets = [[0] * shape.params.n for _ in echoes]
        self._latest: list[RequestOutput | None] = [None] * len(echoes)

    def update(self, place: int, output: RequestOutput) -> bytes:
        """What is new of the prompt at `place`; empty where nothing is."""
        parts = []
        first, self._latest[place] = self._latest[place] is None, output
        usage = self._usage()
        for progress, answer in zip(self._progress[place], output.outputs, strict=True):
            piece = progress.advance(answer)
            if first and self._echoes[place]:
                text = self._echoes[place] + ("" if piece is None else piece.text)
                piece = Piece(answer, text, 0 if piece is None else piece.first)
            if piece is not None:
                parts.append(event({**self._head, "choices": [self._choice(place, piece, output, first)], **usage}))
        return b"".join(parts)

    def end(self) -> bytes:
        """The usage, where it is asked for, and the end."""
        if not self._shape.usage:
            return DONE
        outputs = self._outputs()
        extras = extras_of(outputs, self._call)
        return event({**self._head, "choices": [], "usage": usage_of(outputs), **extras}) + DONE

    def _outputs(self) -> list[RequestOutput]:
        return [output for output in self._latest if output is not None]

    def _usage(self) -> dict[str, Any]:
        if self._shape.continuous:
            return {"usage": usage_of(self._outputs())}
        return {"usage": None} if self._shape.usage else {}

    def _choice(self, place: int, piece: Piece, output: RequestOutput, first: bool) -> dict[str, Any]:
        index = piece.answer.index
        logprobs = legacy_logprobs(piece.answer, piece.first, self._offsets[place][index], self._shape)
        if logprobs is not None:
            self._offsets[place][index] += sum(map(len, logprobs["tokens"]))
        choice = _completion_choice(place, piece, self._shape, logprobs)
        return (
            {**choice, "prompt_token_ids": list(output.prompt_token_ids)} if first and self._shape.token_ids else choice
        )


def legacy_logprobs(answer: CompletionOutput, first: int, offset: int, shape: Shape) -> LegacyLogprobsDict | None:
    """Of the answer's tokens from `first` on, which begins `offset` characters into the text."""
    if shape.logprobs is None or answer.logprobs is None:
        return None
    last = len(answer.token_ids) - answer.hidden_tokens
    reply: LegacyLogprobsDict = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    tops: list[dict[str, float]] = []
    for token, found in zip(answer.token_ids[first:last], answer.logprobs[first:last], strict=True):
        own = found[token]
        reply["text_offset"].append(offset)
        reply["token_logprobs"].append(max(own.logprob, _LEAST_LOGPROB))
        reply["tokens"].append(own.decoded_token)
        tops.append({e.decoded_token: max(e.logprob, _LEAST_LOGPROB) for e in _best(found, shape.logprobs)})
        offset += len(own.decoded_token)
    reply["top_logprobs"] = tops if shape.logprobs else None
    return reply
