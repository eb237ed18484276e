"""The caches in an operator's hands, over HTTP."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image, ImageDraw
from support.serving import ADMIN_KEY, Server

from mm_core.server.salts import caller_of

ONE, TWO = caller_of("key-of-one").name, caller_of("key-of-two").name
LONG = "Something about this prompt has to be long, or no block of the cache would be full, and nothing would be kept."


@pytest.fixture
def admin(server: Server) -> Iterator[httpx.Client]:
    with server.http(ADMIN_KEY) as client:
        client.post("/admin/cache/clear")
        yield client
        client.post("/admin/cache/clear")


def post(client: httpx.Client, what: str, **body: Any) -> dict[str, Any]:
    reply = client.post(f"/admin/cache/{what}", json=body)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def ask(server: Server, key: str, content: Any, **more: Any) -> httpx.Response:
    body = {"model": "qwen2vl-nano", "messages": [{"role": "user", "content": content}], "max_tokens": 4, **more}
    with server.http(key) as client:
        return client.post("/v1/chat/completions", json={"temperature": 0, **body})


def cached(reply: httpx.Response) -> int:
    assert reply.status_code == 200, reply.text
    return int(reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def picture() -> str:
    image = Image.new("RGB", (224, 168), "white")
    ImageDraw.Draw(image).ellipse((60, 30, 160, 130), fill="red")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def part(uuid: str | None = None, *, url: str | None = None) -> dict[str, Any]:
    named = {} if uuid is None else {"uuid": uuid}
    return {"type": "image_url", "image_url": None if url is None else {"url": url}, **named}


def test_what_is_warmed_is_found_by_its_caller_and_nobody_else(server, admin):
    messages = [{"role": "user", "content": LONG}]
    warmed = post(admin, "warm", messages=messages, caller=ONE)
    assert warmed["prompt_tokens"] > warmed["cached_tokens"] == 0
    assert post(admin, "lookup", messages=messages, caller=ONE)["device_tokens"] > 0
    assert post(admin, "lookup", messages=messages, caller=TWO)["device_tokens"] == 0
    assert post(admin, "lookup", messages=messages, caller=ONE, cache_salt="x")["device_tokens"] == 0
    assert cached(ask(server, "key-of-two", LONG)) == 0
    assert cached(ask(server, "key-of-one", LONG)) > 0


def test_evicting_a_caller_leaves_the_others(server, admin):
    for key in ("key-of-one", "key-of-two"):
        ask(server, key, LONG)
    assert post(admin, "evict", caller=ONE)["kv_blocks"] > 0
    assert cached(ask(server, "key-of-one", LONG)) == 0
    assert cached(ask(server, "key-of-two", LONG)) > 0


def test_an_item_is_pinned_used_by_its_name_and_forgotten(server, admin):
    content = [part("figure-1", url=picture()), {"type": "text", "text": "What shape is red?"}]
    post(admin, "warm", messages=[{"role": "user", "content": content}], caller=ONE, pin=True)
    assert post(admin, "pin", uuid="figure-1", caller=ONE)["encoder_rows"] > 0
    by_name = [part("figure-1"), {"type": "text", "text": "What shape is red?"}]
    assert cached(ask(server, "key-of-one", by_name)) > 0
    other = ask(server, "key-of-two", by_name)
    assert (other.status_code, other.json()["error"]["code"]) == (400, "media_not_cached")
    assert post(admin, "unpin", uuid="figure-1", caller=ONE) == {"done": True}
    assert post(admin, "evict", uuid="figure-1", caller=ONE)["features"] == 1
    gone = ask(server, "key-of-one", by_name)
    assert gone.json()["error"]["code"] == "media_not_cached"


@pytest.mark.parametrize(
    ("what", "body", "code"),
    [
        ("pin", {"uuid": "never", "caller": ONE}, "media_not_cached"),
        ("unpin", {"uuid": "never", "caller": ONE}, "media_not_cached"),
        ("pin", {"uuid": "never"}, "invalid_params"),  # whose?
        ("pin", {"uuid": "never", "caller": "key-00000000"}, "invalid_params"),
        ("pin", {"caller": ONE}, "invalid_body"),
        ("pin", {"uuid": "../x", "caller": ONE}, "invalid_body"),
        ("pin", {"uuid": "x", "caller": ONE, "cache_salt": "a b"}, "invalid_body"),
        ("evict", {}, "invalid_params"),
        ("warm", {"caller": ONE}, "invalid_params"),
        ("warm", {"caller": ONE, "prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "invalid_params"),
        ("warm", {"caller": ONE, "prompt": "a", "pin": True}, "invalid_params"),
        ("warm", {"caller": ONE, "prompt": "a", "mm_processor_kwargs": {"x": 1}}, "invalid_params"),
        ("lookup", {"caller": ONE, "prompt": 1}, "invalid_body"),
    ],
)
def test_what_is_refused(admin, what, body, code):
    reply = admin.post(f"/admin/cache/{what}", json=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, code), reply.text


def test_stats_tell_what_there_is(server, admin):
    ask(server, "key-of-one", LONG)
    levels = admin.get("/admin/cache/stats").json()
    assert set(levels) == {"processor", "encoder", "device", "host", "disk"}
    assert levels["device"]["entries"] > 0
    inside = server.stats()
    assert inside["gate"]["running"] == inside["gate"]["waiting"] == 0
    assert inside["health"]["state"] == "ready"
    assert inside["process"]["pid"] == server.pid
    assert inside["process"]["open_files"] > 3
    assert inside["engine"]


def test_events_tell_of_changes_and_end_with_the_client(server, admin):
    seen: list[dict[str, Any]] = []
    listening, told = threading.Event(), threading.Event()

    def listen() -> None:
        with (
            server.http(ADMIN_KEY) as client,
            client.stream("GET", "/admin/cache/events") as reply,
        ):
            assert reply.headers["content-type"].startswith("text/event-stream")
            listening.set()
            for line in reply.iter_lines():
                if line.startswith("data: "):
                    seen.append(json.loads(line.removeprefix("data: ")))
                    told.set()
                    return

    thread = threading.Thread(target=listen)
    thread.start()
    assert listening.wait(10)
    ask(server, "key-of-one", LONG)
    assert told.wait(10)
    thread.join()
    assert (seen[0]["kind"], seen[0]["cache"], seen[0]["level"]) == ("stored", "kv", "device")
    assert len(bytes.fromhex(seen[0]["key"])) >= 16
    assert caller_of("key-of-one").salt not in json.dumps(seen)
