"""/v1/models, /tokenize, /detokenize, /health and /openapi.json."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import httpx
import openai
import pytest
from support.hearing import GOOD, SHORT, error_of, post
from support.serving import Server

from mm_core.server.app import ROUTES


def test_the_model_is_listed(client: openai.OpenAI):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("qwen2vl-nano", "model", "mm-core")
    assert client.models.retrieve("qwen2vl-nano").created == model.created
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("some/other")
    assert caught.value.code == "model_not_found"


def test_what_the_model_can_do(http: httpx.Client):
    model = http.get("/v1/models").json()["data"][0]
    assert model["max_model_len"] == 4096
    assert (model["family"], "image" in model["modalities"]) == ("qwen2vl", True)


def test_it_does_not_hear(server: Server) -> None:
    """The audio routes say so, and which route there is."""
    for route in ("transcriptions", "translations"):
        reply = post(server, GOOD, {"file": ("talk.wav", SHORT)}, route)
        error = error_of(reply)
        assert (reply.status_code, error["code"]) == (404, "task_not_supported")
        assert "/v1/chat/completions" in error["message"]
        assert "image" in error["message"]


def test_ids_of_a_text_and_back(http: httpx.Client):
    reply = http.post("/tokenize", json={"prompt": "A red circle, é😀", "return_token_strs": True}).json()
    assert reply["count"] == len(reply["tokens"]) == len(reply["token_strs"])
    assert reply["max_model_len"] == 4096
    back = http.post("/detokenize", json={"model": "qwen2vl-nano", "tokens": reply["tokens"]}).json()
    assert back == {"prompt": "A red circle, é😀"}


def test_ids_of_a_conversation_are_those_of_the_call(http: httpx.Client):
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "A <|im_end|> in the text"}]
    ids = http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    body = {"model": "qwen2vl-nano", "messages": messages, "max_tokens": 1, "return_token_ids": True}
    assert http.post("/v1/chat/completions", json=body).json()["prompt_token_ids"] == ids


def test_special_tokens_are_parsed_in_texts_and_not_in_messages(http: httpx.Client):
    as_text = http.post("/tokenize", json={"prompt": "<|im_end|>"}).json()["tokens"]
    assert len(as_text) == 1
    said = http.post("/tokenize", json={"messages": [{"role": "user", "content": "<|im_end|>"}]}).json()["tokens"]
    nothing = http.post("/tokenize", json={"messages": [{"role": "user", "content": "a"}]}).json()["tokens"]
    assert said.count(as_text[0]) == nothing.count(as_text[0])


def test_an_item_of_media_is_one_placeholder(http: httpx.Client):
    def ids(count: int) -> int:
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}  # never decoded
        content = [image] * count + [{"type": "text", "text": "a"}]
        reply = http.post("/tokenize", json={"messages": [{"role": "user", "content": content}]})
        assert reply.status_code == 200, reply.text
        return int(reply.json()["count"])

    assert ids(1) > ids(0)
    assert ids(2) - ids(1) == ids(1) - ids(0)


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("/tokenize", {}, "invalid_prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "invalid_prompt"),
        ("/tokenize", {"prompt": ""}, "invalid_body"),
        ("/tokenize", {"prompt": ["a"]}, "invalid_body"),
        ("/tokenize", {"messages": []}, "invalid_body"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model_not_found"),
        ("/tokenize", {"prompt": "a", "chat_template": "{{ 1 }}"}, "invalid_body"),
        ("/tokenize", {"prompt": "a" * 3_000_000}, "context_length_exceeded"),
        ("/detokenize", {"tokens": [-1]}, "invalid_body"),
        ("/detokenize", {"tokens": [2**40]}, "invalid_body"),
        ("/detokenize", {"tokens": [2**31 - 1]}, "invalid_prompt"),
        ("/detokenize", {"tokens": [1.5]}, "invalid_body"),
        ("/detokenize", {"tokens": [True]}, "invalid_body"),
        ("/detokenize", {"tokens": "1"}, "invalid_body"),
        ("/detokenize", {}, "invalid_body"),
    ],
)
def test_what_is_refused(http: httpx.Client, path: str, body: Any, code: str):
    reply = http.post(path, json=body)
    assert reply.status_code == (404 if code == "model_not_found" else 400)
    assert reply.json()["error"]["code"] == code


def test_no_ids_are_no_text(http: httpx.Client):
    assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_health_answers_soon_under_load(server: Server):
    """Long answers on both keys, and large bodies beside them: whoever asks how it does waits for nobody."""
    stop = threading.Event()
    body = {"model": "qwen2vl-nano", "messages": [{"role": "user", "content": "Go on."}], "max_tokens": 200}
    large = json.dumps({**body, "messages": [{"role": "user", "content": "word " * 200_000}]}).encode()

    def load(key: str, content: bytes) -> None:
        with server.http(key) as client:
            while not stop.is_set():
                reply = client.post(
                    "/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}
                )
                assert reply.status_code == (200 if content is not large else 400)

    contents = [json.dumps({**body, "ignore_eos": True}).encode()] * 4 + [large]
    threads = [threading.Thread(target=load, args=(server.keys[i % 2], c)) for i, c in enumerate(contents)]
    for thread in threads:
        thread.start()
    try:
        with httpx.Client(base_url=server.url, trust_env=False) as client:
            times = []
            for _ in range(60):
                start = time.perf_counter()
                assert client.get("/health").status_code == 200
                times.append(time.perf_counter() - start)
                time.sleep(0.02)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert sorted(times)[30] < 0.05, times  # the figure for the worst is measured on a quiet machine


def test_the_document_knows_every_route(http: httpx.Client):
    document = http.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    paths = document["paths"]
    assert {"/health", "/v1/models/{model_id}", "/v1/chat/completions", "/tokenize", "/admin/stats"} <= set(paths)
    assert len(paths) == len(ROUTES)
    for route in ROUTES:
        operation = paths[route.path.replace(":path", "")][route.method.lower()]
        assert {"400", "431", "500", "503", *map(str, route.replies)} <= set(operation["responses"])
        assert ("security" in operation) == (route.access != "open")
        assert ("requestBody" in operation) == (route.request_model is not None)
    assert "key-of-one" not in json.dumps(document)
    assert references(document) <= set(document["components"]["schemas"])


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"].rsplit("/", 1)[1]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*map(references, value.values()))
    return set().union(*map(references, value)) if isinstance(value, list) else set()
