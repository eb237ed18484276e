"""From the start to the end of a server: what it says while it loads, how it drains, and how it stops."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
import time
from typing import Any

import httpx
import psutil
import pytest
from support.serving import Server, running_server, started_server

CHAT = "/v1/chat/completions"
FAST = {"in_process": True, "decode_workers": 0, "num_kv_blocks": 512}


def body(tokens: int, **more: Any) -> dict[str, Any]:
    asked = {"model": "qwen2vl-nano", "messages": [{"role": "user", "content": "Go on and on."}], "temperature": 0}
    return {**asked, "max_tokens": tokens, "ignore_eos": True, **more}


class Stream:
    """An answer that is being streamed, read in a thread."""

    def __init__(self, server: Server, tokens: int) -> None:
        self.events: list[str] = []
        self.error: Exception | None = None
        self.begun = threading.Event()
        self._server = server
        self._tokens = tokens
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            with (
                self._server.http() as client,
                client.stream("POST", CHAT, json=body(self._tokens, stream=True)) as reply,
            ):
                assert reply.status_code == 200, reply.read()
                for line in reply.iter_lines():
                    if line.startswith("data: "):
                        self.events.append(line.removeprefix("data: "))
                        if len(self.events) > 1:
                            self.begun.set()
        except Exception as error:
            self.error = error
        finally:
            self.begun.set()

    def wait_begun(self) -> None:
        """Until some of it came."""
        assert self.begun.wait(30)
        assert self.error is None, self.error

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()

    @property
    def whole(self) -> bool:
        """Whether it ended as it should."""
        finish = [json.loads(each)["choices"][0]["finish_reason"] for each in self.events[:-1]]
        return self.error is None and self.events[-1] == "[DONE]" and finish[-1] == "length"


def refused(server: Server) -> tuple[int, float, dict[str, Any], httpx.Headers]:
    """Status, seconds, error and headers of a new call on a new connection."""
    start = time.perf_counter()
    with server.http() as client:
        reply = client.post(CHAT, json=body(1))
    return reply.status_code, time.perf_counter() - start, reply.json().get("error"), reply.headers


def test_it_loads_serves_and_drains():
    port = free_port()
    with started_server(**FAST, port=port) as server:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            reply = first_reply(client)
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "starting")
            assert "retry-after" in reply.headers
        server.wait_ready()
        assert server.url == f"http://127.0.0.1:{port}"
        streams = [Stream(server, 400) for _ in range(2)]
        for stream in streams:
            stream.wait_begun()
        with server.http(server.admin_key) as watcher, watcher.stream("GET", "/admin/cache/events") as events:
            server.signal(signal.SIGTERM)
            server.wait_for_lines("draining")
            status, seconds, error, headers = refused(server)
            assert (status, error["code"]) == (503, "draining")
            assert int(headers["retry-after"]) >= 1
            assert seconds < 0.5  # 0.1 on a quiet machine
            with server.http() as client:
                assert (client.get("/health").status_code, client.get("/health/ready").status_code) == (200, 503)
                assert client.get("/health/ready").json()["draining"] is True
            for _ in events.iter_lines():  # a stream without an end ends
                pass
        assert not any(stream.events[-1] == "[DONE]" for stream in streams), "the answers were too short for this test"
        for stream in streams:
            stream.join()
            assert stream.whole, (stream.error, stream.events[-1:])
        assert server.wait() == 0
        assert "stopped" in server.lines[-1]


def test_calls_that_take_too_long_end_with_an_error():
    with running_server(**FAST, drain_timeout_s=0.5) as server:
        stream = Stream(server, 3500)
        stream.wait_begun()
        start = time.perf_counter()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert 0.4 < time.perf_counter() - start < 10.0
        stream.join()
        assert stream.error is None
        assert json.loads(stream.events[-1])["error"]["code"] == "engine_closed"


@pytest.mark.slow
def test_a_second_signal_ends_all_of_it_at_once():
    with running_server(decode_workers=1) as server:
        children = psutil.Process(server.pid).children(recursive=True)
        assert len(children) >= 2  # the engine's process, and one that decodes
        stream = Stream(server, 3500)
        stream.wait_begun()
        server.signal(signal.SIGINT)
        server.wait_for_lines("draining")
        start = time.perf_counter()
        server.signal(signal.SIGINT)
        assert server.wait() == 128 + signal.SIGINT
        assert time.perf_counter() - start < 2.0
        stream.join()
        assert stream.events[-1] != "[DONE]"
        assert psutil.wait_procs(children, timeout=5.0)[1] == []


@pytest.mark.slow
def test_a_signal_while_it_loads_leaves_nothing():
    with started_server() as server:
        server.wait_for_lines("loading", 60.0)
        deadline = time.monotonic() + 30.0
        while not (children := psutil.Process(server.pid).children(recursive=True)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        server.signal(signal.SIGTERM)
        assert server.wait(5) == 0
        assert psutil.wait_procs(children, timeout=5.0)[1] == []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def first_reply(client: httpx.Client) -> httpx.Response:
    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            return client.get("/health/ready")
        time.sleep(0.01)
    raise AssertionError("nobody listens")


def test_a_model_that_cannot_be_loaded_is_told_in_one_line(tmp_path):
    with started_server(tmp_path, **FAST) as server:
        assert server.wait(60) == 1
        lines = server.wait_for_lines("mm: error:")
    assert "config.json" in lines[-1]
    assert not any("Traceback" in line for line in lines)
