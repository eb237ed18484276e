"""The life of a server: it binds, loads, serves, drains and ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from ipaddress import ip_address
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from mm_core.config import EngineConfig
from mm_core.confinement import hide
from mm_core.engine.async_engine import AsyncEngine
from mm_core.errors import ConfigError, MMError
from mm_core.server import logs
from mm_core.server.app import build_app, build_context
from mm_core.server.config import ServerConfig
from mm_core.server.context import ServerContext
from mm_core.server.failures import error_body, json_reply
from mm_core.server.http import protocol_of

logger = logging.getLogger(__name__)

_CLOSE_S = 30.0
# Of one thread, where others wait for the interpreter: with Python's own 5 ms the requests that came first reach the
# engine 0.15 s later, of 256 at once.
_TURN_S = 0.0005
_OTHER_FILES = 256  # for all that is no client's connection: workers, fetches, look-ups, files of the model
# uvloop takes one connection a turn of each listening socket: of hundreds that come at once the last would wait for as
# many turns, and with it whoever asks for health.
_LISTENERS = 8
_LAST_WORDS_S = 2.0  # for replies to calls that the end of the drain cut off


def serve(model: str, engine_options: Mapping[str, Any], config: ServerConfig) -> int:
    """Load a model and serve it until SIGTERM or SIGINT; gives the exit code. Raises MMError where it cannot start."""
    hide()  # before there are children
    sys.setswitchinterval(_TURN_S)
    logs.set_up(config.log_format)
    config = within_limits(config)
    listening = bind(config)
    if not config.api_keys and not ip_address(listening.getsockname()[0]).is_loopback:
        logger.warning("no API key is set, and %s can be reached from other machines", url_of(listening))
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_Life(model, engine_options_of(config, engine_options), config, listening).run())


def within_limits(config: ServerConfig) -> ServerConfig:
    """No more connections than files may be open: beyond that nobody is answered, not even whoever asks for health.
    The soft limit is raised to the hard one first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # "unlimited" is more than some systems let one ask for
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    most = max(soft - _OTHER_FILES, soft // 8)
    if soft == resource.RLIM_INFINITY or config.max_connections <= most:
        return config
    logger.warning(
        "only %d files may be open at a time: max_connections is %d instead of %d. Raise the limit (ulimit -n, "
        "LimitNOFILE) for more.", soft, most, config.max_connections,
    )  # fmt: skip
    return config.model_copy(update={"max_connections": most})


def bind(config: ServerConfig) -> socket.socket:
    """The socket that the server listens on; port 0 takes a free one. Raises ConfigError."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as ends:
            made = ends.enter_context(socket.socket(family, kind, proto))
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
            ends.pop_all()
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on {config.host}:{config.port}: {error.strerror or error}. Choose another --host or --port."
        ) from None
    return made


def url_of(listening: socket.socket) -> str:
    """Where the socket is reached."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def engine_options_of(config: ServerConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the engine: what was given, over what a server sets by itself."""
    media, fields = config.media, EngineConfig.model_fields
    own = {
        "hash_algorithm": "sha256",  # callers are not trusted
        "max_image_pixels": media.max_image_pixels,
        "max_video_frames": media.max_video_frames,
        "max_audio_seconds": media.max_audio_seconds,
        "max_encoded_bytes": media.max_part_bytes,
        "max_decoded_bytes": media.max_decoded_bytes,
        "decode_workers": media.decode_workers,
        "decode_memory_bytes": media.decode_memory_bytes,
        "decode_timeout_s": media.decode_timeout_s,
        "engine_process": not config.in_process,
        "stall_timeout_s": config.stall_timeout_s,
    }
    return {name: value for name, value in own.items() if name in fields} | dict(given)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


async def _warm_grammars(engine: AsyncEngine) -> None:
    """A model whose tokenizer no grammar can read serves all else."""
    try:
        await engine.warm_grammars()
    except MMError as error:
        logger.warning("structured output is not available: %s", error)


class _Front:
    """The ASGI app that uvicorn is given: until the model is loaded it says so, then the real app answers."""

    app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.app is not None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            body = error_body("The model is being loaded. Try again in some seconds.", "starting", 503)
            headers = {"Retry-After": "5", "Connection": "close"}
            await json_reply(body, 503, headers)(scope, receive, send)


class _Uvicorn(uvicorn.Server):
    """uvicorn's server, without its own ideas of signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """They are ours."""
        yield


class _Life:
    """From the bound socket to the exit code."""

    def __init__(self, model: str, options: dict[str, Any], config: ServerConfig, listening: socket.socket) -> None:
        self._model = model
        self._options = options
        self._config = config
        self._listening = listening
        self._stop = asyncio.Event()
        self._context: ServerContext | None = None

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        front = _Front()
        server = _Uvicorn(self._uvicorn_config(front))
        listening = [self._listening, *(self._listening.dup() for _ in range(_LISTENERS - 1))]
        serving = asyncio.create_task(server.serve(sockets=listening))
        engine: AsyncEngine | None = None
        try:
            logger.info("loading %s", self._model)
            engine = await AsyncEngine.from_pretrained(self._model, **self._options)
            self._context = build_context(engine, self._config)
            front.app = build_app(self._context)
            url = url_of(self._listening)
            logger.info("%s is ready%s", self._context.model_name, f", try it at {url}/" * self._config.playground)
            print(f"listening on {url}", flush=True)
            warming = asyncio.create_task(_warm_grammars(engine))
            await self._stop.wait()
            await warming
            await self._drain(self._context, engine)
        finally:
            server.should_exit = True
            await serving
            if engine is not None:
                await self._close(engine)
        logger.info("stopped")
        return 0

    def _uvicorn_config(self, front: _Front) -> uvicorn.Config:
        return uvicorn.Config(
            front,
            http=protocol_of(self._config),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=max(1, round(self._config.keep_alive_s)),
            timeout_graceful_shutdown=round(_LAST_WORDS_S),
            h11_max_incomplete_event_size=self._config.max_header_bytes,
        )

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._stop.is_set() or self._context is None:  # a second one, or nothing to drain yet
            logger.warning("%s: stopping at once", name)
            _flush()
            os._exit(128 + number if self._stop.is_set() else 0)
        gate = self._context.gate
        logger.info("%s: draining, %d calls are on their way, %d of them wait", name, gate.calls, gate.waiting)
        gate.drain()
        self._stop.set()

    async def _drain(self, context: ServerContext, engine: AsyncEngine) -> None:
        """Wait for calls in flight; those that take too long are ended with an error."""
        try:
            async with asyncio.timeout(self._config.drain_timeout_s):
                await context.gate.empty()
        except TimeoutError:
            logger.warning("%d calls did not end within %g s", context.gate.calls, self._config.drain_timeout_s)
            await self._close(engine)

    async def _close(self, engine: AsyncEngine) -> None:
        """End the engine, and with it every call that is still in it. Idempotent. One that hangs ends with us."""
        try:
            async with asyncio.timeout(_CLOSE_S):
                await engine.close()
        except TimeoutError:
            logger.error("the engine did not end within %g s", _CLOSE_S)
            _flush()
            os._exit(1)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
