"""Who answers in `mm chat`: an engine in this process, or a server that speaks OpenAI's API."""

from __future__ import annotations

import base64
import http.client
import json
import mimetypes
import ssl
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import urlsplit

from mm_core.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from mm_core.config import SamplingParams
    from mm_core.engine.engine import Engine

_CONNECT_S = 10.0
_SILENCE_S = 600.0  # for the next part of an answer
_MOST_LINE = 2**24  # bytes of one event
_MOST_REPLY = 2**20  # bytes of a reply that is no stream
Kind = Literal["image", "video", "audio"]


@dataclass(frozen=True)
class Medium:
    """A picture, video or recording, read when it was named. name: of its file."""

    kind: Kind
    name: str
    data: bytes


@dataclass(frozen=True)
class Turn:
    """One message; media come before its text."""

    role: Literal["system", "user", "assistant"]
    text: str
    media: tuple[Medium, ...] = ()


@dataclass
class Stats:
    """Of an answer; None is what nobody told. Times in seconds: to the first token, and from there to the last."""

    prompt: int | None = None
    cached: int | None = None
    media: int | None = None
    tokens: int | None = None
    first: float | None = None
    rest: float | None = None

    def line(self) -> str:
        """What is known, for people."""
        parts = []
        if self.prompt is not None:
            about = [] if self.cached is None else [f"{self.cached} cached"]
            about += [f"{self.media} of media"] if self.media else []
            parts.append(f"prompt {self.prompt} tokens" + (f" ({', '.join(about)})" if about else ""))
        if self.tokens is not None:
            parts.append(f"answer {self.tokens} tokens")
        if self.first is not None:
            parts.append(f"first token {self.first:.2f} s")
        if self.tokens is not None and self.tokens > 1 and self.rest:
            parts.append(f"{(self.tokens - 1) / self.rest:.1f} tokens/s")
        return f"[{' · '.join(parts)}]"


class Backend(Protocol):
    """Answers conversations, one at a time. stats: of the latest answer."""

    name: str
    stats: Stats

    def answer(self, turns: Sequence[Turn]) -> Generator[str, None, None]:
        """The text so far, as it grows. Leaving it ends the answer. Raises MMError."""
        ...

    def close(self) -> None:
        """No more questions come."""
        ...


class LocalBackend:
    """An engine in this process."""

    def __init__(self, engine: Engine, params: SamplingParams, name: str) -> None:
        self._engine = engine
        self._params = params
        self.name = name
        self.stats = Stats()

    def answer(self, turns: Sequence[Turn]) -> Generator[str, None, None]:
        """See Backend."""
        self.stats = Stats()
        updates: Any = self._engine.stream([_local(turn) for turn in turns], self._params)
        with closing(updates):
            for output in updates:
                usage, times = output.usage, output.metrics
                self.stats = Stats(
                    usage.prompt_tokens, usage.cached_tokens, usage.media_tokens, usage.completion_tokens
                )
                if times is not None and times.first_token is not None and times.last_token is not None:
                    self.stats.first = times.first_token - times.arrival
                    self.stats.rest = times.last_token - times.first_token
                yield output.text

    def close(self) -> None:
        """Release the model."""
        self._engine.close()


def _local(turn: Turn) -> dict[str, Any]:
    if not turn.media:
        return {"role": turn.role, "content": turn.text}
    text = [{"type": "text", "text": turn.text}] if turn.text else []
    return {"role": turn.role, "content": [*({"type": m.kind, m.kind: m.data} for m in turn.media), *text]}


class RemoteBackend:
    """A server. url: with or without "/v1" at its end. model: as the server calls it; None: the first it lists.

    Raises ConfigError for a URL that is none, EngineError where the server cannot be asked.
    """

    def __init__(self, url: str, *, model: str | None, key: str | None, options: dict[str, Any]) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ConfigError(f"{url[:100]!r} is no address of a server. It looks like http://localhost:8000.")
        try:
            port = parts.port
        except ValueError:
            raise ConfigError(f"{url[:100]!r} has no valid port. It looks like http://localhost:8000.") from None
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, port
        base = parts.path.rstrip("/")
        self._base = base if base.endswith("/v1") else f"{base}/v1"
        self._headers = {"Accept": "application/json, text/event-stream"} | (
            {"Authorization": f"Bearer {key}"} if key else {}
        )
        self._options = options
        self.name = model or self._first_model()
        self.stats = Stats()

    def _first_model(self) -> str:
        connection, reply = self._ask("GET", "/models")
        with closing(connection):
            try:
                return str(json.loads(reply.read(_MOST_REPLY))["data"][0]["id"])
            except (ValueError, KeyError, IndexError, TypeError, OSError, http.client.HTTPException):
                raise EngineError("The server lists no model. Name one with --model.") from None

    def answer(self, turns: Sequence[Turn]) -> Generator[str, None, None]:
        """See Backend."""
        self.stats = Stats()
        begin = time.perf_counter()
        body = {
            "model": self.name, "messages": [_remote(turn) for turn in turns], "stream": True,
            "stream_options": {"include_usage": True}, **self._options,
        }  # fmt: skip
        connection, reply = self._ask("POST", "/chat/completions", body)
        text, first = "", None
        with closing(connection):
            for event in _events(reply):
                self._read_usage(event.get("usage"))
                for choice in event.get("choices") or ():
                    if piece := (choice.get("delta") or {}).get("content"):
                        now = time.perf_counter()
                        first = first or now
                        self.stats.first, self.stats.rest = first - begin, now - first
                        text += str(piece)
                        yield text
        if first is None:
            yield text

    def _read_usage(self, usage: Any) -> None:
        if not isinstance(usage, dict):
            return
        details = usage.get("prompt_tokens_details") or {}
        self.stats.prompt, self.stats.tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        self.stats.cached, self.stats.media = details.get("cached_tokens"), details.get("media_tokens")

    def _ask(
        self, method: str, path: str, body: Any = None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """A reply whose status is 200, not yet read, and its connection. Raises EngineError."""
        where = f"{self._host}:{self._port}" if self._port else self._host
        connection: http.client.HTTPConnection = (
            http.client.HTTPSConnection(
                self._host, self._port, timeout=_CONNECT_S, context=ssl.create_default_context()
            )
            if self._secure
            else http.client.HTTPConnection(self._host, self._port, timeout=_CONNECT_S)
        )
        try:
            connection.connect()
            connection.sock.settimeout(_SILENCE_S)
            data = None if body is None else json.dumps(body).encode()
            kind = {} if body is None else {"Content-Type": "application/json"}
            connection.request(method, self._base + path, data, {**self._headers, **kind})
            reply = connection.getresponse()
            if reply.status != http.HTTPStatus.OK:
                raise EngineError(_refusal(reply))
        except (OSError, http.client.HTTPException, ValueError) as error:
            connection.close()
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise EngineError(f"The server at {where} cannot be asked: {why}. Check the address.") from None
        except BaseException:
            connection.close()
            raise
        return connection, reply

    def close(self) -> None:
        """Nothing is held between answers."""


def _remote(turn: Turn) -> dict[str, Any]:
    """OpenAI's message."""
    if not turn.media:
        return {"role": turn.role, "content": turn.text}
    text = [{"type": "text", "text": turn.text}] if turn.text else []
    return {"role": turn.role, "content": [*map(_part, turn.media), *text]}


def _part(medium: Medium) -> dict[str, Any]:
    data = base64.b64encode(medium.data).decode()
    if medium.kind == "audio":
        form = medium.name.rpartition(".")[2].lower()
        return {"type": "input_audio", "input_audio": {"data": data, "format": form}}
    kind = mimetypes.guess_type(medium.name)[0] or ""
    kind = kind if kind.startswith(f"{medium.kind}/") else {"image": "image/png", "video": "video/mp4"}[medium.kind]
    name = f"{medium.kind}_url"
    return {"type": name, name: {"url": f"data:{kind};base64,{data}"}}


def _events(reply: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The events of a stream. Raises EngineError for one that tells of an error, or where the stream breaks off."""
    try:
        while line := reply.readline(_MOST_LINE):
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            event = json.loads(data)
            if not isinstance(event, dict):
                raise ValueError
            if event.get("error"):
                raise EngineError(_message(event))
            yield event
    except (OSError, http.client.HTTPException):
        pass
    except ValueError:
        raise EngineError("The server's answer is no stream of events. Is its address right?") from None
    raise EngineError("The server broke off its answer. Ask again.")


def _refusal(reply: http.client.HTTPResponse) -> str:
    """Why a call was refused."""
    try:
        found = json.loads(reply.read(_MOST_REPLY))
    except ValueError:
        found = None
    text = _message(found) if isinstance(found, dict) else ""
    return f"The server said {reply.status} {reply.reason}" + (f": {text}" if text else ". Check the address.")


def _message(body: dict[str, Any]) -> str:
    error = body.get("error")
    return str(error.get("message", "")) if isinstance(error, dict) else str(error or "")
