"""/health and /health/ready: whether the engine lives, and whether calls would be served now."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from mm_core.engine.health import EngineState
from mm_core.server.context import context_of
from mm_core.server.failures import json_reply
from mm_core.server.routing import Route


class Health(BaseModel):
    """How the server does. idle_s: seconds since the engine took a step or had nothing to do."""

    status: Literal["ok", "unavailable"]
    state: EngineState
    draining: bool
    idle_s: float
    steps: int
    restarts: int
    running: int
    waiting: int


async def health(request: Request) -> Response:
    """200 while the engine steps or has nothing to do, drain or not; else 503 and what it is."""
    found = _look(request)
    return json_reply(found.model_dump(), 200 if found.status == "ok" else 503)


async def ready(request: Request) -> Response:
    """200 while a new call would be served; 503 while the engine starts, is stuck, or the server drains."""
    found = _look(request)
    return json_reply(found.model_dump(), 200 if found.status == "ok" and not found.draining else 503)


def _look(request: Request) -> Health:
    context = context_of(request)
    engine = context.engine.health(context.config.stall_timeout_s)
    return Health(
        status="ok" if engine.ready else "unavailable",
        state=engine.state,
        draining=context.gate.draining,
        idle_s=round(engine.idle_s, 3),
        steps=engine.steps,
        restarts=engine.restarts,
        running=context.gate.running,
        waiting=context.gate.waiting,
    )


_REPLIES = {200: Health, 503: Health}
ROUTES = (
    Route("/health", "GET", health, None, _REPLIES, "Whether the engine lives", "open", essential=True),
    Route("/health/ready", "GET", ready, None, _REPLIES, "Whether calls are taken", "open", essential=True),
)
