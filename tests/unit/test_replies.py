"""Replies and stream events: what is told, when, and that nothing is told twice or taken back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from mm_core.config import SamplingParams
from mm_core.server.context import ANYBODY, Call
from mm_core.server.protocol.chat import ChatChunk, ChatReply
from mm_core.server.protocol.completions import CompletionReply
from mm_core.server.replies import (
    ChatEvents,
    CompletionEvents,
    Progress,
    Shape,
    chat_logprobs,
    chat_reply,
    completion_reply,
    encode,
    legacy_logprobs,
    reuse_of,
    usage_of,
)
from mm_core.types import CompletionOutput, Logprob, RequestMetrics, RequestOutput, Usage

WORDS = ("Hel", "lo", " wor", "ld")


def call(**fields: Any) -> Call:
    return Call("/v1/chat/completions", ANYBODY, request_id="req-1", arrival=10.0, **fields)


def shape(params: SamplingParams | None = None, **fields: Any) -> Shape:
    return Shape("id-1", "m", 1, params or SamplingParams(), **fields)


def logprob_of(place: int) -> Mapping[int, Logprob]:
    """The chosen token's is second best."""
    return {place: Logprob(-1.0, 2, WORDS[place]), 100 + place: Logprob(-0.5, 1, "best"), 9: Logprob(-3.0, 3, "third")}


def answer(size: int, *, index: int = 0, end: str | None = None, stop: str | int | None = None) -> CompletionOutput:
    return CompletionOutput(
        index, "".join(WORDS[:size]), tuple(range(size)), end, stop, tuple(logprob_of(i) for i in range(size))
    )


def output(*answers: CompletionOutput, cached: int = 0) -> RequestOutput:
    usage = Usage(10, cached, sum(len(each.token_ids) for each in answers), 6, 2)
    metrics = RequestMetrics(10.1, 10.2, 10.5, 11.5)
    done = all(each.finish_reason for each in answers)
    return RequestOutput("r", (1, 2, 3), answers, usage, done, metrics)


def events(data: bytes) -> list[dict[str, Any]]:
    """The events of a stream; each is checked against the documented shape."""
    found = []
    for line in data.split(b"\n\n")[:-1]:
        assert line.startswith(b"data: ")
        if line != b"data: [DONE]":
            found.append(json.loads(line.removeprefix(b"data: ")))
            model = ChatChunk if "chunk" in found[-1]["object"] else CompletionReply
            model.model_validate_json(line.removeprefix(b"data: "), strict=True)
    return found


def test_what_was_told_is_not_told_again_or_taken_back() -> None:
    progress = Progress(tokenwise=False)
    assert progress.advance(CompletionOutput(0, "", (1,))) is None
    texts = []
    for text, end in (("a", None), ("a", None), ("abc", None), ("ab", None), ("xyz1", None), ("abcd", "stop")):
        piece = progress.advance(CompletionOutput(0, text, (1, 2), end))
        texts.append(None if piece is None else piece.text)
    assert texts == ["a", None, "bc", None, None, "d"]
    assert progress.advance(CompletionOutput(0, "abcde", (1, 2), "stop")) is None


def test_tokens_without_text_are_news_only_where_tokens_are_told() -> None:
    grown = [CompletionOutput(0, "a", (1,)), CompletionOutput(0, "a", (1, 2)), CompletionOutput(0, "ab", (1, 2, 3, 4))]
    tokenwise, textwise = Progress(tokenwise=True), Progress(tokenwise=False)
    assert [piece.token_ids if (piece := tokenwise.advance(each)) else None for each in grown] == [[1], [2], [3, 4]]
    assert [textwise.advance(each) is None for each in grown] == [False, True, False]


def test_a_chat_stream_adds_up_to_the_reply() -> None:
    params = SamplingParams(n=2, logprobs=1)
    stream = ChatEvents(shape(params, usage=True, token_ids=True), call())
    steps = [(1, 1), (1, 2), (4, 2), (4, 4)]
    data = b""
    for first, second in steps:
        ends = ["length" if size == 4 else None for size in (first, second)]
        last = output(answer(first, end=ends[0]), answer(second, index=1, end=ends[1]))
        data += stream.update(last)
    data += stream.end(last)
    assert data.endswith(b"data: [DONE]\n\n")
    told = events(data)
    reply = json.loads(encode(chat_reply(last, shape(params, usage=True, token_ids=True), call())))
    ChatReply.model_validate_json(encode(reply), strict=True)
    assert [chunk["choices"][0]["delta"].get("role") for chunk in told[:2]] == ["assistant"] * 2
    for index in (0, 1):
        own = [c for chunk in told for c in chunk["choices"] if c["index"] == index]
        whole = reply["choices"][index]
        assert "".join(c["delta"].get("content", "") for c in own) == whole["message"]["content"] == "Hello world"
        assert [i for c in own for i in c.get("token_ids", ())] == whole["token_ids"] == [0, 1, 2, 3]
        entries = [entry for c in own if c["logprobs"] for entry in c["logprobs"]["content"]]
        assert entries == whole["logprobs"]["content"]
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == [whole["finish_reason"]] == ["length"]
    assert told[-1]["choices"] == []
    assert told[-1]["usage"] == reply["usage"]
    assert told[-1]["mm"] == reply["mm"]
    assert all(chunk["usage"] is None for chunk in told[:-1])
    assert told[0]["prompt_token_ids"] == reply["prompt_token_ids"] == [1, 2, 3]


def test_usage_is_told_only_where_it_was_asked_for() -> None:
    steps = [output(answer(1)), output(answer(4, end="stop"))]
    plain, each = ChatEvents(shape(), call()), ChatEvents(shape(usage=True, continuous=True), call())
    without = b"".join(plain.update(step) for step in steps) + plain.end(steps[-1])
    assert all("usage" not in chunk and "mm" not in chunk for chunk in events(without))
    continuous = events(b"".join(each.update(step) for step in steps) + each.end(steps[-1]))
    assert [chunk["usage"]["completion_tokens"] for chunk in continuous] == [1, 1, 4, 4]


def test_the_first_event_tells_the_role_though_there_is_no_text_yet() -> None:
    stream = ChatEvents(shape(), call(warnings=["The sound was cut off."]))
    (first,) = events(stream.update(output(CompletionOutput(0, "", (1,)))))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert first["warnings"] == ["The sound was cut off."]
    assert stream.update(output(CompletionOutput(0, "", (1, 2)))) == b""
    (last,) = events(stream.update(output(CompletionOutput(0, "", (1, 2, 3), "stop", 3))))
    assert (last["choices"][0]["delta"], last["choices"][0]["stop_reason"]) == ({}, 3)


def test_log_probabilities_have_openai_s_shape() -> None:
    found = chat_logprobs(answer(2), 0, shape(SamplingParams(logprobs=1)))
    assert found is not None
    assert found["content"][1] == {
        "token": "lo", "logprob": -1.0, "bytes": [108, 111],
        "top_logprobs": [{"token": "best", "logprob": -0.5, "bytes": [98, 101, 115, 116]}],
    }  # fmt: skip
    none, two = (chat_logprobs(answer(1), 0, shape(SamplingParams(logprobs=top))) for top in (0, 2))
    assert none is not None
    assert two is not None
    assert none["content"][0]["top_logprobs"] == []
    assert [each["token"] for each in two["content"][0]["top_logprobs"]] == ["best", "Hel"]
    assert chat_logprobs(answer(1), 0, shape()) is None


def test_tokens_that_json_cannot_show_have_no_bytes_and_no_infinity() -> None:
    odd = CompletionOutput(
        0, "", (1, 2), None, None, ({1: Logprob(-math.inf, 5, "\ufffd")}, {2: Logprob(-1.0, 1, "ü")})
    )
    found = chat_logprobs(odd, 0, shape(SamplingParams(logprobs=0)))
    assert found is not None
    assert [(e["bytes"], e["logprob"]) for e in found["content"]] == [(None, -9999.0), ([0xC3, 0xBC], -1.0)]


@pytest.mark.parametrize(("hidden", "shown"), [(1, 3), (0, 4)])
def test_the_token_that_ends_an_answer_is_no_part_of_it(hidden: int, shown: int) -> None:
    params = SamplingParams(logprobs=0)
    ended = replace(answer(4, end="stop"), hidden_tokens=hidden)
    for found in (chat_logprobs(ended, 0, shape(params)), legacy_logprobs(ended, 0, 0, shape(params))):
        assert found is not None
        assert len(found["content"] if "content" in found else found["tokens"]) == shown


def test_legacy_log_probabilities_know_where_tokens_begin() -> None:
    params = SamplingParams(logprobs=2)
    found = legacy_logprobs(answer(4), 0, 0, shape(params))
    assert found is not None
    assert found["tokens"] == list(WORDS)
    assert found["text_offset"] == [0, 3, 5, 9]
    assert found["top_logprobs"] == [{"best": -0.5, word: -1.0} for word in WORDS]
    stream = CompletionEvents([""], shape(params), call())
    steps = [output(answer(1)), output(answer(3)), output(answer(4, end="length"))]
    told = [c["logprobs"] for chunk in events(b"".join(stream.update(0, s) for s in steps)) for c in chunk["choices"]]
    for name, values in found.items():
        assert [value for each in told for value in each[name]] == values  # type: ignore[index]


def test_a_completion_of_several_prompts() -> None:
    params = SamplingParams(n=2)
    outputs = [output(answer(4, end="length"), answer(2, index=1, end="stop"), cached=3) for _ in range(2)]
    reply = completion_reply(outputs, ["A: ", "B: "], shape(params, token_ids=True), call())
    CompletionReply.model_validate_json(encode(reply), strict=True)
    assert [(c["index"], c["text"]) for c in reply["choices"]] == [
        (0, "A: Hello world"), (1, "A: Hello"), (2, "B: Hello world"), (3, "B: Hello"),
    ]  # fmt: skip
    assert reply["usage"]["total_tokens"] == 32
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 6
    stream = CompletionEvents(["A: ", "B: "], shape(params, usage=True), call())
    data = stream.update(1, output(answer(1), answer(0, index=1)))
    data += b"".join(stream.update(place, each) for place, each in enumerate(outputs)) + stream.end()
    told = events(data)
    texts = [""] * 4
    for chunk in told:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [c["text"] for c in reply["choices"]]
    assert told[-1]["usage"] == reply["usage"]


def test_reuse_and_times_are_those_of_the_call() -> None:
    reuse = reuse_of([output(answer(4), cached=4)], call())
    assert reuse == {
        "cached_tokens": 4, "media_tokens": 6, "encoder_hit_tokens": 4, "ttft_ms": 500.0, "total_ms": 1500.0,
        "tokens_per_second": 3.0,
    }  # fmt: skip
    bare = RequestOutput("r", (1,), (answer(1),), Usage(1, 0, 1), finished=True)
    assert reuse_of([bare], call())["ttft_ms"] is None
    assert usage_of([bare, bare])["prompt_tokens"] == 2
