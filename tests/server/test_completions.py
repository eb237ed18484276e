"""/v1/completions over HTTP: prompts as they are, in four shapes, with and without media."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from support.openai_calls import BELOW, IMAGE, IMAGE_PAD, TEXTS, Canary, check_error, data_url, ids_of, offline, turn

URL = "/v1/completions"


@pytest.fixture(scope="module")
def model(http: httpx.Client) -> Any:
    return http.get("/v1/models").json()["data"][0]


def ask(http: httpx.Client, model: Any, prompt: Any, **fields: Any) -> httpx.Response:
    body = {"model": model["id"], "prompt": prompt, "temperature": 0, **fields}
    return http.post(URL, content=json.dumps(body), headers={"Content-Type": "application/json"})


def choices_of(reply: httpx.Response) -> Any:
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"]


def test_the_tokens_are_those_of_the_engine_by_itself(http: httpx.Client, model: Any) -> None:
    picture = {"multi_modal_data": {"image": [data_url("scene.jpg")]}}
    wanted = offline()["completions"]
    (shown,) = choices_of(ask(http, model, BELOW, **picture, max_tokens=12, return_token_ids=True))
    assert shown["token_ids"] == list(wanted[0].token_ids)
    assert shown["text"] == "green heart"
    several = choices_of(ask(http, model, TEXTS, max_tokens=12, return_token_ids=True))
    assert [choice["token_ids"] for choice in several] == [list(output.token_ids) for output in wanted[1:]]
    assert [choice["prompt_token_ids"] for choice in several] == [list(o.prompt_token_ids) for o in wanted[1:]]


def test_text_and_ids_are_the_same_prompt(http: httpx.Client, model: Any) -> None:
    texts = [turn("What word is written?"), turn("Count the blue squares.")]
    ids = [ids_of(text) for text in texts]
    by_text = choices_of(ask(http, model, texts, return_token_ids=True))
    by_ids = choices_of(ask(http, model, ids, return_token_ids=True))
    assert [c["token_ids"] for c in by_ids] == [c["token_ids"] for c in by_text]
    assert [c["prompt_token_ids"] for c in by_ids] == ids
    assert choices_of(ask(http, model, ids[0]))[0]["text"] == by_text[0]["text"]
    assert [c["index"] for c in choices_of(ask(http, model, texts, n=3, temperature=1.0))] == list(range(6))


def test_sixteen_tokens_are_the_default(http: httpx.Client, model: Any) -> None:
    reply = ask(http, model, "green", ignore_eos=True).json()
    assert reply["usage"]["completion_tokens"] == 16
    assert reply["choices"][0]["finish_reason"] == "length"


def test_a_prompt_can_be_echoed(http: httpx.Client, model: Any) -> None:
    plain = choices_of(ask(http, model, "green heart,"))[0]["text"]
    assert choices_of(ask(http, model, "green heart,", echo=True))[0]["text"] == "green heart," + plain
    ids = ids_of("green heart,")
    assert choices_of(ask(http, model, ids, echo=True))[0]["text"] == "green heart," + plain


def test_log_probabilities_in_the_old_shape(http: httpx.Client, model: Any) -> None:
    (choice,) = choices_of(ask(http, model, BELOW, multi_modal_data={"image": data_url("scene.jpg")}, logprobs=2))
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"] == "green heart"
    assert found["text_offset"] == [0, 5]
    assert all(value <= 0 for value in found["token_logprobs"])
    for token, value, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert len(top) == 2
        assert top[token] == value == max(top.values())


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_its_grammar_ends_has_all_log_probabilities(
    http: httpx.Client, model: Any, stream: bool
) -> None:
    for word in ("yes", "no way"):
        fields = {"structured_outputs": {"choice": [word]}, "logprobs": 1, "max_tokens": 9, "stream": stream}
        reply = ask(http, model, "Is it?", **fields)
        assert reply.status_code == 200
        lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line and "[DONE]" not in line]
        choices = [choice for line in lines for choice in json.loads(line)["choices"]]
        assert "".join(choice["text"] for choice in choices) == word
        assert "".join(token for c in choices if c["logprobs"] for token in c["logprobs"]["tokens"]) == word


@pytest.mark.parametrize("fields", [{}, {"echo": True}, {"n": 2, "seed": 1, "temperature": 1.5}, {"logprobs": 1}])
def test_a_stream_tells_the_same_as_the_reply(http: httpx.Client, model: Any, fields: dict[str, Any]) -> None:
    prompts = [turn("What word is written?"), turn("Count the blue squares.")]
    whole = choices_of(ask(http, model, prompts, **fields))
    streamed = ask(http, model, prompts, **fields, stream=True, stream_options={"include_usage": True})
    lines = [line.removeprefix("data: ") for line in streamed.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    events = [json.loads(line) for line in lines]
    texts, ends = [""] * len(whole), [None] * len(whole)
    for choice in (choice for event in events for choice in event["choices"]):
        texts[choice["index"]] += choice["text"]
        ends[choice["index"]] = choice["finish_reason"]
    assert texts == [choice["text"] for choice in whole]
    assert ends == [choice["finish_reason"] for choice in whole]
    assert events[-1]["usage"]["completion_tokens"] > 0
    assert events[-1]["choices"] == []


def test_a_picture_without_placeholder_is_a_turn_of_its_own(http: httpx.Client, model: Any) -> None:
    picture = {"multi_modal_data": {"image": data_url("scene.jpg")}}
    (choice,) = choices_of(ask(http, model, "What is below the blue heart?", **picture))
    assert choice["text"] == "green heart"


def test_names_work_as_in_chat(http: httpx.Client, model: Any) -> None:
    named = {"multi_modal_uuids": {"image": ["completion-scene"]}}
    check_error(ask(http, model, BELOW, **named), 400, "media_not_cached")
    given = ask(http, model, BELOW, multi_modal_data={"image": [data_url("scene.jpg")]}, **named)
    assert choices_of(given)[0]["text"] == "green heart"
    for data in ({}, {"multi_modal_data": {"image": [None]}}):
        assert choices_of(ask(http, model, BELOW, **named, **data))[0]["text"] == "green heart"
    two = turn(IMAGE + IMAGE + "Which colour is the star in the second picture?")
    data = {"image": [None, data_url("pair-b.jpg")]}
    names = {"image": ["completion-scene", None]}
    assert ask(http, model, two, multi_modal_data=data, multi_modal_uuids=names).status_code == 200


SCENE = {"multi_modal_data": {"image": [data_url("scene.jpg")]}}
MISMATCH = "media_placeholder_mismatch"
BAD: list[tuple[str, Any, dict[str, Any], str | None]] = [
    ("P3 fewer", turn(IMAGE + "x"), {"multi_modal_data": {"image": [data_url("scene.jpg")] * 2}}, MISMATCH),
    ("P3 more", turn(IMAGE + IMAGE + "x"), SCENE, MISMATCH), ("P3 none", turn(IMAGE + "x"), {}, MISMATCH),
    ("P5 minus", [-1], {}, None), ("P5 vocabulary", [944], {}, None), ("P5 huge", [2**40], {}, None),
    ("P5 float", [1.0], {}, None), ("P5 bool", [True], {}, None), ("P6", "", {}, None), ("P6 list", [], {}, None),
    ("P6 lists", [[]], {}, None), ("P6 one of two", ["x", ""], {}, None), ("P8", "a\ud800", {}, "invalid_unicode"),
    ("D7 fewer", BELOW, {**SCENE, "multi_modal_uuids": {"image": ["a", "b"]}}, None),
    ("D7 empty", BELOW, {**SCENE, "multi_modal_uuids": {"image": []}}, None),
    ("D8", BELOW, {"multi_modal_data": {"image": [None]}}, None),
    ("many media", BELOW, {"multi_modal_data": {"image": [data_url("scene.jpg")] * 65}}, "too_many_media"),
    ("modality", BELOW, {"multi_modal_data": {"audio": ["data:audio/wav;base64,AAAA"]}}, "unsupported_media"),
    ("tensor", BELOW, {"multi_modal_data": {"image": {"pixel_values": [1.0]}}}, None),
    ("url", BELOW, {"multi_modal_data": {"image": ["http://127.0.0.1/x"]}}, "url_blocked"),
    ("path", BELOW, {"multi_modal_data": {"image": ["/etc/passwd"]}}, "url_blocked"),
    ("suffix", "x", {"suffix": "y"}, None), ("echo logprobs", "x", {"echo": True, "logprobs": 1}, None),
    ("S4 zero", "x", {"max_tokens": 0}, None), ("S5", ["x"] * 64, {"n": 3}, None), ("S6", "x", {"logprobs": 65}, None),
    ("messages", "x", {"messages": []}, None),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_served_is_400(http: httpx.Client, model: Any, canary: Canary, stream: bool) -> None:
    for name, prompt, fields, code in BAD:
        try:
            check_error(ask(http, model, prompt, **fields, stream=stream), 400, code)
        except AssertionError as failed:
            raise AssertionError(name) from failed
    canary.check()


def test_ids_that_stand_for_media_need_media(http: httpx.Client, model: Any, canary: Canary) -> None:
    ids = ids_of(BELOW)
    (pad,) = ids_of(IMAGE_PAD)
    assert pad in ids
    check_error(ask(http, model, ids), 400, MISMATCH)  # P4
    check_error(ask(http, model, [pad] * 100), 400, MISMATCH)
    assert choices_of(ask(http, model, ids, **SCENE))[0]["text"] == "green heart"
    canary.check()


def test_the_context_is_full_with_one_token_to_spare(http: httpx.Client, model: Any, canary: Canary) -> None:
    longest = model["max_model_len"] - 1
    (word,) = set(ids_of(" green green"))
    reply = ask(http, model, [word] * longest)
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"] | {"prompt_tokens_details": None} == {
        "prompt_tokens": longest, "completion_tokens": 1, "total_tokens": longest + 1, "prompt_tokens_details": None,
    }  # fmt: skip
    check_error(ask(http, model, [word] * (longest + 1)), 400, "context_length_exceeded")
    # After media are expanded, too: the placeholder alone would fit.
    ids = ids_of(BELOW)
    padded = [*[word] * (longest - len(ids)), *ids]
    check_error(ask(http, model, padded, **SCENE), 400, "context_length_exceeded")
    canary.check()
