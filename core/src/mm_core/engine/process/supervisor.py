"""EngineProcess: keeps an engine process running, and stands where a CoreThread would."""

from __future__ import annotations

import logging
import queue
import signal
import threading
import time
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

from mm_core.engine.health import EngineHealth, EngineState
from mm_core.engine.messages import Message
from mm_core.engine.process.faults import from_fault
from mm_core.engine.process.launch import Launch
from mm_core.engine.process.parent import Child, Listeners
from mm_core.engine.process.wire import Failed, Progress, Ready
from mm_core.engine.startup import StartupTimes
from mm_core.errors import EngineDiedError, EngineError, MMError
from mm_core.tracing import Span

logger = logging.getLogger(__name__)

SILENCE_S = 2.0  # without a heartbeat, and there are four a second: the process is frozen
SHORT_LIFE_S = 60.0
MAX_SHORT_LIVES = 5
BACKOFF_S = (0.1, 0.5, 1.0, 2.0, 5.0)
_TICK_S = 0.25
_STATS_WAIT_S = 2.0
_CLOSE_S = 30.0
_CLOSE_WITH_DISK_S = 600.0
_AGAIN = "It is being started again: send the request again in some seconds."
_NEVER = "It is not started again: see the log, correct the cause, and make a new engine (restart the server)."


class EngineProcess:
    """The engine in a process of its own, started again when it ends or hangs.

    A thread of its own starts each process and waits for its end. What `send` is given while none is ready is
    dropped: `refusal` says why, and whoever has a request in the engine is told by `listeners.died`, once a death.
    After MAX_SHORT_LIVES deaths in a row, each within SHORT_LIFE_S of its start, no other process is started.
    """

    def __init__(self, launch: Launch, listeners: Listeners, startup: StartupTimes) -> None:
        self._launch = launch
        self._listeners = listeners
        self._startup = startup
        self._child: Child | None = None
        self._state: EngineState = "starting"
        self._first: Future[Ready] = Future()
        self._failure: MMError | None = None  # what the start at hand failed with
        self._began = time.monotonic()
        self._stats: dict[str, Any] = {}
        self._family = ("", 0)
        self._dumped = False
        self._last_words = ""
        self.refusal: EngineDiedError | None = None
        self.restarts = 0
        self._events: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._turn = threading.RLock()  # held while it comes up or goes down, and all are told
        self._thread = threading.Thread(target=self._run, name="mm-core-engine-process", daemon=True)
        self._thread.start()

    def wait_ready(self) -> Ready:
        """What the first process says when it is loaded. Raises what its start failed with."""
        return self._first.result()

    def speak_of(self, package: str, num_own: int) -> None:
        """See `Child.speak_of`; called once the first process is ready, and repeated to every other one."""
        self._family = (package, num_own)
        if self._child is not None:
            self._child.speak_of(package, num_own)

    # -- what a CoreThread does ------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Queue a message, where a process is ready; returns at once."""
        child = self._child
        if child is not None and self._state == "ready":
            child.send(message)

    def health(self, stall_timeout_s: float) -> EngineHealth:
        """See `EngineHealth`. A process that is silent for SILENCE_S is stuck, too."""
        child, state = self._child, self._state
        if child is None or state != "ready":
            return EngineHealth(state, restarts=self.restarts)
        now, beat = time.monotonic(), child.beat
        silent = now - child.beaten
        idle = beat.idle + silent if beat.busy or silent > SILENCE_S else beat.idle
        if silent > SILENCE_S or (beat.busy and idle > stall_timeout_s):
            state = "stuck"
        return EngineHealth(state, idle, beat.steps, self.restarts)

    def stats(self) -> dict[str, Any]:
        """The core's counters, and the process'; the last known ones where it does not answer."""
        child = self._child
        if child is not None and self._state == "ready":
            try:
                self._stats = child.ask().result(_STATS_WAIT_S).stats
            except (MMError, FutureTimeout, CancelledError):
                logger.debug("the engine's process told no counters")
        arena = {} if child is None else {**child.arena.counts(), "waiting": child.num_waiting}
        own = {"pid": None if child is None else child.process.pid, "restarts": self.restarts, "arena": arena}
        return {**self._stats, "engine_process": own}

    def take_spans(self) -> list[Span]:
        """What the process recorded since the last call."""
        child = self._child
        if child is None or self._state != "ready":
            return []
        try:
            spans = child.ask(spans=True).result(_STATS_WAIT_S).spans or []
        except (MMError, FutureTimeout, CancelledError):
            return []
        return [Span(*span) for span in spans]

    def close(self) -> None:
        """End the process, in order where it answers, and start none again. Idempotent."""
        self._closing.set()
        self._events.put("close")
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # -- the thread ------------------------------------------------------------------------

    def _run(self) -> None:
        short_lives = 0
        try:
            while not self._closing.is_set():
                lived = self._live_once()
                if self._closing.is_set() or not self._first.done() or self._first.exception() is not None:
                    return
                short_lives = short_lives + 1 if lived < SHORT_LIFE_S else 0
                if short_lives >= MAX_SHORT_LIVES:
                    self._give_up(short_lives)
                    return
                self._closing.wait(BACKOFF_S[min(short_lives, len(BACKOFF_S) - 1)])
                self._begin_again()
        except BaseException as error:  # no thread of ours, no memory: nobody else would ever hear
            logger.exception("the engine's process could not be kept running")
            self._fail_start(EngineError(f"The engine's process could not be started: {type(error).__name__}."))
            self._refuse("The engine's process ended and could not be started again.", _NEVER)
        finally:
            if self._closing.is_set():
                self._state = "closed"
            self._fail_start(EngineDiedError("The engine was closed while it was starting."))

    def _begin_again(self) -> None:
        self.restarts += 1
        self._state = "starting"
        logger.warning("starting the engine's process again (%d)", self.restarts)

    def _live_once(self) -> float:
        """Start a process and watch it to its end; how long it lived."""
        self._began, self._failure, self._dumped, self._last_words = time.monotonic(), None, False, ""
        ended = threading.Event()

        def on_end() -> None:
            ended.set()
            self._events.put("end")
            with self._turn:
                if self._state == "ready":
                    self._refuse(self._last_words or "The engine's process ended; what ran in it is lost.")

        with self._startup.part("process", "Starting the engine's process"):
            child = Child(self._launch, self._listeners, self._on_start, on_end)
        self._child = child
        if self._first.done():
            child.speak_of(*self._family)
        while not ended.is_set() and not self._closing.is_set():
            try:
                self._take_event(self._events.get(timeout=_TICK_S))
            except queue.Empty:
                self._watch(child)
        if self._closing.is_set() and not ended.is_set() and self._first.done() and self._state == "ready":
            disk = self._launch.config.kv_cache_config.disk_cache_path
            child.close(_CLOSE_S if disk is None else _CLOSE_WITH_DISK_S)
            return 0.0
        status = child.end()
        lived = time.monotonic() - self._began
        if not self._closing.is_set():
            if self._failure is None or self._first.done():
                logger.error("the engine's process %s after %.1f s", _how(status), lived)
            self._fail_start(self._failure or EngineDiedError(_while_starting(status)))
            if self._state != "dead" and self._first.exception() is None:
                self._refuse(f"The engine's process {_how(status)}; what ran in it is lost.")
        return lived

    def _take_event(self, event: str) -> None:
        if event == "ready" and self._state == "starting":
            again = self._first.done()
            with self._turn:  # it may end again meanwhile: who is told of that is told behind this
                self._state, self.refusal = "ready", None
                if again:
                    self._listeners.restarted()

    def _on_start(self, message: Progress | Ready | Failed) -> None:
        """In the receiver's thread."""
        match message:
            case Progress(doing):
                if not self._first.done():
                    self._startup.say(doing)
            case Failed(fault):
                self._failure = from_fault(fault)
            case Ready():
                if self._first.done():
                    self._events.put("ready")
                    return
                for name, seconds in message.seconds.items():
                    kind, colon, part = name.partition(": ")
                    self._startup.add(f"{kind}: engine's {part}" if colon else name, seconds)
                self._state = "ready"
                self._first.set_result(message)

    def _refuse(self, what: str, then: str = _AGAIN) -> None:
        """Who waits is told; what comes in from now on is refused."""
        self.refusal = EngineDiedError(f"{what} {then}")
        self._state = "dead"
        self._stats.update({name: 0 for name in ("running", "waiting", "steps_in_flight") if name in self._stats})
        if not self._closing.is_set():
            self._listeners.died(self.refusal)

    def _give_up(self, deaths: int) -> None:
        self._refuse(
            f"The engine's process ended {deaths} times, each within {SHORT_LIFE_S:.0f} s of its start.",
            _NEVER,
        )
        logger.critical("%s", self.refusal)

    def _fail_start(self, error: MMError) -> None:
        if not self._first.done():
            self._first.set_exception(error)

    def _watch(self, child: Child) -> None:
        """Dump the stacks of a process that takes no step, and end one that hangs for too long."""
        if self._state != "ready":
            return
        limit = self._launch.config.stall_timeout_s
        health = self.health(limit)
        if health.state != "stuck":
            self._dumped = False
            return
        frozen = time.monotonic() - child.beaten > SILENCE_S
        if not self._dumped and not frozen:
            self._dumped = True
            logger.error("the engine has work and took no step for %.0f s; the stacks of its threads:", health.idle_s)
            child.dump_stacks()
        if health.idle_s > 2 * limit:
            logger.error("the engine's process hangs: no step for %.0f s; it is ended", health.idle_s)
            self._last_words = "The engine's process hung and was ended; what ran in it is lost."
            child.process.kill()


def _how(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def _while_starting(status: int) -> str:
    return (
        f"The engine's process {_how(status)} while it was starting. Its last lines on stderr say why; SIGKILL often "
        "means that the system was out of memory."
    )
