"""Calls from web pages of other origins: allowed for those that were named, off otherwise."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_METHODS = b"GET, POST"
_HEADERS = b"authorization, content-type"
_SHOWN = b"x-request-id, retry-after"


class CorsMiddleware:
    """Answers a browser's question whether a page may call, and marks replies to the pages that may.

    A page of another origin gets its reply without the mark: the browser keeps it from the page.
    """

    def __init__(self, app: ASGIApp, *, origins: Sequence[str]) -> None:
        self.app = app
        self._origins = {origin.rstrip("/").encode("latin-1") for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One call."""
        headers = dict(scope.get("headers", ()))
        origin = headers.get(b"origin")
        if origin is None or (origin not in self._origins and b"*" not in self._origins):
            await self.app(scope, receive, send)
            return
        marks = [(b"access-control-allow-origin", origin), (b"vary", b"Origin")]
        if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
            marks += [(b"access-control-allow-methods", _METHODS), (b"access-control-allow-headers", _HEADERS)]
            marks.append((b"access-control-max-age", b"600"))
        else:
            marks.append((b"access-control-expose-headers", _SHOWN))

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *marks]
            await send(message)

        if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
            await Response(status_code=204)(scope, receive, marked)
        else:
            await self.app(scope, receive, marked)
