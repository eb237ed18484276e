"""What every route is given: the server's parts, and what is known of the call."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from starlette.requests import Request

    from mm_core.engine.async_engine import AsyncEngine
    from mm_core.server.config import ServerConfig
    from mm_core.server.desk import Desk
    from mm_core.server.gate import Gate
    from mm_core.server.intake import MediaIntake
    from mm_core.server.metrics import Metrics

Phase = Literal["read", "fetch", "queue", "prepare", "prefill", "decode", "engine", "done"]


@dataclass(frozen=True)
class Caller:
    """Who calls. name: stands for the key in logs and in the fair queue (never the key itself). salt: of all caches;
    None where no keys are configured. admin: whether the admin key was given."""

    name: str
    salt: str | None = None
    admin: bool = False


ANYBODY = Caller("anybody")


@dataclass(eq=False)
class Call:
    """One HTTP call on its way. request_id: made here, never taken from the client. arrival: `time.perf_counter()`.

    disconnected: set when the client is gone; known only from the end of the body on. prompt_tokens,
    completion_tokens, error_code: for the access log, filled in by whoever learns them. body_bytes: so far. places:
    held in the gate.
    """

    route: str
    caller: Caller
    request_id: str = field(default_factory=lambda: f"req-{uuid.uuid4().hex}")
    arrival: float = field(default_factory=time.perf_counter)
    phase: Phase = "read"
    warnings: list[str] = field(default_factory=list)
    disconnected: asyncio.Event = field(default_factory=asyncio.Event)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error_code: str | None = None
    body_bytes: int = 0
    places: int = 0


@dataclass(frozen=True)
class ServerContext:
    """The parts of a running server, made by `app.build_context`; `request.app.state.context` holds it."""

    engine: AsyncEngine
    config: ServerConfig
    desk: Desk
    gate: Gate
    intake: MediaIntake
    metrics: Metrics
    model_name: str
    created: int = field(default_factory=lambda: int(time.time()))


def context_of(request: Request) -> ServerContext:
    """The server's parts."""
    context: ServerContext = request.app.state.context
    return context


def call_of(request: Request) -> Call:
    """The call that a request belongs to."""
    call: Call = request.state.call
    return call
