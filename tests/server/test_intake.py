"""Media of a call's messages, before the engine sees them."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.web import ok, web

from mm_core.config import SamplingParams
from mm_core.errors import (
    InvalidPromptError,
    MediaBlockedError,
    MediaDecodeError,
    MediaError,
    MediaFetchError,
    MediaTooLargeError,
    RequestError,
    TooManyMediaError,
    UnsupportedMediaError,
)
from mm_core.inputs.messages import read_messages
from mm_core.server import intake as module
from mm_core.server.config import MediaConfig
from mm_core.server.context import ANYBODY, Call
from mm_core.server.fetcher import Network
from mm_core.server.intake import MediaIntake
from mm_core.server.metrics import Metrics
from mm_core.server.streaming import run
from mm_core.types import MODALITIES, CompletionOutput, RequestOutput, Usage

BYTES = b"any bytes at all"


def url_of(data: bytes = BYTES, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image(url: Any, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": None if url is None else {"url": url}, **more}


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def call() -> Call:
    return Call("/v1/chat/completions", ANYBODY)


def read(messages: Any, **options: Any) -> list[dict[str, Any]]:
    return asyncio.run(MediaIntake(MediaConfig(**options)).read_messages(messages, call()))


def refused(kind: type[RequestError], messages: Any, code: str, **options: Any) -> RequestError:
    with pytest.raises(kind) as caught:
        read(messages, **options)
    assert type(caught.value) is kind
    assert (caught.value.code, caught.value.param) == (code, "messages")
    return caught.value


def test_parts_become_bytes() -> None:
    text = {"type": "text", "text": "What is it?"}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [
            image(url_of(), uuid="one"), text, image(None, uuid="two"),
            {"type": "input_audio", "input_audio": {"data": base64.b64encode(b"sound").decode(), "format": "mp3"}},
            {"type": "audio_url", "audio_url": {"url": url_of(b"other", "audio/wav")}},
            {"type": "video_url", "video_url": {"url": url_of(b"film", "video/mp4")}, "uuid": "v"},
            {"type": "image", "uuid": "three"},
        ]},
    ]  # fmt: skip
    found = read(messages)
    assert found[0] == messages[0]
    assert found[1]["content"] == [
        {"type": "image", "image": BYTES, "uuid": "one"}, text, {"type": "image", "image": None, "uuid": "two"},
        {"type": "audio", "audio": b"sound"}, {"type": "audio", "audio": b"other"},
        {"type": "video", "video": b"film", "uuid": "v"}, {"type": "image", "image": None, "uuid": "three"},
    ]  # fmt: skip
    plain, items = read_messages(found, "any", MODALITIES)  # as the engine reads them
    assert [(item.modality, item.value, item.uuid) for item in items][:2] == [
        ("image", BYTES, "one"),
        ("image", None, "two"),
    ]
    assert len(plain[1]["content"]) == 7


@pytest.mark.parametrize(
    "part",
    [
        image("x") | {"video_url": {"url": "x"}}, {"type": "image_url", "image_url": "data:,"}, {"type": "smell"},
        {"type": "image_url", "image_url": ["x"]}, {"type": "image_url", "image_url": {}}, {"type": "image_url"},
        {"type": "image_url", "image_url": {"url": 3}}, {"type": "image_url", "image_url": {"url": "x",
        "detail": "high"}},
        {"type": "image_url", "image_url": {"url": "x", "detail": 0}}, image(None), {"type": None}, {}, "text", None,
        image("x", uuid=""), image("x", uuid="a" * 129), image("x", uuid="../x"), image("x", uuid=3), image("x",
        uuid="a\0"),
        {"type": "image", "image": b"bytes"}, {"type": "image", "image": [1]}, {"type": ["image_url"]},
        {"type": "input_audio", "input_audio": {"url": "x"}}, {"type": "input_audio", "input_audio": "x"},
    ],
)  # fmt: skip
def test_parts_of_the_wrong_shape(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "decode_data_url", lambda *a: pytest.fail("decoded"))
    refused(InvalidPromptError, user(image(url_of()), part), "invalid_prompt")


def test_media_are_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "decode_data_url", lambda *a: pytest.fail("decoded"))
    for role in ("system", "assistant", "tool", None):
        refused(
            InvalidPromptError, [*user(image(url_of())), {"role": role, "content": [image(url_of())]}], "invalid_prompt"
        )


def test_counts_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """No byte of 64 images is looked at where 8 are allowed."""
    monkeypatch.setattr(module, "decode_data_url", lambda *a: pytest.fail("decoded"))
    monkeypatch.setattr(module.UrlFetcher, "fetch", lambda *a: pytest.fail("fetched"))
    urls = [url_of(), "https://media.example.org/x.png"] * 32
    refused(TooManyMediaError, user(*map(image, urls)), "too_many_media", max_items=8)
    intake = MediaIntake(MediaConfig(), ("image", "video"), {"image": 8, "video": 0})
    with pytest.raises(TooManyMediaError, match="limit is 8"):
        asyncio.run(intake.read_messages(user(*map(image, urls)), call()))
    with pytest.raises(TooManyMediaError):
        asyncio.run(intake.read_media_data({"image": urls}, None, call()))
    with pytest.raises(TooManyMediaError, match="limit is 0"):
        asyncio.run(intake.read_media_data({"video": urls[0]}, None, call()))
    with pytest.raises(UnsupportedMediaError, match="image and video, not audio"):
        asyncio.run(intake.read_url("audio", url_of(), call()))
    start = time.monotonic()
    refused(TooManyMediaError, user(*[image("data:x")] * 10_000), "too_many_media")
    assert time.monotonic() - start < 2.0


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,", "data:image/png,xyz", "data:image/png;base64", "data:", "data:,",
        "data:text/html;base64,eHl6",
        "data:image/png;base64,eHl6\n", "data:image/png;base64,eHl6 ", "data:image/png;base64,eH l6",
        "data:image/png;base64,_-_-", "data:image/png;base64,eHl", "data:image/png;base64,eA=",
        "data:image/png;base64,=eHl",
        "data:image/png;base64,eA==eA==", "data:image/png;base64,eHl6=", "data:image/png;base64,eHl6====",
        "data:image/png;base64,%65Hl6", "data:image/png;base64,eHlä", "data:audio/wav;base64,eHl6",
        "data:image/png;base64;eHl6",
    ],
)  # fmt: skip
def test_data_urls_are_strict(url: str) -> None:
    refused(MediaDecodeError, user(image(url)), "invalid_image")
    if "," in url and url.endswith(tuple("=\n -6")) and "text" not in url and not url.startswith("data:image/png,"):
        plain = {"type": "input_audio", "input_audio": {"data": url.partition(",")[2]}}
        if plain["input_audio"]["data"] != "eHl6":
            refused(MediaDecodeError, user(plain), "invalid_audio")


def test_large_data_urls_are_strict_too() -> None:
    """They are decoded in pieces, elsewhere; no piece may be padded but the last."""
    data = bytes(range(256)) * 5000
    whole = base64.b64encode(data).decode()
    assert len(whole) > 2**20
    assert read(user(image("data:image/png;base64," + whole)))[0]["content"][0]["image"] == data
    for at in (1000, 2**20 - 2, 2**20):
        for wrong in ("=", "==", "\n", "-", "é"):
            broken = whole[:at] + wrong + whole[at + len(wrong) :]
            refused(MediaDecodeError, user(image("data:image/png;base64," + broken)), "invalid_image")


def test_the_loop_goes_on_while_bytes_are_decoded() -> None:
    url = "data:image/png;base64," + base64.b64encode(bytes(30 * 2**20)).decode()

    async def go() -> float:
        intake = MediaIntake(MediaConfig())
        task = asyncio.ensure_future(intake.read_messages(user(image(url)), call()))
        worst, last = 0.0, time.perf_counter()
        while not task.done():
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            worst, last = max(worst, now - last), now
        assert len(task.result()[0]["content"][0]["image"]) == 30 * 2**20
        return worst

    assert asyncio.run(go()) < 0.2


def test_sizes_are_bounded_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(user(image(url_of(bytes(999)))), max_part_bytes=999)
    refused(MediaTooLargeError, user(*[image(url_of(bytes(900)))] * 3), "media_too_large", max_total_bytes=2500)
    monkeypatch.setattr("mm_core.media.encoded.msgspec.convert", lambda *a, **k: pytest.fail("decoded"))
    refused(MediaTooLargeError, user(image(url_of(bytes(1002)))), "media_too_large", max_part_bytes=999)


def test_frames_of_a_video() -> None:
    frames = [b"one", b"twos"]
    url = "data:video/jpeg;base64," + ",".join(base64.b64encode(frame).decode() for frame in frames)
    part = {"type": "video_url", "video_url": {"url": url}}
    assert read(user(part))[0]["content"][0] == {"type": "video", "video": frames}
    many = {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64," + "eHl6," * 100_000}}
    start = time.monotonic()
    refused(MediaTooLargeError, user(many), "media_too_large")
    assert time.monotonic() - start < 0.5
    empty = {"type": "video_url", "video_url": {"url": url + ","}}
    refused(MediaDecodeError, user(empty), "invalid_video")


@pytest.mark.parametrize(
    "url",
    ["ftp://a.org/x", "gopher://a.org/", "s3://bucket/x", "javascript:alert(1)", "://x", "//a.org/x", "/etc/passwd",
    "x.png",
     "", "C:\\x.png", "file:///etc/passwd", "https://media.example.org/x.png", "http://127.0.0.1/",
     " data:image/png;base64,eHl6",
     "\0", "d" * 100_000],
)  # fmt: skip
def test_what_is_not_read_by_default(url: str) -> None:
    fault = refused(MediaBlockedError, user(image(url)), "url_blocked")
    assert len(str(fault)) < 300
    assert "data:" in str(fault)


def test_files_below_the_allowed_path(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(BYTES)
    found = read(user(image(f"file://{tmp_path}/a.png")), allowed_path=tmp_path)
    assert found[0]["content"] == [{"type": "image", "image": BYTES}]
    refused(MediaBlockedError, user(image("file:///etc/passwd")), "url_blocked", allowed_path=tmp_path)
    refused(MediaBlockedError, user(image(str(tmp_path / "a.png"))), "url_blocked", allowed_path=tmp_path)
    refused(
        MediaTooLargeError,
        user(image(f"file://{tmp_path}/a.png")),
        "media_too_large",
        allowed_path=tmp_path,
        max_part_bytes=5,
    )


async def loopback(host: str, port: int) -> Sequence[str]:
    return ["127.0.0.1"]


def test_fetching() -> None:
    """Several at a time; the first fault ends all; how long they took is told."""

    async def slow(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(30)

    async def go() -> None:
        replies: dict[str, Any] = {f"/{n}": ok(b"%d" % n) for n in range(8)} | {"/slow": slow}
        async with web(replies) as at:
            config = MediaConfig(allowed_domains=("media.example.org",), allow_http=True, max_part_bytes=100)
            network = Network(loopback, lambda a: True, {"http": at.port, "https": at.port})
            seconds: list[float] = []
            intake = MediaIntake(config, network=network, on_fetch=seconds.append)
            base = f"http://media.example.org:{at.port}"
            asked = call()
            found = await intake.read_messages(user(*[image(f"{base}/{n}") for n in range(8)]), asked)
            assert [part["image"] for part in found[0]["content"]] == [b"%d" % n for n in range(8)]
            assert len(seconds) == 8
            assert asked.phase == "read"
            data = {"image": [f"{base}/3", None], "video": url_of(b"film", "video/mp4")}
            assert await intake.read_media_data(data, {"image": [None, "x"], "audio": ["a", "b"]}, asked) == {
                "image": [b"3", None], "video": [b"film"], "audio": [None, None],
            }  # fmt: skip
            assert await intake.read_url("audio", f"{base}/5", asked) == b"5"
            start = time.monotonic()
            with pytest.raises(MediaFetchError) as caught:
                await intake.read_messages(user(image(f"{base}/slow"), image(f"{base}/missing")), asked)
            assert caught.value.param == "messages"
            assert time.monotonic() - start < 5.0
            task = asyncio.ensure_future(intake.read_messages(user(image(f"{base}/slow")), asked))
            await asyncio.sleep(0.1)
            assert asked.phase == "fetch"
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert asked.phase == "read"

    asyncio.run(go())


@pytest.mark.parametrize(
    ("data", "kind"),
    [({"smell": ["x"]}, UnsupportedMediaError), ({"image": [3]}, InvalidPromptError), ({"image": {"url": "x"}},
     InvalidPromptError),
     ({"image": ["/etc/passwd"]}, MediaBlockedError), ({"image": [["x"]]}, InvalidPromptError)],
)  # fmt: skip
def test_media_data_of_the_wrong_shape(data: Any, kind: type[MediaError]) -> None:
    with pytest.raises(kind) as caught:
        asyncio.run(MediaIntake(MediaConfig()).read_media_data(data, None, call()))
    assert caught.value.param == "multi_modal_data"
    assert json.dumps(str(caught.value))


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_says_of_the_media_is_the_calls(stream: bool) -> None:
    """Once, and before the first piece of the answer goes out."""
    output = RequestOutput("r", (1,), (CompletionOutput(0, "x", (1,), "stop"),), Usage(1), True, None, ("cut off",))

    class Engine:
        async def generate(self, *given: Any, **options: Any) -> RequestOutput:
            return output

        async def stream(self, *given: Any, **options: Any) -> Any:
            for _ in range(3):
                yield output

    context: Any = SimpleNamespace(engine=Engine(), metrics=Metrics("m"))

    async def go() -> None:
        asked = call()
        async for _ in run(context, asked, "hello", SamplingParams(), stream=stream):
            assert asked.warnings == ["cut off"]

    asyncio.run(go())
