"""The app: a table of routes behind one layer that admits, counts and logs calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Route as StarletteRoute

from mm_core.engine.async_engine import AsyncEngine
from mm_core.server import openapi
from mm_core.server.config import ServerConfig
from mm_core.server.context import ServerContext
from mm_core.server.cors import CorsMiddleware
from mm_core.server.desk import Desk
from mm_core.server.gate import Gate
from mm_core.server.intake import MediaIntake
from mm_core.server.metrics import Metrics
from mm_core.server.middleware import CallMiddleware
from mm_core.server.routes import admin, audio, chat, completions, health, metrics, models, playground
from mm_core.server.routing import Route, RouteTable
from mm_core.server.salts import callers_of

ROUTES: tuple[Route, ...] = (
    *health.ROUTES,
    *models.ROUTES,
    *chat.ROUTES,
    *completions.ROUTES,
    *audio.ROUTES,
    *admin.ROUTES,
    *metrics.ROUTES,
    *playground.ROUTES,
    *openapi.ROUTES,
)


# With several keys, what is in the engine without a token is at most this part of what it can run at once: two steps of
# prompts with pictures, one on the device and one launched behind it, and some for the next.
_AHEAD = 4


def build_context(engine: AsyncEngine, config: ServerConfig) -> ServerContext:
    """The server's parts around a loaded engine."""
    running = config.max_running or 2 * engine.config.max_num_seqs
    pending = config.max_pending_bytes
    share = pending // 2 if len(callers_of(config)) > 1 else pending
    gate = Gate(running, config.max_waiting, config.max_waiting_per_key, config.max_queue_s, pending, share)
    if len(callers_of(config)) > 1:
        gate.keep_ahead(lambda: engine.num_started, max(engine.config.max_num_seqs // _AHEAD, 8))
    name = config.served_model_name or _name(engine.info.name)
    counters = Metrics(name)
    desk = Desk()
    intake = MediaIntake.for_engine(config.media, engine, desk, counters.on_media)
    return ServerContext(engine, config, desk, gate, intake, counters, name)


def _name(model: str) -> str:
    """What clients call a model: a hub's id as it is, of a directory its last part."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else model


def build_app(context: ServerContext, routes: Sequence[Route] = ROUTES) -> Starlette:
    """The ASGI app of these routes."""
    if not context.config.playground:
        routes = [route for route in routes if route not in playground.ROUTES]
    table = RouteTable(routes)
    app = Starlette(
        routes=[StarletteRoute(each.path, each.handler, methods=[each.method]) for each in routes],
        middleware=[
            *([Middleware(CorsMiddleware, origins=origins)] if (origins := context.config.allowed_origins) else []),
            Middleware(CallMiddleware, context=context, table=table),
        ],
    )
    app.router.redirect_slashes = False
    app.state.context = context
    app.state.table = table
    return app
