"""A small body whose media are large once they are preprocessed."""

from __future__ import annotations

import base64
import io
import json
import socket
import time

import psutil
import pytest
from PIL import Image
from support.serving import running_server

SIDE, ITEMS = 3584, 38  # the family's highest max_pixels; 16384 tokens each, of a context of 4096
ALLOWED = 2**31  # of growth: what one request's media may take once they are decoded


def _url(colour: int) -> str:
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (colour, 7, 7)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@pytest.mark.slow
def test_a_request_does_not_ask_for_features_beyond_its_budget() -> None:
    """Each picture is 90 MB of patches, made for all before the prompt is found to be too long."""
    with running_server() as server:
        with server.http() as client:
            name = client.get("/v1/models").json()["data"][0]["id"]
        parts = [{"type": "image_url", "image_url": {"url": _url(i)}} for i in range(ITEMS)]
        asked = {
            "model": name, "max_tokens": 1, "messages": [{"role": "user", "content": parts}],
            "mm_processor_kwargs": {"max_pixels": SIDE * SIDE},
        }  # fmt: skip
        body = json.dumps(asked).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        process, answer = psutil.Process(server.pid), b""
        before = most = process.memory_info().rss
        with socket.create_connection(server.address, timeout=30.0) as client:
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            client.settimeout(0.02)
            until = time.monotonic() + 60.0
            while time.monotonic() < until and most - before < ALLOWED and not answer:
                most = max(most, process.memory_info().rss)
                try:
                    answer = client.recv(1000)
                except TimeoutError:
                    continue
    grown = (most - before) // 2**20
    assert most - before < ALLOWED, f"a call of {len(body) // 1000} kB took {grown} MiB"
