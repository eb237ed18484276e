"""Worker: an EngineCore, the thread that drives it, and messages in both directions."""

from __future__ import annotations

import gc
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from mm_core.config import EngineConfig
from mm_core.engine.core import EngineCore
from mm_core.engine.core_thread import CoreThread
from mm_core.engine.loading import LoadedModel, build_core, load_model
from mm_core.engine.messages import (
    Abort,
    AskLevels,
    CacheNews,
    CacheReply,
    ClearCache,
    EvictItems,
    LookUp,
    Notice,
    PinItem,
    Submit,
    TokenOutput,
    UnpinItem,
    WatchCaches,
)
from mm_core.engine.process.faults import to_fault
from mm_core.engine.process.launch import import_plugins
from mm_core.engine.process.plain import pack
from mm_core.engine.process.requests import from_wire
from mm_core.engine.process.views import ArenaViews
from mm_core.engine.process.wire import (
    Aborted,
    Ask,
    Beat,
    Channel,
    Cleared,
    Close,
    Failed,
    Family,
    LookedUp,
    News,
    Outputs,
    Progress,
    ProtocolError,
    Query,
    Ready,
    Released,
    Start,
    Submitted,
    Told,
    WireRequest,
    as_reply,
)
from mm_core.engine.startup import StartupTimes
from mm_core.errors import EngineError, MMError
from mm_core.runner.runner import resolve_device
from mm_core.tracing import SpanRecorder
from mm_core.types import FinishReason, PreparedRequest

logger = logging.getLogger(__name__)

BEAT_S = 0.25
_POLL_S = 0.002
_LOST, _FAILED, _BROKEN = 3, 4, 70  # exit statuses: the parent is gone, the start failed, the loop failed
_QUERIES = {kind.__name__: kind for kind in (PinItem, UnpinItem, EvictItems, AskLevels, WatchCaches)}


class _ToldTimes(StartupTimes):
    """What goes on is told to the parent, which says it to the user."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def say(self, doing: str) -> None:
        """Send it on."""
        self._channel.send(Progress(doing))


class Worker:
    """Serves one parent, in the main thread; the core runs in one of its own (`CoreThread`), and another one beats,
    and tells which slots of the arena nothing is held of."""

    _model: LoadedModel
    _core: EngineCore
    _length: int

    def __init__(self, channel: Channel, arena: int, start: Start, import_s: float) -> None:
        self._channel = channel
        self._start = start
        self._gone: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._views = ArenaViews(arena, start.arena_bytes, self._gone)
        self._thread: CoreThread | None = None
        self._recorder: SpanRecorder | None = None
        self._times = _ToldTimes(channel)
        self._times.add("imports", import_s)
        self._package = ""
        self._own: tuple[Any, ...] = ()

    def run(self) -> NoReturn:
        """Load, then take in what the parent sends, until it says Close or is gone."""
        threading.Thread(target=self._tend, name="mm-core-heartbeat", daemon=True).start()
        try:
            ready = self._load()
        except BaseException as error:
            self._fail(error)
        self._send(ready)
        message: Any = None
        try:
            while (message := self._channel.receive()) is not None and not isinstance(message, Close):
                self._take(message)
        except ProtocolError as error:
            logger.error("the parent sent what is no message: %s", error)
            os._exit(_BROKEN)
        if message is None:
            os._exit(_LOST)
        self._close()

    # -- start and end ---------------------------------------------------------------------

    def _load(self) -> Ready:
        config = EngineConfig(**self._start.config)
        self._recorder = SpanRecorder() if config.record_timeline else None
        pinning = threading.Thread(target=self._pin, args=(config,), name="mm-core-pin", daemon=True)
        pinning.start()
        thread = CoreThread(lambda: self._make(config), self._deliver, self._break)
        with self._times.part("arena"):
            pinning.join()
        with self._times.part("garbage"):  # see Frontend
            gc.collect()
            gc.freeze()
        self._thread = thread
        model = self._model
        return Ready(self._length, model.vocab_size, model.device.type, dict(self._times.seconds))

    def _make(self, config: EngineConfig) -> EngineCore:
        """In the core's thread."""
        plugins = import_plugins(self._start.plugins)
        self._model = load_model(self._start.model, config, plugins, self._times, prepares=False)
        self._core, self._length = build_core(self._model, config, self._recorder)
        self._core.notify = self._notify
        return self._core

    def _pin(self, config: EngineConfig) -> None:
        """The arena, beside the weights, where there is a GPU."""
        try:
            device = resolve_device(config)
            if device.type != "cuda":
                return
            torch.cuda.set_device(device)
            if not self._views.pin():
                logger.warning("media stay in pageable memory, copies will be slower: the system pins no more memory")
        except Exception:
            logger.debug("the arena is not pinned", exc_info=True)  # what is wrong with the device shows elsewhere

    def _fail(self, error: BaseException) -> NoReturn:
        fault = error
        if not isinstance(fault, MMError):
            logger.error("the engine could not be started", exc_info=error)
            fault = EngineError(
                f"Starting the engine failed with {type(error).__name__}: {str(error)[:200]}. The log has the details."
            )
        self._send(Failed(to_fault(fault)))
        os._exit(_FAILED)

    def _break(self) -> None:
        """The loop failed: the books cannot be trusted. The parent tells who waits, and starts anew."""
        os._exit(_BROKEN)

    def _close(self) -> NoReturn:
        try:
            if self._thread is not None:
                self._thread.close()
                self._core.release()
            self._views.close()
        except BaseException:
            logger.exception("the engine did not end in order")
            os._exit(_BROKEN)
        os._exit(0)  # nothing is left to do, and an interpreter takes tenths of a second to go

    # -- in --------------------------------------------------------------------------------

    def _take(self, message: Any) -> None:
        assert self._thread is not None
        match message:
            case Submitted(request):
                self._submit(self._thread, request)
            case Family(package, own):
                self._package = package
                if own:
                    self._own = tuple(self._model.processor.default_sampling().logits_processors)
            case Aborted(request_id, index, stopped):
                self._thread.send(Abort(request_id, index, stopped))
            case Cleared():
                self._thread.send(ClearCache())
            case LookedUp(query_id, request):
                self._thread.send(LookUp(query_id, self._request(request)))
            case Query(kind, values):
                try:
                    query = _QUERIES[kind](**values)
                except (KeyError, TypeError) as error:
                    raise ProtocolError(f"no query {kind[:40]}") from error
                self._thread.send(query)
            case Ask(number, True):
                spans = [] if self._recorder is None else self._recorder.take()
                told = [(s.track, s.name, s.start_ns, s.end_ns, pack(dict(s.args))) for s in spans]
                self._send(Told(number, spans=told))
            case Ask(number):
                self._thread.ask_stats(lambda stats: self._send(Told(number, pack(stats))))

    def _submit(self, thread: CoreThread, request: WireRequest) -> None:
        try:
            prepared = self._request(request)
        except MMError as error:
            ended = TokenOutput(request.request_id, 0, None, finish_reason=FinishReason.ERROR.value, error=error)
            self._deliver([ended])
            return
        thread.send(Submit(prepared))

    def _request(self, request: WireRequest) -> PreparedRequest:
        try:
            return from_wire(request, self._views.tensors, self._package, self._own)
        except (TypeError, ValueError, IndexError, AttributeError, ImportError) as error:
            if isinstance(error, MMError):
                raise
            raise ProtocolError(f"request {request.request_id[:40]}: {type(error).__name__}") from error

    # -- out -------------------------------------------------------------------------------

    def _send(self, message: Any) -> None:
        try:
            self._channel.send(message)
        except OSError:
            os._exit(_LOST)

    def _deliver(self, outputs: Sequence[TokenOutput]) -> None:
        self._send(Outputs(time.perf_counter(), list(outputs)))

    def _notify(self, notice: Notice) -> None:
        match notice:
            case CacheReply():
                self._send(as_reply(notice))
            case CacheNews(events):
                self._send(News(list(events)))

    def _tend(self) -> None:
        """Beat, and tell of slots that nothing is held of; on a GPU once the copies that were begun are done."""
        pending: deque[tuple[torch.cuda.Event | None, list[int]]] = deque()
        due = 0.0
        while True:
            numbers = self._wait_for_gone(_POLL_S if pending else max(due - time.monotonic(), 0.0))
            if numbers:
                pending.append((self._copied(), numbers))
            done: list[int] = []
            while pending and (_is_past(pending[0][0])):
                done += pending.popleft()[1]
            told = [slot for number in dict.fromkeys(done) if (slot := self._views.released(number)) is not None]
            if told:
                self._send(Released(told))
            if time.monotonic() >= due:
                due = time.monotonic() + BEAT_S
                self._send(Beat(0, 0.0, False) if self._thread is None else Beat(*self._thread.pulse))

    def _wait_for_gone(self, timeout: float) -> list[int]:
        numbers: list[int] = []
        try:
            number = self._gone.get(timeout=timeout)
            while True:
                numbers.append(number)
                number = self._gone.get_nowait()
        except queue.Empty:
            return numbers

    def _copied(self) -> torch.cuda.Event | None:
        """When all that the encoder's stream was given so far is done: copies out of the arena among it."""
        if self._model.device.type != "cuda":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with self._core.runner.rows.on_stream():
            event.record()
        return event


def _is_past(event: torch.cuda.Event | None) -> bool:
    return event is None or bool(event.query())  # type: ignore[no-untyped-call]
