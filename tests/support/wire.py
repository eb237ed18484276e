"""Bytes on a socket: calls that no client library would send, and what comes back."""

from __future__ import annotations

import http.client
import io
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from support.serving import Server

Reply = tuple[int, dict[str, str], Any]  # status, headers, JSON


class Replies(io.BufferedReader):
    """What a connection brings: HTTPResponse closes its file behind each reply, but there may be more."""

    def close(self) -> None:
        pass

    def makefile(self, _: str) -> Replies:
        return self


class Wire:
    """A bare connection."""

    def __init__(self, server: Server) -> None:
        self.socket = socket.create_connection(server.address, timeout=20.0)
        self._replies = Replies(socket.SocketIO(self.socket, "r"))

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def reply(self, method: str = "POST") -> Reply:
        """Status, headers and JSON of one reply."""
        reply = http.client.HTTPResponse(self._replies, method=method)  # type: ignore[arg-type]
        reply.begin()
        body = reply.read()
        headers = {name.lower(): value for name, value in reply.getheaders()}
        return reply.status, headers, json.loads(body) if body else None

    def rest(self) -> bytes:
        """All that comes until the server closes it."""
        found = b""
        try:
            while piece := self._replies.read1(65536):
                found += piece
        except ConnectionResetError:
            pass
        return found

    def closed(self) -> bool:
        """Whether the server closed it; waits for that."""
        self.rest()
        return True

    def close(self) -> None:
        self.socket.close()


@contextmanager
def wire(server: Server) -> Iterator[Wire]:
    """A connection to a server."""
    made = Wire(server)
    try:
        yield made
    finally:
        made.close()


def told(server: Server, data: bytes) -> Reply:
    """What the server answers to these bytes on a new connection."""
    with wire(server) as connection:
        connection.send(data)
        return connection.reply()


def error_of(reply: Reply) -> tuple[int, str]:
    """Status and code of an error in the right shape."""
    status, headers, body = reply
    assert headers["content-type"] == "application/json"
    assert set(body) == {"error"}
    assert {"message", "type", "param", "code"} <= set(body["error"])
    assert body["error"]["message"]
    return status, body["error"]["code"]


def head(method: str, path: str, *lines: str) -> bytes:
    """A call's head with these header lines."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()
