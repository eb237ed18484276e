"""A thousand calls, a third of which leave at random moments: nothing stays behind, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support.openai_calls import QUESTIONS, question
from support.serving import Server, running_server

AT_ONCE = 48
FREED_WITHIN_S = 1.0


@pytest.fixture(scope="module")
def stormed() -> Iterator[Server]:
    """With a KV cache that holds a few requests only, so that aborts meet queued and preempted ones too."""
    with running_server(keys=("key-of-one",), num_kv_blocks=160, max_running=24) as running:
        yield running


def body(row: int, stream: bool) -> dict[str, Any]:
    asked = {"messages": question(QUESTIONS[row]), "temperature": 0, "max_tokens": 24, "ignore_eos": True}
    return {"model": "qwen2vl-nano", "stream": stream, "return_token_ids": True, **asked}


async def call(server: Server, payload: dict[str, Any], leave_after: float | None) -> bytes | None:
    """The reply's body; None where the caller left."""
    data = json.dumps(payload).encode()
    host, port = server.address
    reader, writer = await asyncio.open_connection(host, port)
    lines = [
        "POST /v1/chat/completions HTTP/1.1", f"Host: {host}:{port}", "Connection: close",
        f"Authorization: Bearer {server.keys[0]}", "Content-Type: application/json", f"Content-Length: {len(data)}",
    ]  # fmt: skip
    try:
        writer.write("\r\n".join([*lines, "", ""]).encode() + data)
        reply = asyncio.ensure_future(reader.read(-1))
        done, _ = await asyncio.wait([reply], timeout=leave_after)
        if not done:
            reply.cancel()
            writer.transport.abort()
            return None
        status, _, rest = (await reply).partition(b"\r\n")
        assert b" 200 " in status, (status, rest[-600:])
        return rest.partition(b"\r\n\r\n")[2]
    finally:
        writer.close()


def tokens_of(reply: bytes, stream: bool) -> list[int]:
    """An answer's ids, of a whole reply or of its events; chunk sizes of HTTP stand on lines of their own."""
    lines = reply.decode().splitlines()
    if not stream:
        whole = next(line for line in lines if line.startswith("{"))
        found: list[int] = json.loads(whole)["choices"][0]["token_ids"]
        return found
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return [i for event in events for choice in event["choices"] for i in choice.get("token_ids") or ()]


def held(server: Server) -> list[int]:
    """What nobody should hold when all have gone."""
    stats = server.stats()
    engine, gate = stats["engine"], stats["gate"]
    blocks = engine["blocks"]
    return [engine["running"], engine["waiting"], blocks["in_use"], blocks["pending"], gate["running"], gate["waiting"]]


def storm(server: Server, count: int, seed: int) -> None:
    chance = random.Random(seed)
    rows = list(range(0, len(QUESTIONS), 2))
    wanted = {row: tokens_of(asyncio.run(call(server, body(row, False), None)) or b"", False) for row in rows}
    assert all(len(ids) == 24 for ids in wanted.values())
    kinds = [(chance.choice(rows), chance.random() < 0.5, chance.random() < 1 / 3) for _ in range(count)]
    begun = time.monotonic()
    took: list[float] = []  # of calls that were let through

    async def one(gate: asyncio.Semaphore, row: int, stream: bool, leaves: bool) -> bool:
        async with gate:
            usual = max(took[-20:], default=0.5)
            start = time.monotonic()
            reply = await call(server, body(row, stream), chance.uniform(0.0, usual) if leaves else None)
            if reply is None:
                return False
            took.append(time.monotonic() - start)
            assert tokens_of(reply, stream) == wanted[row]
            return True

    async def all_of_them() -> list[bool]:
        gate = asyncio.Semaphore(AT_ONCE)
        return await asyncio.gather(*(one(gate, *kind) for kind in kinds))

    ended = asyncio.run(all_of_them())
    left = ended.count(False)
    assert count / 6 < left < count / 2, "some left in time, and most stayed"
    freed = time.monotonic()
    while any(held(server)):
        assert time.monotonic() - freed < 10, held(server)
        time.sleep(0.02)
    print(
        f"{count} calls, {left} of them left, in {freed - begun:.1f} s; all was free {time.monotonic() - freed:.2f} s "
        f"after the last; {server.stats()['engine']['preemptions']} preemptions"
    )
    assert wanted[rows[0]] == tokens_of(asyncio.run(call(server, body(rows[0], True), None)) or b"", True)


def test_calls_that_leave_free_all_and_change_nothing(stormed: Server) -> None:
    storm(stormed, 150, seed=1)


def test_what_an_aborted_call_held_is_free_within_a_second(stormed: Server) -> None:
    """One call at a time, so that the time is the abort's alone."""
    slowest = 0.0
    for after in (0.01, 0.05, 0.1, 0.2):
        payload = {**body(0, True), "max_tokens": 1500}
        assert asyncio.run(call(stormed, payload, after)) is None
        left = time.monotonic()
        while any(held(stormed)):
            time.sleep(0.01)
            assert time.monotonic() - left < 10
        slowest = max(slowest, time.monotonic() - left)
    print(f"free after {slowest:.3f} s at most")
    assert slowest < FREED_WITHIN_S


@pytest.mark.slow
def test_a_thousand_calls(stormed: Server) -> None:
    storm(stormed, 1000, seed=2)
