"""More calls than a server can serve: who is refused, how soon, and what the others get."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from support.serving import Server, running_server
from support.wire import head, wire

CHAT = "/v1/chat/completions"


def body(tokens: int, text: str = "Go on.", **more: Any) -> dict[str, Any]:
    asked = {"model": "qwen2vl-nano", "messages": [{"role": "user", "content": text}], "temperature": 0}
    return {**asked, "max_tokens": tokens, "ignore_eos": True, **more}


def call(server: Server, asked: dict[str, Any], key: str | None = None) -> tuple[httpx.Response, float]:
    with server.http(key) as client:
        start = time.perf_counter()
        reply = client.post(CHAT, json=asked)
        return reply, time.perf_counter() - start


def test_ten_times_what_it_takes(narrow):
    """Two run, four wait, and the rest are told at once when to come back; what was taken is answered, and right."""
    wanted = call(narrow, body(60))[0].json()["choices"][0]["message"]["content"]
    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(lambda _: call(narrow, body(60)), range(24)))
    taken = [reply for reply, _ in found if reply.status_code == 200]
    answered = sorted(ms_of(narrow, reply) for reply in taken)
    refused = [(reply, seconds) for reply, seconds in found if reply.status_code != 200]
    assert len(taken) >= 6
    assert len(refused) >= 5
    assert all(reply.json()["choices"][0]["message"]["content"] == wanted for reply in taken)
    for reply, _ in refused:
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "overloaded")
        assert reply.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(reply.headers["retry-after"]) <= 60
    took = [ms_of(narrow, reply) for reply, _ in refused]
    assert sorted(took)[len(took) // 2] < answered[len(answered) // 2] / 2, (took, answered)  # at once, not in turn
    gate = narrow.stats()["gate"]
    assert (gate["running"], gate["waiting"], gate["bytes_held"]) == (0, 0, 0)


def ms_of(server: Server, reply: httpx.Response) -> float:
    """Milliseconds that a call took by the server's own clock: this machine may have better to do than to run us."""
    wanted = reply.headers["x-request-id"]
    (line,) = [line for line in server.wait_for_lines(wanted) if wanted in line]
    return float(line.partition(" ms=")[2].partition(" ")[0])


def test_the_official_client_tries_again(narrow):
    """A 429 with Retry-After is what its retries are made for: all calls are served in the end."""
    with narrow.client(max_retries=8) as client, ThreadPoolExecutor(12) as pool:
        asked = body(20)
        asked.pop("ignore_eos")

        def one(_: int) -> str | None:
            reply = client.chat.completions.create(**asked, extra_body={"ignore_eos": True})
            return reply.choices[0].finish_reason

        assert set(pool.map(one, range(12))) == {"length"}


@pytest.fixture(scope="module")
def single() -> Any:
    """A server that runs one call at a time, and calls that take too long for it."""
    keys = ("greedy", "modest")
    with running_server(
        in_process=True, decode_workers=0, keys=keys, max_running=1, max_waiting=40, max_waiting_per_key=30,
        request_timeout_s=3.0, body_timeout_s=1.0, log_prompts=True,
    ) as server:  # fmt: skip
        yield server


def test_a_caller_with_many_calls_does_not_delay_the_others(single):
    ended: list[str] = []

    def one(key: str) -> None:
        reply, _ = call(single, body(30), key)
        ended.append(key if reply.status_code == 200 else f"{key} {reply.status_code}")

    threads = [threading.Thread(target=one, args=("greedy",)) for _ in range(12)]
    for thread in threads:
        thread.start()
    while single.stats()["gate"]["waiting"] < 8:
        time.sleep(0.005)
    before = len(ended)
    one("modest")
    after = ended.index("modest")
    for thread in threads:
        thread.join()
    assert after - before <= 4, ended  # not behind the eight that wait
    assert sum(each.startswith("greedy") for each in ended) == 12


def test_a_call_of_many_prompts_does_not_delay_another_key(single):
    """Each prompt has a place of its own, and between two of them another key has its turn."""
    ended: list[str] = []

    def one(key: str, **more: Any) -> None:
        with single.http(key) as client:
            asked = {"model": "qwen2vl-nano", "max_tokens": 8, "ignore_eos": True, "temperature": 0, **more}
            reply = client.post("/v1/completions", json=asked)
            assert reply.status_code == 200, reply.text
            ended.append(f"{key} {len(reply.json()['choices'])}")

    greedy = threading.Thread(target=one, args=("greedy",), kwargs={"prompt": [f"b{i}" for i in range(12)]})
    greedy.start()
    while single.stats()["gate"]["waiting"] < 1:
        time.sleep(0.005)
    one("modest", prompt="hello")
    greedy.join()
    assert ended == ["modest 1", "greedy 12"]
    assert_idle(single)


def test_one_key_has_so_many_live_feeds(single):
    with ExitStack() as feeds:

        def watch(key: str) -> int:
            client = feeds.enter_context(single.http(key))
            return feeds.enter_context(client.stream("GET", "/playground/live")).status_code

        assert [watch("greedy") for _ in range(9)] == [200] * 8 + [429]
        assert watch("modest") == 200
    assert_idle(single)


def test_an_answer_that_takes_too_long(single):
    start = time.perf_counter()
    reply, _ = call(single, body(4000), "modest")
    assert 2.5 < time.perf_counter() - start < 8.0
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
    with single.http("modest") as client, client.stream("POST", CHAT, json=body(4000, stream=True)) as stream:
        assert stream.status_code == 200
        lines = [line for line in stream.iter_lines() if line]
    assert '"code":"timeout"' in lines[-1].replace(" ", "")
    assert_idle(single)


def test_a_client_that_leaves_frees_all_it_held(single):
    def leave(stream: bool, after: float) -> None:
        content = json.dumps(body(4000, stream=stream)).encode()
        lines = ("Content-Type: application/json", "Authorization: Bearer greedy", f"Content-Length: {len(content)}")
        with wire(single) as connection:
            connection.send(head("POST", CHAT, *lines) + content)
            time.sleep(after)
            assert single.stats()["gate"]["running"] == 1

    for stream, after in ((False, 0.1), (True, 0.1), (False, 0.3), (True, 0.3)):
        leave(stream, after)
        assert_idle(single, within_s=1.0)


def test_a_client_that_does_not_read_is_dropped(single):
    ids = [single_long_token(single)] * 250_000
    content = json.dumps({"tokens": ids}).encode()
    lines = ("Content-Type: application/json", "Authorization: Bearer greedy", f"Content-Length: {len(content)}")
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(single.address)
        for _ in range(6):  # more than the kernel keeps for it
            deaf.sendall(head("POST", "/detokenize", *lines) + content)
        deadline = time.monotonic() + 10.0
        while single.stats()["gate"]["calls"] == 0:
            assert time.monotonic() < deadline
        while single.stats()["gate"]["calls"] > 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert_idle(single)


def single_long_token(server: Server) -> int:
    with server.http() as client:
        reply = client.post(
            "/tokenize", json={"prompt": "a rectangle triangle circle", "return_token_strs": True}
        ).json()
    return int(max(zip(reply["tokens"], reply["token_strs"], strict=True), key=lambda pair: len(pair[1]))[0])


def test_prompts_are_logged_where_that_is_asked_for_and_media_never(single, narrow):
    url = "data:image/png;base64,iVBORw0KGgoSECRETSECRET"
    parts = [{"type": "text", "text": "What is the word?"}, {"type": "image_url", "image_url": {"url": url}}]
    asked = {"model": "qwen2vl-nano", "messages": [{"role": "user", "content": parts}]}
    for server in (single, narrow):
        reply, _ = call(server, asked)
        assert reply.status_code == 400
        log = "\n".join(server.wait_for_lines(reply.headers["x-request-id"]))
        assert ("What is the word?" in log) == (server is single)
        assert "SECRET" not in log


def assert_idle(server: Server, within_s: float = 2.0) -> None:
    """Nothing runs and nothing waits, in the gate and in the engine, soon."""
    deadline = time.monotonic() + within_s
    while True:
        stats = server.stats()
        gate, engine = stats["gate"], stats["engine"]
        left = (gate["running"], gate["waiting"], engine.get("num_running", 0), engine.get("num_waiting", 0))
        if left == (0, 0, 0, 0):
            return
        assert time.monotonic() < deadline, left
        time.sleep(0.02)
