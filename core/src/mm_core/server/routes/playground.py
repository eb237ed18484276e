"""The page at /, and its live feed. The page is open and holds no secret; what it asks for is under the API key."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from mm_core import __version__
from mm_core.engine.health import EngineState
from mm_core.errors import NotFoundError, OverloadedError
from mm_core.server.context import ANYBODY, Caller, ServerContext, call_of, context_of
from mm_core.server.failures import json_reply
from mm_core.server.families import kv_usage
from mm_core.server.metrics import EndedRequest
from mm_core.server.routing import Reply, Route

FOLDER = Path(__file__).resolve().parent.parent / "static"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
LIVE = "/playground/live"
PERIOD_S = 0.5  # between two samples
MAX_WATCHERS = 64
MAX_WATCHERS_OF_ONE = 8  # of one key
MAX_CALLS = 128  # of one caller in a sample
_LIFE_S = 3600.0  # of one feed; the page comes back
_POLICY = "; ".join((
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' blob:", "media-src blob:",
    "connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
    "require-trusted-types-for 'script'", "trusted-types 'none'",
))  # fmt: skip
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-cache",
}
Handler = Callable[[Request], Awaitable[Response]]
_OFF: dict[int, Reply] = {404: "application/json"}


class Limits(BaseModel):
    """Ceilings that the page checks before it sends."""

    items: int
    part_bytes: int
    body_bytes: int


class Info(BaseModel):
    """What the page must know of the server."""

    model: str
    version: str
    modalities: tuple[str, ...]
    max_model_len: int
    max_tokens: int | None
    transcribes: bool
    limits: Limits


class LiveCall(BaseModel):
    """A call of this caller on its way. begun: on the feed's clock."""

    id: str
    phase: str
    begun: float
    prompt_tokens: int | None
    completion_tokens: int | None


class LiveRequest(BaseModel):
    """A request of this caller that ended. Times on the feed's clock; null: it did not get there."""

    id: str
    begun: float
    ready: float | None
    started: float | None
    first_token: float | None
    last_token: float | None
    ended: float
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class Sample(BaseModel):
    """One event of the feed. now: the server's clock in seconds. Tokens are counted since the server's start."""

    now: float
    state: EngineState
    running: int
    waiting: int
    kv_usage: float
    prompt_tokens: int
    generation_tokens: int
    cached_tokens: dict[Literal["device", "host", "disk"], int]
    encoded_tokens: int
    calls: list[LiveCall]
    ended: list[LiveRequest]


async def info(request: Request) -> Response:
    """The model, and ceilings."""
    context = _context(request)
    config, model = context.config, context.engine.info
    return json_reply(
        Info(
            model=context.model_name,
            version=__version__,
            modalities=model.modalities,
            max_model_len=model.max_model_len,
            max_tokens=config.max_completion_tokens,
            transcribes="transcribe" in model.tasks,
            limits=Limits(
                items=config.media.max_items, part_bytes=config.media.max_part_bytes, body_bytes=config.max_body_bytes
            ),
        ).model_dump(mode="json"),
        headers={"Cache-Control": "no-store"},
    )


async def live(request: Request) -> Response:
    """How the engine does, and the caller's own calls, twice a second, as server-sent events."""
    context, call = _context(request), call_of(request)
    watching = [each.caller for each in context.metrics.calls if each.route == LIVE]  # this one too
    if len(watching) > MAX_WATCHERS:
        raise OverloadedError("As many pages watch as this server serves. Close one.", retry_after=30)
    if call.caller is not ANYBODY and watching.count(call.caller) > MAX_WATCHERS_OF_ONE:
        raise OverloadedError("As many pages watch as one key may have. Close one.", retry_after=30)
    return StreamingResponse(
        _samples(context, call.caller),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _samples(context: ServerContext, caller: Caller) -> AsyncIterator[bytes]:
    metrics, begun = context.metrics, time.perf_counter()
    shown = 0.0  # requests that ended until then were sent
    while time.perf_counter() - begun < _LIFE_S and not context.gate.closing.is_set():
        await metrics.snapshots.take(context.engine, 0.8 * PERIOD_S)
        sample = _sample(context, caller, shown)
        shown = sample.now
        yield b"data: " + sample.model_dump_json().encode() + b"\n\n"
        with suppress(TimeoutError):
            await asyncio.wait_for(context.gate.closing.wait(), PERIOD_S)


def _sample(context: ServerContext, caller: Caller, since: float) -> Sample:
    metrics = context.metrics
    stats, counters = metrics.snapshots.latest, metrics.snapshots.counters
    own = [call for call in metrics.calls if call.caller.name == caller.name and call.route.startswith("/v1/")]
    blocks = stats.get("blocks", {})

    def counted(name: str) -> int:
        return int(counters.get(name, 0))

    return Sample(
        now=time.perf_counter(),
        state=context.engine.health(context.config.stall_timeout_s).state,
        running=stats.get("running", 0),
        waiting=stats.get("waiting", 0) + context.gate.waiting,
        kv_usage=kv_usage(blocks) if blocks else 0.0,
        prompt_tokens=counted("queried_tokens"),
        generation_tokens=counted("generated_tokens"),
        cached_tokens={level: counted(f"{level}_hits") for level in ("device", "host", "disk")},
        encoded_tokens=counted("encoded_rows"),
        calls=[
            LiveCall(
                id=call.request_id, phase=call.phase, begun=call.arrival,
                prompt_tokens=call.prompt_tokens, completion_tokens=call.completion_tokens,
            )
            for call in own[:MAX_CALLS]
        ],
        ended=[_ended(each) for each in metrics.ended if each.ended > since and each.caller == caller.name],
    )  # fmt: skip


def _ended(request: EndedRequest) -> LiveRequest:
    times = request.times
    return LiveRequest(
        id=request.request_id, begun=request.arrived, ready=times.prepared, started=times.started,
        first_token=times.first_token, last_token=times.last_token, ended=request.ended,
        prompt_tokens=request.prompt_tokens, cached_tokens=request.cached_tokens,
        completion_tokens=request.completion_tokens,
    )  # fmt: skip


def _context(request: Request) -> ServerContext:
    """The server's parts. NotFoundError where the page is off."""
    context = context_of(request)
    if not context.config.playground:
        raise NotFoundError("The page is off: the server was started with --no-playground.")
    return context


def _file(path: Path) -> Handler:
    """A handler that gives one file as it was at the server's start."""
    body = path.read_bytes()
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    kind = f"{KINDS[path.suffix]}; charset=utf-8"

    async def give(request: Request) -> Response:
        _context(request)
        headers = {**HEADERS, "ETag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(body, headers={**headers, "Content-Type": kind})

    give.__name__ = "page_" + path.name.replace(".", "_")  # names the operation in /openapi.json
    return give


def _pages() -> tuple[Route, ...]:
    """One route for each file of the page: no path of a caller ever reaches the disk."""
    index = FOLDER / "index.html"
    rest = [path for path in sorted(FOLDER.iterdir()) if path.suffix in KINDS and path != index]
    return (
        Route("/", "GET", _file(index), None, {200: "text/html", **_OFF}, "A page to try the model on", "open"),
        *(
            Route(f"/playground/{path.name}", "GET", _file(path), None, {200: KINDS[path.suffix], **_OFF},
                  f"The page's {path.name}", "open")
            for path in rest
        ),
    )  # fmt: skip


ROUTES = (
    *_pages(),
    Route("/playground/info", "GET", info, None, {200: Info, **_OFF}, "What the page must know"),
    Route(
        LIVE, "GET", live, None, {200: "text/event-stream", 429: "application/json", **_OFF},
        "How the engine does, as it goes",
    ),
)  # fmt: skip
