"""/metrics: for Prometheus. Whoever may use the server may read it: it tells sums over all callers, nothing of one."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from mm_core.server.context import context_of
from mm_core.server.metrics import CONTENT_TYPE
from mm_core.server.routing import Route

_MAX_AGE_S = 0.2  # of the engine's counters: many scrapers cost it no more than one


async def metrics(request: Request) -> Response:
    """All counters, in Prometheus' text format."""
    context = context_of(request)
    await context.metrics.snapshots.take(context.engine, _MAX_AGE_S)
    health = context.engine.health(context.config.stall_timeout_s)
    return Response(context.metrics.render(health, context.gate), headers={"Content-Type": CONTENT_TYPE})


ROUTES = (
    Route("/metrics", "GET", metrics, replies={200: "text/plain"}, summary="Counters, for Prometheus", essential=True),
)
