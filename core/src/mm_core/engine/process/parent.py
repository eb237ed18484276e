"""The parent's end of one engine process: sending, receiving, and its end."""

from __future__ import annotations

import itertools
import logging
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mm_core.engine.messages import (
    Abort,
    CacheNews,
    CacheQuery,
    CacheReply,
    ClearCache,
    LookUp,
    Message,
    Notice,
    Submit,
    TokenOutput,
)
from mm_core.engine.process.arena import Arena, arena_bytes
from mm_core.engine.process.launch import Launch, spawn
from mm_core.engine.process.plain import pack
from mm_core.engine.process.requests import to_wire, with_slots
from mm_core.engine.process.wire import (
    Aborted,
    Ask,
    Beat,
    Channel,
    Cleared,
    Close,
    Failed,
    Family,
    Log,
    LookedUp,
    News,
    Outputs,
    Progress,
    ProtocolError,
    Query,
    Ready,
    Released,
    Replied,
    Submitted,
    Told,
    encode,
    from_reply,
)
from mm_core.errors import EngineDiedError, EngineError, MediaTooLargeError, MMError
from mm_core.types import FinishReason

logger = logging.getLogger(__name__)

_BATCH = 2**16  # bytes that are sent together
_BATCH_S = 0.001  # how long they wait for each other


@dataclass(frozen=True)
class Listeners:
    """Who is told what, in the thread that receives: they return soon.

    outputs: a step's, and when it ended. died: the process, with what ran in it. restarted: another one is ready.
    """

    outputs: Callable[[float, list[TokenOutput]], object]
    notice: Callable[[Notice], object]
    died: Callable[[EngineDiedError], object]
    restarted: Callable[[], object]


class Child:
    """One engine process. on_start: gets Progress, then Ready or Failed. on_end: is called once, when the
    connection has ended; nothing is told behind it.

    A request whose media find no room in the arena waits, behind others that wait, until there is some; requests
    without media, aborts and all else pass it.
    """

    def __init__(
        self, launch: Launch, listeners: Listeners, on_start: Callable[[Any], object], on_end: Callable[[], object]
    ) -> None:
        self._listeners = listeners
        self._on_start = on_start
        self._on_end = on_end
        self._package = ""
        self._num_own = 0
        self.beat = Beat(0, 0.0, False)
        self.beaten = time.monotonic()
        self._asked: dict[int, Future[Told]] = {}
        self._numbers = itertools.count()
        self._outbox: queue.SimpleQueue[Message | Ask | Close | Family | _Retry | None] = queue.SimpleQueue()
        self._waiting: deque[Submit] = deque()
        self.arena = Arena(arena_bytes(launch.config))
        try:
            self.process, connection = spawn(self.arena)
        except BaseException:
            self.arena.close()
            raise
        self._channel = Channel(connection, engine=False)
        with suppress(OSError):  # it ended at once: the receiver sees that
            self._channel.send(launch.message())
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._send_all, "mm-core-to-engine"), (self._receive_all, "mm-core-from-engine"))
        ]
        for thread in self._threads:
            thread.start()

    def send(self, message: Message) -> None:
        """Queue a message; returns at once."""
        self._outbox.put(message)

    def speak_of(self, package: str, num_own: int) -> None:
        """The family's package, and how many logits processors of its own it adds to each request that do not cross;
        before the first request."""
        self._package, self._num_own = package, num_own
        self._outbox.put(Family(package, num_own > 0))

    def ask(self, *, spans: bool = False) -> Future[Told]:
        """Ask for counters, or for spans; it may never be answered before `end`."""
        number, answer = next(self._numbers), Future[Told]()
        self._asked[number] = answer
        self._outbox.put(Ask(number, spans))
        return answer

    @property
    def num_waiting(self) -> int:
        """Requests that wait for room in the arena."""
        return len(self._waiting)

    def dump_stacks(self) -> None:
        """Have it write the stacks of all its threads to stderr."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGUSR1)

    def close(self, patience_s: float) -> None:
        """Have it end in order, for as long as it shows that it lives, `patience_s` at most; then `end`."""
        self._outbox.put(Close())
        end = time.monotonic() + patience_s
        while time.monotonic() < end and time.monotonic() - self.beaten < _SILENCE_S:
            try:
                self.process.wait(0.05)
                break
            except subprocess.TimeoutExpired:
                continue
        self.end()

    def end(self) -> int:
        """End it now, where it has not ended; its exit status. What was asked is not answered any more."""
        with suppress(ProcessLookupError):
            self.process.kill()
        status = self.process.wait()
        self._outbox.put(None)
        for thread in self._threads:
            thread.join()
        self._channel.close()
        self.arena.close()
        for answer in list(self._asked.values()):
            if answer.set_running_or_notify_cancel():
                answer.set_exception(EngineDiedError("The engine's process ended."))
        return status

    # -- sending ---------------------------------------------------------------------------

    def _send_all(self) -> None:
        frames, due = bytearray(), 0.0
        while (message := self._outbox.get()) is not None:
            due = due if frames else time.perf_counter() + _BATCH_S
            try:
                frames += self._frames(message)
            except Exception as error:  # of one message, whatever it is
                self._refuse(message, error)
            if self._outbox.empty() or len(frames) > _BATCH or time.perf_counter() >= due:
                try:
                    self._channel.send_frames(frames)
                except OSError:
                    return  # it ended; the receiver says so
                frames = bytearray()

    def _frames(self, message: Any) -> bytes | bytearray:
        match message:
            case Submit():
                if not self._waiting or not message.request.media:
                    return self._submit(message)
                self._waiting.append(message)
            case _Retry():
                return self._retry()
            case Abort(request_id, index, stopped):
                if index is None and self._forget(request_id):
                    return b""
                return encode(Aborted(request_id, index, stopped))
            case ClearCache():
                return encode(Cleared())
            case LookUp(query_id, request):
                return encode(LookedUp(query_id, to_wire(request, self._package, self._num_own)))
            case CacheQuery():
                return encode(Query(type(message).__name__, pack(dict(vars(message)))))
            case _:
                return encode(message)
        return b""

    def _submit(self, message: Submit) -> bytes | bytearray:
        """The request, its media copied; nothing where it waits for room."""
        request = message.request
        features = [r.feature for r in request.media]
        wire = to_wire(request, self._package, self._num_own)  # what is wrong with it shows before it has room
        slots = self.arena.place(features)
        if slots is None and self.arena.fits(features):
            self._waiting.appendleft(message)
            return b""
        if slots is None:
            raise MediaTooLargeError(
                f"The request's media take {sum(f.nbytes for f in features) / 2**20:.0f} MiB, more than there is "
                "between the engine's process and this one. Send fewer or smaller ones, or raise processor_cache_size.",
                param="multi_modal_data",
            )
        return encode(Submitted(with_slots(wire, slots)))

    def _refuse(self, message: Any, error: Exception) -> None:
        """What the message asked for ends with an error."""
        fault = error
        if not isinstance(fault, MMError):
            logger.error("a message could not be sent to the engine's process", exc_info=error)
            fault = EngineError(
                f"Sending to the engine's process failed with {type(error).__name__}. This is a bug: please report it "
                "with the log."
            )
        if isinstance(message, Submit):
            ended = TokenOutput(
                message.request.request_id, 0, None, finish_reason=FinishReason.ERROR.value, error=fault
            )
            self._listeners.outputs(time.perf_counter(), [ended])
        elif isinstance(message, CacheQuery):
            self._listeners.notice(CacheReply(message.query_id, error=fault))

    def _retry(self) -> bytes:
        frames = b""
        while self._waiting:
            first = self._waiting.popleft()
            try:
                frames += self._submit(first)
            except Exception as error:
                self._refuse(first, error)
            if self._waiting and self._waiting[0] is first:  # it waits again
                break
        return frames

    def _forget(self, request_id: str) -> bool:
        kept = [each for each in self._waiting if each.request.request_id != request_id]
        found = len(kept) < len(self._waiting)
        if found:
            self._waiting = deque(kept)
            self._outbox.put(_Retry())  # the next one may be smaller
        return found

    # -- receiving -------------------------------------------------------------------------

    def _receive_all(self) -> None:
        try:
            while (message := self._channel.receive()) is not None:
                self._take(message)
        except (ProtocolError, KeyError) as error:
            logger.error("the engine's process sent what is no message: %s", error)
        except Exception:
            logger.exception("a message of the engine's process could not be taken in")
        with suppress(ProcessLookupError):
            self.process.kill()
        self._on_end()

    def _take(self, message: Any) -> None:
        self.beaten = time.monotonic()  # whatever it says, it lives
        match message:
            case Outputs(when, outputs):
                self._listeners.outputs(when, outputs)
            case Beat():
                self.beat = message
            case Released(slots):
                freed = [self.arena.released(number, seen) for number, seen in slots]
                if self._waiting and any(freed):
                    self._outbox.put(_Retry())
            case Told(number):
                answer = self._asked.pop(number, None)
                if answer is not None and answer.set_running_or_notify_cancel():
                    answer.set_result(message)
            case Replied():
                self._listeners.notice(from_reply(message))
            case News(events):
                self._listeners.notice(CacheNews(tuple(events)))
            case Log(name, level, text, created):
                _log(name, level, text, created)
            case Progress() | Ready() | Failed():
                self._on_start(message)


class _Retry:
    """There may be room for who waits."""


_SILENCE_S = 5.0


def _log(name: str, level: int, text: str, created: float) -> None:
    target = logging.getLogger(name)
    if target.isEnabledFor(level):
        record = target.makeRecord(name, level, "engine process", 0, "%s", (text,), None)
        record.created = created
        target.handle(record)
