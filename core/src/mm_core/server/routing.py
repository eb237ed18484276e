"""Route: one line of the table that the app, the access rules and the OpenAPI document are made of."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import compile_path

Handler = Callable[[Request], Awaitable[Response]]
Access = Literal["open", "key", "admin"]
Reply = type[BaseModel] | str


@dataclass(frozen=True)
class Route:
    """A path and method, who may call it, and what goes in and out.

    path: as Starlette writes it, "/v1/models/{model_id:path}". replies: status → a pydantic model (JSON), a MIME type,
    or several of these; errors need not be named. access: "open" to all, "key" to whoever may use the server, "admin"
    to the admin key, and absent where none is set. limit_bytes: of the body (None: the server's). request_mime: of
    the body that request_model describes. essential: answered while the server drains.
    """

    path: str
    method: str
    handler: Handler
    request_model: type[BaseModel] | None = None
    replies: Mapping[int, Reply | tuple[Reply, ...]] = field(default_factory=lambda: {200: "application/json"})
    summary: str = ""
    access: Access = "key"
    limit_bytes: int | None = None
    request_mime: str = "application/json"
    essential: bool = False


class RouteTable:
    """Finds the route of a raw ASGI path: by the same patterns that the app dispatches by."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self.routes = tuple(routes)
        self._exact: dict[str, list[Route]] = {}
        self._patterns: list[tuple[Any, Route]] = []
        for route in self.routes:
            if "{" in route.path:
                self._patterns.append((compile_path(route.path)[0], route))
            else:
                self._exact.setdefault(route.path, []).append(route)

    def find(self, path: str, method: str) -> Route | None:
        """The route of a path, of that method where there is one; None: no such path."""
        found = self._exact.get(path) or [route for pattern, route in self._patterns if pattern.match(path)]
        wanted = "GET" if method == "HEAD" else method
        return next((route for route in found if route.method == wanted), found[0] if found else None)

    def methods(self, path: str) -> tuple[str, ...]:
        """Methods that a path has."""
        found = self._exact.get(path) or [route for pattern, route in self._patterns if pattern.match(path)]
        given = [route.method for route in found]
        return tuple(sorted({*given, "HEAD"} if "GET" in given else given))
