"""The engine's process is killed, frozen, or ended by a plugin, with calls in flight: the server tells, and goes on."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from support.openai_calls import QUESTIONS, question
from support.serving import Server, running_server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server(keys=("key-of-one",)) as running:
        yield running


def engine_of(server: Server) -> psutil.Process:
    """The child that runs the engine."""
    children = psutil.Process(server.pid).children(recursive=True)
    found = [p for p in children if any("engine.process" in part for part in p.cmdline())]
    assert len(found) == 1, [p.cmdline() for p in children]
    return found[0]


def body(max_tokens: int, **more: Any) -> dict[str, Any]:
    asked = {"messages": question(QUESTIONS[0]), "temperature": 0, "max_tokens": max_tokens, **more}
    return {"model": "qwen2vl-nano", "return_token_ids": True, **asked}


class InFlight:
    """Calls that would take long: what each got, and when."""

    def __init__(self, server: Server, count: int, tokens: int = 1800) -> None:
        self._tokens = tokens
        self.ended: list[tuple[float, int, str]] = []
        self._threads = [threading.Thread(target=self._ask, args=(server, i % 2 == 0)) for i in range(count)]
        for thread in self._threads:
            thread.start()
        deadline = time.monotonic() + 20
        while server.stats()["engine"]["running"] < count:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def _ask(self, server: Server, stream: bool) -> None:
        with server.http() as http:
            payload = body(self._tokens, ignore_eos=True, stream=stream)
            reply = http.post("/v1/chat/completions", json=payload)
        self.ended.append((time.monotonic(), reply.status_code, reply.text))

    def join(self) -> None:
        for thread in self._threads:
            thread.join(30)
        assert len(self.ended) == len(self._threads)


def health(server: Server) -> int:
    with server.http() as http:
        return http.get("/health").status_code


def until(server: Server, healthy: bool, timeout_s: float) -> float:
    """Seconds until /health says so."""
    start = time.monotonic()
    while (health(server) == 200) is not healthy:
        assert time.monotonic() - start < timeout_s
        time.sleep(0.02)
    return time.monotonic() - start


def tokens(server: Server) -> list[int]:
    with server.http() as http:
        reply = http.post("/v1/chat/completions", json=body(12))
    assert reply.status_code == 200, reply.text
    found: list[int] = reply.json()["choices"][0]["token_ids"]
    return found


def test_a_killed_engine_is_told_of_and_replaced(server: Server) -> None:
    wanted = tokens(server)
    flying = InFlight(server, 4)
    before = engine_of(server).pid
    killed = time.monotonic()
    os.kill(before, signal.SIGKILL)
    told = until(server, False, 2.0)
    flying.join()
    slowest = max(when for when, _, _ in flying.ended) - killed
    assert slowest < 5.0
    for _, status, text in flying.ended:
        assert status == 503 or (status == 200 and "engine_died" in text), (status, text[-300:])
        assert "engine_died" in text
    back = until(server, True, 60.0)
    assert engine_of(server).pid != before
    assert tokens(server) == wanted
    print(f"/health said so after {told:.2f} s, all calls had their error after {slowest:.2f} s, back in {back:.1f} s")


def test_calls_while_it_starts_again_are_told_to_come_back(server: Server) -> None:
    os.kill(engine_of(server).pid, signal.SIGKILL)
    until(server, False, 2.0)
    with server.http() as http:
        reply = http.post("/v1/chat/completions", json=body(4))
        assert reply.status_code == 503, reply.text
        assert int(reply.headers["retry-after"]) > 0
        assert reply.json()["error"]["code"] == "engine_died"
        assert http.get("/v1/models").status_code == 200
        assert http.get("/health/ready").status_code == 503
    until(server, True, 60.0)
    tokens(server)


def test_a_frozen_engine_is_told_of(server: Server) -> None:
    engine = engine_of(server)
    engine.suspend()
    try:
        told = until(server, False, 5.0)
    finally:
        engine.resume()
    until(server, True, 20.0)
    print(f"/health said so after {told:.2f} s")
    tokens(server)


@pytest.mark.slow
def test_the_server_ends_with_nothing_left_behind() -> None:
    with running_server(keys=("key-of-one",)) as running:
        children = psutil.Process(running.pid).children(recursive=True)
        assert any("engine.process" in " ".join(p.cmdline()) for p in children)
        running.process.kill()  # no time to say goodbye
        running.wait(10)
        gone, alive = psutil.wait_procs(children, timeout=5)
    assert not alive, [p.cmdline() for p in alive]
    assert len(gone) == len(children)


def test_health_answers_at_once_under_load(server: Server) -> None:
    flying = InFlight(server, 4, tokens=600)
    took = []
    with server.http() as http:
        for _ in range(100):
            start = time.perf_counter()
            assert http.get("/health").status_code == 200
            took.append(time.perf_counter() - start)
            time.sleep(0.01)
    took.sort()
    print(f"/health under load: p50 {1e3 * took[50]:.1f} ms, p99 {1e3 * took[98]:.1f} ms")
    with server.http(server.admin_key) as http:  # nothing of it depends on time, but that it answers
        assert isinstance(http.get("/health").json(), dict)
    flying.join()
    assert all(status == 200 for _, status, _ in flying.ended), [httpx.codes(s) for _, s, _ in flying.ended]
