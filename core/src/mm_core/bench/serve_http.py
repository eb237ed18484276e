"""One HTTP exchange with a server that is measured: little work a chunk, the time of each event, nothing hidden.

A client of its own, because the usual ones take as long for an event as a fast server does. HTTP/1.1, a connection
an exchange; answers may be chunked, of a given length, or end with the connection.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec

from mm_core.errors import ConfigError

MAX_HEAD, MAX_BODY = 2**16, 2**28  # bytes
_ERROR_SHOWN = 200


class _Text(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    delta: _Text | None = None
    message: _Text | None = None
    text: str | None = None
    token_ids: list[int] | None = None

    @property
    def words(self) -> str:
        """Everything that is text in it."""
        told = self.delta or self.message
        parts = (told.reasoning_content or told.reasoning, told.content) if told is not None else (self.text,)
        return "".join(part for part in parts if part)


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """Token counts as the server tells them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None

    @property
    def cached(self) -> int | None:
        """Prompt tokens from a cache; None where the server does not tell."""
        return None if self.prompt_tokens_details is None else self.prompt_tokens_details.cached_tokens


class Event(msgspec.Struct):
    """A whole reply, or one event of a stream. Fields that are not here are skipped unread."""

    choices: list[_Choice] = []
    usage: Usage | None = None
    error: Any = None
    code: Any = None
    message: Any = None


_decode_event = msgspec.json.Decoder(Event).decode


@dataclass(frozen=True)
class Target:
    """Where to ask. base: path before `/chat/completions`. root: path before `/health`. tls: None for plain HTTP."""

    host: str
    port: int
    base: str
    root: str
    key: str | None = None
    tls: ssl.SSLContext | None = None

    @classmethod
    def of(cls, url: str, key: str | None = None) -> Target:
        """From `http://HOST:PORT`, with or without `/v1`. Raises ConfigError."""
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.query or parts.fragment:
            raise ConfigError(f"--url {url[:100]} is no address of a server. It looks like http://localhost:8000.")
        path = parts.path.rstrip("/")
        root = path.removesuffix("/v1")
        tls = ssl.create_default_context() if parts.scheme == "https" else None
        return cls(parts.hostname, port or (443 if tls else 80), f"{root}/v1", root, key, tls)

    def head(self, method: str, path: str, length: int) -> bytes:
        """The head of a call whose body has `length` bytes."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"{method} {path} HTTP/1.1", f"Host: {host}:{self.port}", "Connection: close", "Accept: */*"]
        if self.key:
            lines.append(f"Authorization: Bearer {self.key}")
        if length:
            lines += ["Content-Type: application/json", f"Content-Length: {length}"]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")


@dataclass(slots=True)
class Reply:
    """What came of a call. Times are in seconds of `time.perf_counter()`.

    started: when the connection was asked for. times: of the events that brought text, or tokens where the server tells
    their ids (of a reply that is no stream: none). ended: when the last byte that counts had come. error: what went
    wrong, as a short kind; detail: more of it.
    """

    started: float = 0.0
    ended: float = 0.0
    status: int = 0
    streamed: bool = False
    finished: bool = False
    times: list[float] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    usage: Usage | None = None
    body: bytes = b""
    error: str | None = None
    detail: str = ""

    def fail(self, kind: str, detail: str = "") -> None:
        """Note what went wrong; the first fault is kept."""
        if self.error is None:
            self.error, self.detail = kind, detail[:_ERROR_SHOWN]

    def take(self, event: Event, when: float, streamed: bool) -> None:
        """Read an event, or a whole reply."""
        if event.error is not None:
            kind, text = _fault(event.error)
            self.fail(f"stream error{kind}", text)
        news = False
        for choice in event.choices:
            if words := choice.words:
                self.words.append(words)
            news = news or bool(words or choice.token_ids)
        if news and streamed:
            self.times.append(when)
        if event.usage is not None:
            self.usage = event.usage


def _fault(error: Any) -> tuple[str, str]:
    """ " code" and the message of an error body."""
    if isinstance(error, dict):
        code = error.get("code") or error.get("type")
        return (f" {code}" if code else ""), str(error.get("message", ""))
    return "", str(error)


class _Exchange(asyncio.Protocol):
    """Sends one call and reads its answer into a Reply; `done` is set when nothing more will come."""

    def __init__(self, pieces: Sequence[bytes], reply: Reply, done: asyncio.Future[None]) -> None:
        self._pieces = pieces
        self._reply = reply
        self._done = done
        self._buffer = b""
        self._headers: dict[bytes, bytes] | None = None
        self._left: int | None = None  # bytes of the chunk or of the body that have not come; None: not known
        self._chunked = False
        self._body: list[bytes] = []
        self._size = 0
        self._stream = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.writelines(self._pieces)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._buffer = self._buffer + data if self._buffer else data
        try:
            if self._headers is None and not self._read_head():
                return
            self._read_body(now)
        except (ValueError, IndexError) as error:
            self._finish(f"no HTTP ({type(error).__name__})")

    def connection_lost(self, exc: Exception | None) -> None:
        reply = self._reply
        if not reply.ended:
            reply.ended = time.perf_counter()
        if self._headers is not None and exc is None and not self._chunked and self._left is None:
            self._finish()  # a body that ends with the connection
        elif reply.streamed:
            self._finish(None if reply.finished else "broken stream")
        else:
            self._finish("connection closed" if self._headers is None else "broken reply")

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > MAX_HEAD:
                raise ValueError
            return False
        first, *lines = self._buffer[:end].split(b"\r\n")
        self._buffer = self._buffer[end + 4 :]
        status = int(first.split(b" ", 2)[1])
        if not first.startswith(b"HTTP/1."):
            raise ValueError
        if 100 <= status < 200:  # what comes before the answer
            return self._read_head()
        self._reply.status = status
        self._headers = {}
        for line in lines:
            name, _, value = line.partition(b":")
            self._headers[name.strip().lower()] = value.strip().lower()
        self._chunked = b"chunked" in self._headers.get(b"transfer-encoding", b"")
        if not self._chunked and b"content-length" in self._headers:
            self._left = int(self._headers[b"content-length"])
        kind = self._headers.get(b"content-type", b"")
        self._reply.streamed = self._reply.status == 200 and kind.startswith(b"text/event-stream")
        return True

    def _read_body(self, now: float) -> None:
        if not self._chunked:
            data, self._buffer = self._buffer, b""
            self._take(data, now)
            if self._left is not None:
                self._left -= len(data)
                if self._left <= 0:
                    self._end(now)
            return
        while self._buffer:
            if not self._left:
                end = self._buffer.find(b"\r\n")
                if end < 0:
                    return
                size = int(self._buffer[:end].split(b";", 1)[0], 16)
                self._buffer = self._buffer[end + 2 :]
                if size == 0:
                    self._end(now)
                    return
                self._left = size + 2
            data = self._buffer[: self._left]
            self._buffer = self._buffer[self._left :]
            self._left -= len(data)
            # The chunk's last two bytes are its end of line, which may come in two pieces.
            cut = max(0, 2 - self._left)
            self._take(data[: len(data) - cut] if cut else data, now)

    def _take(self, data: bytes, now: float) -> None:
        if not data:
            return
        if not self._reply.streamed:
            self._size += len(data)
            if self._size > MAX_BODY:
                raise ValueError
            self._body.append(data)
            return
        data = (self._stream + data).replace(b"\r\n", b"\n")
        *events, self._stream = data.split(b"\n\n")
        if len(self._stream) > MAX_BODY:
            raise ValueError
        for event in events:
            self._read_event(event, now)

    def _read_event(self, event: bytes, now: float) -> None:
        data = b"\n".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
        if not data:
            return
        reply = self._reply
        if data == b"[DONE]":
            reply.finished, reply.ended = True, now
            return
        try:
            reply.take(_decode_event(data), now, True)
        except msgspec.DecodeError as error:
            reply.fail("unreadable event", str(error))

    def _end(self, now: float) -> None:
        reply = self._reply
        if not reply.ended:
            reply.ended = now
        self._finish("broken stream" if reply.streamed and not reply.finished else None)

    def _finish(self, error: str | None = None) -> None:
        if self._done.done():
            return
        self._done.set_result(None)
        self._reply.body = b"".join(self._body)
        if error is not None:
            self._reply.fail(error)
        if self._transport is not None:
            self._transport.close() if error is None else self._transport.abort()


async def exchange(target: Target, pieces: Sequence[bytes], timeout_s: float) -> Reply:
    """Send a call, wait for its answer. Never raises for what the server does: see Reply.error."""
    loop = asyncio.get_running_loop()
    reply, done = Reply(), loop.create_future()
    reply.started = time.perf_counter()
    transport: asyncio.BaseTransport | None = None
    try:
        async with asyncio.timeout(timeout_s):
            transport, _ = await loop.create_connection(
                lambda: _Exchange(pieces, reply, done), target.host, target.port, ssl=target.tls
            )
            await done
    except TimeoutError:
        reply.fail("timeout", f"no whole answer within {timeout_s:g} s")
    except OSError as error:
        reply.fail(f"cannot connect ({type(error).__name__})", str(error))
    finally:
        if isinstance(transport, asyncio.Transport) and not transport.is_closing():
            transport.abort()
    if not reply.ended:
        reply.ended = time.perf_counter()
    return reply


async def ask(target: Target, pieces: Sequence[bytes], timeout_s: float) -> Reply:
    """`exchange`, with the status and the whole reply looked at, for calls of the API."""
    reply = await exchange(target, pieces, timeout_s)
    if reply.streamed or reply.error is not None:
        return reply
    try:
        told = _decode_event(reply.body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if reply.status == 200:
            reply.fail("unreadable reply", str(error))
        else:
            reply.fail(f"HTTP {reply.status}", reply.body[:_ERROR_SHOWN].decode("utf-8", "replace"))
        return reply
    if reply.status != 200:
        kind, text = _fault(told.error if told.error is not None else {"code": told.code, "message": told.message})
        reply.fail(f"HTTP {reply.status}{kind}", text)
    else:
        reply.take(told, reply.ended, False)
    return reply
