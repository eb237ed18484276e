"""CoreThread: the thread that drives an EngineCore."""

from __future__ import annotations

import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from mm_core.engine.core import EngineCore
from mm_core.engine.health import EngineHealth, EngineState
from mm_core.engine.messages import Abort, CacheQuery, CacheReply, Message, Submit, TokenOutput
from mm_core.errors import EngineError
from mm_core.types import FinishReason

logger = logging.getLogger(__name__)


class CoreThread:
    """Runs an EngineCore in a thread of the caller's process.

    make builds the core, and so loads the model, in that same thread: each thread that calls torch
    on a CPU gets a team of workers of its own, and as soon as there are more workers than cores
    they sleep and wake around every call (measured: decode steps of 14 ms take 20 to 27). What it
    raises is raised here. listener gets the outputs of each step, in the core's thread; messages it
    sends while it runs are handled before the next step. on_failure: called where the loop fails, in place
    of refusing all requests until close().
    """

    _core: EngineCore

    def __init__(
        self,
        make: Callable[[], EngineCore],
        listener: Callable[[Sequence[TokenOutput]], None],
        on_failure: Callable[[], object] | None = None,
    ) -> None:
        self._listener = listener
        self._on_failure = on_failure
        self._inbox: queue.SimpleQueue[Message | Callable[[], None] | None] = queue.SimpleQueue()
        self._stats: dict[str, Any] = {}
        self._busy = False
        self._failed = False
        self._steps = 0
        self._stepped = time.monotonic()
        ready: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        target = functools.partial(self._main, make, ready)
        self._thread = threading.Thread(target=target, name="mm-core-engine", daemon=True)
        self._thread.start()
        error = ready.get()
        if error is not None:
            raise error

    def _main(self, make: Callable[[], EngineCore], ready: queue.SimpleQueue[BaseException | None]) -> None:
        try:
            self._core = make()
        except BaseException as error:
            ready.put(error)
            return
        self._core.grammars.wake = self.send
        self._stats = self._core.stats()
        ready.put(None)
        self._run()

    def health(self, stall_timeout_s: float) -> EngineHealth:
        """See `EngineHealth`."""
        idle = time.monotonic() - self._stepped
        state: EngineState = "stuck" if self._busy and idle > stall_timeout_s else "ready"
        return EngineHealth(state if self.alive and not self._failed else "dead", idle, self._steps)

    @property
    def pulse(self) -> tuple[int, float, bool]:
        """Steps taken, seconds since the last one or since there was nothing to do, and whether there is work."""
        return self._steps, time.monotonic() - self._stepped, self._busy

    @property
    def alive(self) -> bool:
        """Whether the loop still runs."""
        return self._thread.is_alive()

    def send(self, message: Message) -> None:
        """Queue a message; returns at once."""
        self._inbox.put(message)

    def stats(self) -> dict[str, Any]:
        """The core's counters, taken between two steps."""
        ready = threading.Event()
        self.ask_stats(lambda _: ready.set())
        while not ready.wait(0.05):
            if not self.alive:
                break
        return self._stats

    def ask_stats(self, told: Callable[[dict[str, Any]], None]) -> None:
        """The same for who does not wait: `told` is called with them in the core's thread."""

        def tell() -> None:
            if not self._failed:
                self._stats = self._core.stats()
            told(self._stats)

        self._inbox.put(tell)

    def close(self) -> None:
        """Stop after the step in flight; what is unfinished ends as aborted."""
        self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_messages():
                if self._core.has_work:
                    self._deliver(self._core.step())
                    self._steps += 1
                self._stepped = time.monotonic()
                self._core.tell_news()
        except BaseException as error:
            logger.exception("the engine's loop failed")
            self._failed = True
            if self._on_failure is not None:
                self._on_failure()
            self._refuse_all(error)
            return
        try:
            for request_id in self._core.request_ids:
                self._deliver(self._core.handle(Abort(request_id)))
            self._core.drain()  # the device must be done before its memory is given back
        except BaseException:  # close() waits for this thread
            logger.exception("the engine's last step failed")

    def _refuse_all(self, error: BaseException) -> None:
        """The books cannot be trusted any more: end every request, those to come too, until close()."""
        fault = EngineError(
            f"The engine's loop failed with {type(error).__name__}. This is a bug in mm-core: please report it with "
            "the log. Close this engine and make a new one."
        )
        fault.__cause__ = error
        ended = self._core.request_ids
        while True:
            self._deliver([TokenOutput(i, 0, None, finish_reason=FinishReason.ERROR.value, error=fault) for i in ended])
            message = self._inbox.get()
            if message is None:
                return
            if callable(message):
                message()
            if isinstance(message, CacheQuery):
                self._core.notify(CacheReply(message.query_id, error=fault))
            ended = [message.request.request_id] if isinstance(message, Submit) else []

    def _take_messages(self) -> bool:
        """Handle all that waits, or wait while there is no work. False: close."""
        self._busy = self._core.has_work
        block = not self._busy
        while block or not self._inbox.empty():
            message = self._receive()
            block = False
            if message is None:
                return False
            if callable(message):
                message()
            else:
                self._deliver(self._core.handle(message))
        return True

    def _receive(self) -> Message | Callable[[], None] | None:
        if not self._inbox.empty():
            return self._inbox.get()
        with self._core.precedence.waiting():
            message = self._inbox.get()
        self._stepped = time.monotonic()  # until now there was nothing to do
        self._busy = True
        return message

    def _deliver(self, outputs: Sequence[TokenOutput]) -> None:
        if not outputs:
            return
        try:
            self._listener(outputs)
        except Exception:  # a listener's fault must not stop everybody's tokens
            logger.exception("an output listener failed")
