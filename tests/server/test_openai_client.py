"""The official `openai` client, unmodified, against a real server process."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel
from support.openai_calls import BELOW, QUESTIONS, data_url, ids_of, image, question, user
from support.serving import Server, running_server

SHAPES = QUESTIONS[0]
assert SHAPES["answer"] == "green heart, blue heart, brown ring"


def text_of(reply: Any) -> str:
    text: str = reply.choices[0].message.content
    return text


@pytest.mark.parametrize("row", QUESTIONS, ids=lambda row: row["question"][:40])
def test_pictures_in_the_call_get_the_right_answer(client: openai.OpenAI, model: str, row: dict[str, Any]) -> None:
    reply = client.chat.completions.create(model=model, messages=question(row), temperature=0)
    assert text_of(reply) == row["answer"]
    assert reply.choices[0].finish_reason == "stop"
    assert reply.object == "chat.completion"
    assert reply.model == model


def test_a_stream_is_the_same_answer_piece_by_piece(client: openai.OpenAI, model: str) -> None:
    chunks = list(
        client.chat.completions.create(
            model=model, messages=question(SHAPES), temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(pieces) == SHAPES["answer"]
    assert len(pieces) > 3
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].choices == []
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_client_s_own_reader_of_streams(client: openai.OpenAI, model: str) -> None:
    with client.chat.completions.stream(model=model, messages=question(SHAPES), temperature=0) as stream:
        for _ in stream:
            pass
        assert text_of(stream.get_final_completion()) == SHAPES["answer"]


def test_usage_counts_what_was_cached(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "messages": question(SHAPES), "temperature": 0}
    first, second = (client.chat.completions.create(**asked, extra_body={"cache_salt": "usage"}) for _ in range(2))
    assert first.usage is not None
    assert second.usage is not None
    assert first.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details is not None
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert (second.usage.prompt_tokens_details.cached_tokens or 0) > 100
    assert second.model_extra is not None
    assert second.model_extra["mm"]["encoder_hit_tokens"] > 0


def test_a_conversation_goes_on_with_the_reply_as_it_came(client: openai.OpenAI, model: str) -> None:
    messages: list[Any] = question(SHAPES)
    messages.append(client.chat.completions.create(model=model, messages=messages, temperature=0).choices[0].message)
    messages.append({"role": "user", "content": "What color is the ring?"})
    second = client.chat.completions.create(model=model, messages=messages, temperature=0)
    assert second.usage is not None
    assert second.usage.prompt_tokens > 100


def test_a_picture_by_its_name_alone(client: openai.OpenAI, model: str) -> None:
    row = next(row for row in QUESTIONS if row["answer"] == "cloud")
    url = data_url("word.jpg")

    def answer(*parts: Any) -> str:
        return text_of(client.chat.completions.create(model=model, messages=user(*parts), temperature=0))

    assert answer(image(url, "the-word"), row["question"]) == "cloud"
    assert answer(image(None, "the-word"), row["question"]) == "cloud"
    assert answer(image(data_url("scene.jpg"), "the-word"), SHAPES["question"]) == SHAPES["answer"]
    assert answer(image(None, "the-word"), SHAPES["question"]) == SHAPES["answer"]
    two = QUESTIONS[-1]
    names = [image(data_url(name), name) for name in two["images"]]
    assert answer(*names, two["question"]) == two["answer"]
    assert answer(image(None, "pair-a.jpg"), names[1], two["question"]) == two["answer"]
    assert answer(*[image(None, name) for name in two["images"]], two["question"]) == two["answer"]
    with pytest.raises(openai.BadRequestError) as caught:
        answer(image(None, "never-seen"), row["question"])
    assert caught.value.code == "media_not_cached"


def test_log_probabilities(client: openai.OpenAI, model: str) -> None:
    reply = client.chat.completions.create(
        model=model, messages=question(SHAPES), temperature=0, logprobs=True, top_logprobs=3
    )
    found = reply.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert b"".join(bytes(entry.bytes or ()) for entry in found.content).decode() == SHAPES["answer"]
    for entry in found.content:
        assert len(entry.top_logprobs) == 3
        assert (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob) == (entry.token, entry.logprob)
        assert entry.logprob <= 0


def test_several_answers_are_repeatable_with_a_seed(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "messages": question(SHAPES), "n": 3, "temperature": 3.0, "max_tokens": 12}

    def answers(seed: int) -> list[str | None]:
        reply = client.chat.completions.create(**asked, seed=seed)
        assert [choice.index for choice in reply.choices] == [0, 1, 2]
        return [choice.message.content for choice in reply.choices]

    first = answers(7)
    assert first == answers(7)
    assert first != answers(8)
    assert len(set(first)) > 1
    streamed = [""] * 3
    for chunk in client.chat.completions.create(**asked, seed=7, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == first


def test_stop_strings_limits_and_biases(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "messages": question(SHAPES), "temperature": 0}
    stopped = client.chat.completions.create(**asked, stop=[", blue"])
    assert (text_of(stopped), stopped.choices[0].finish_reason) == ("green heart", "stop")
    pieces = [
        c.choices[0].delta.content or "" for c in client.chat.completions.create(**asked, stop=", b", stream=True)
    ]
    assert "".join(pieces) == "green heart"
    short = client.chat.completions.create(**asked, max_completion_tokens=2)
    assert (text_of(short), short.choices[0].finish_reason) == ("green heart", "length")
    (green,) = ids_of("green")
    biased = client.chat.completions.create(**asked, logit_bias={str(green): -100})
    assert not text_of(biased).startswith("green")
    forced = client.chat.completions.create(**asked, logit_bias={str(green): 100}, max_tokens=3)
    assert text_of(forced) == "greengreengreen"


class Found(BaseModel):
    colour: Literal["green", "blue", "brown"]
    count: Literal[1, 2, 3]


def test_structured_output(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "messages": question(SHAPES), "temperature": 0, "max_tokens": 200}
    reply = client.chat.completions.parse(**asked, response_format=Found)
    assert reply.choices[0].message.parsed is not None
    assert reply.choices[0].message.parsed.colour in ("green", "blue", "brown")
    chosen = client.chat.completions.create(**asked, extra_body={"structured_outputs": {"choice": ["cat", "ring"]}})
    assert text_of(chosen) in ("cat", "ring")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**asked, extra_body={"structured_outputs": {"regex": "(a"}})
    assert caught.value.code == "invalid_grammar"


def test_completions(client: openai.OpenAI, model: str) -> None:
    reply = client.completions.create(
        model=model, prompt=BELOW, temperature=0, extra_body={"multi_modal_data": {"image": data_url("scene.jpg")}}
    )
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("green heart", "stop")
    several = client.completions.create(model=model, prompt=["green", "blue"], temperature=0, logprobs=1, echo=False)
    assert [choice.index for choice in several.choices] == [0, 1]
    text = ""
    for chunk in client.completions.create(model=model, prompt="green", temperature=0, stream=True, echo=True):
        text += chunk.choices[0].text
    assert text == "green" + several.choices[0].text


def test_thirty_two_at_once(server: Server, model: str) -> None:
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.keys[0], max_retries=0) as client:

            async def ask(row: dict[str, Any], stream: bool) -> str:
                asked: dict[str, Any] = {"model": model, "messages": question(row), "temperature": 0}
                if not stream:
                    return text_of(await client.chat.completions.create(**asked))
                chunks = await client.chat.completions.create(**asked, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

            return await asyncio.gather(*(ask(row, i % 2 == 0) for i, row in enumerate(rows)))

    rows = (QUESTIONS * 3)[:32]
    assert asyncio.run(ask_all()) == [row["answer"] for row in rows]


def test_leaving_a_stream_frees_its_request(server: Server, client: openai.OpenAI, model: str) -> None:
    stream = client.chat.completions.create(
        model=model, messages=question(SHAPES), stream=True, max_tokens=3000, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 1
    while server.stats()["engine"]["blocks"]["in_use"]:
        assert time.monotonic() < deadline, "its blocks are still held"
        time.sleep(0.02)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1}, "temperature"), ({"n": 0}, "n"), ({"max_tokens": 0}, "max_tokens"),
    ({"stop": [""]}, "stop"), ({"top_logprobs": 1}, "top_logprobs"), ({"extra_body": {"unheard_of": 1}}, "unheard_of"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"), ({"messages": []}, "messages"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), BAD, ids=[param for _, param in BAD])
def test_bad_requests_are_the_client_s_own_error(
    client: openai.OpenAI, model: str, fields: dict[str, Any], param: str
) -> None:
    asked: dict[str, Any] = {"model": model, "messages": question(SHAPES), **fields}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**asked, stream=stream)
        assert (caught.value.param or "").startswith(param)
        assert caught.value.type == "invalid_request_error"
        assert caught.value.code


def test_other_refusals_have_their_types(server: Server, client: openai.OpenAI, model: str) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-5", messages=messages)
    assert caught.value.code == "model_not_found"
    with server.client("wrong") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.chat.completions.create(model=model, messages=messages)
    with pytest.raises(openai.BadRequestError) as too_long:
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "green " * 5000}])
    assert too_long.value.code == "context_length_exceeded"


@pytest.fixture(scope="module")
def narrow() -> Iterator[Server]:
    """A server for one call at a time, which a test may end."""
    bounds = {"max_running": 1, "max_waiting": 0, "max_completion_tokens": 3000}
    with running_server(in_process=True, decode_workers=0, **bounds) as running:
        yield running


def test_too_many_calls_and_a_server_that_stops(narrow: Server) -> None:
    with narrow.client() as client:
        name = client.models.list().data[0].id
        asked: dict[str, Any] = {"model": name, "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
        with pytest.raises(openai.BadRequestError, match="ceiling of 3000"):
            client.chat.completions.create(**asked, max_tokens=3001)
        long: dict[str, Any] = {**asked, "max_tokens": 2000, "extra_body": {"ignore_eos": True}}
        stream = client.chat.completions.create(**long, stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as limited:
            client.chat.completions.create(**asked)
        assert limited.value.code == "overloaded"
        assert int(limited.value.response.headers["retry-after"]) >= 1
        narrow.signal(signal.SIGTERM)
        codes: list[str | None] = []
        deadline = time.monotonic() + 5
        while "draining" not in codes:
            assert time.monotonic() < deadline, codes
            with pytest.raises(openai.APIStatusError) as refused:
                client.chat.completions.create(**asked)
            codes.append(refused.value.code)
        assert isinstance(refused.value, openai.InternalServerError)
        assert refused.value.status_code == 503
        stream.close()
        assert narrow.wait() == 0
