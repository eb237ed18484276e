"""Grammars of callers that are gone, or of one key, must not keep others waiting."""

from __future__ import annotations

import json
import random
import socket
import string
import time

from support.serving import Server


def _slow_schema(dice: random.Random) -> dict[str, object]:
    """4 kB that take more than the second that one grammar may."""
    words = ["".join(dice.choices(string.ascii_lowercase, k=4)) for _ in range(42)]
    return {
        "allOf": [
            {"anyOf": [{"type": "object", "properties": {w: {"type": "string", "pattern": w + ".*"}}} for w in part]}
            for part in (words[:14], words[14:28], words[28:])
        ]
    }


def _body(server: Server, more: dict[str, object]) -> bytes:
    with server.http() as client:
        name = client.get("/v1/models").json()["data"][0]["id"]
    asked = {"model": name, "max_tokens": 2, "messages": [{"role": "user", "content": "x"}], **more}
    return json.dumps(asked).encode()


def test_grammars_of_clients_that_left_are_not_compiled(server: Server) -> None:
    dice, keys = random.Random(0), server.keys
    with server.http(keys[1]) as other:
        plain = _body(server, {"structured_outputs": {"regex": "[ab]"}})
        headers = {"Content-Type": "application/json"}
        assert other.post("/v1/chat/completions", content=plain, headers=headers).status_code == 200  # warm
        for _ in range(8):
            schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": _slow_schema(dice)}}
            body = _body(server, {"response_format": schema})
            with socket.create_connection(server.address) as gone:
                head = (
                    "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                    f"Authorization: Bearer {keys[0]}\r\nContent-Length: {len(body)}\r\n\r\n"
                )
                gone.sendall(head.encode() + body)
                time.sleep(0.1)
        asked = _body(server, {"structured_outputs": {"regex": "[cd]"}})
        start = time.perf_counter()
        assert other.post("/v1/chat/completions", content=asked, headers=headers).status_code == 200
        took = time.perf_counter() - start
        assert took < 3.0, f"one character class took {took:.1f} s behind 8 grammars that nobody waits for"
