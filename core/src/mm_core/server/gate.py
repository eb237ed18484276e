"""Gate: how many calls are in the engine, how many wait, and whose turn it is."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from mm_core.errors import DrainingError, OverloadedError
from mm_core.server.context import Call

_RECENT = 64  # calls that the rate is measured over
_FEWEST = 4  # calls that a rate needs
_MAX_RETRY_AFTER_S = 60


class Gate:
    """At most `max_running` calls are inside; up to `max_waiting` wait (of one caller: `max_waiting_per_caller`), none
    that would wait longer than `max_queue_s`, as far as the rate of late tells. Bodies of all calls: `max_bytes`.

    Callers take turns: one with a thousand calls waiting delays another's single one by one place. Whoever is
    cancelled while waiting leaves without a trace. closing: set when the drain begins; streams without an end of
    their own watch it.
    """

    def __init__(
        self,
        max_running: int,
        max_waiting: int,
        max_waiting_per_caller: int | None = None,
        max_queue_s: float | None = None,
        max_bytes: int = 2**31,
    ) -> None:
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.max_queue_s = max_queue_s
        self.max_waiting_per_caller = max_waiting if max_waiting_per_caller is None else max_waiting_per_caller
        self.running = 0
        self.refused = 0
        self._queues: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._waiting = 0
        self._ends: deque[float] = deque(maxlen=_RECENT)
        self._drained_from: float | None = None
        self._calls = 0
        self._max_bytes = max_bytes
        self._bytes = 0
        self._empty = asyncio.Event()
        self._empty.set()
        self.closing = asyncio.Event()

    @property
    def waiting(self) -> int:
        """Calls that wait for their turn."""
        return self._waiting

    @property
    def draining(self) -> bool:
        """Whether no new calls are let in."""
        return self._drained_from is not None

    def drain(self) -> None:
        """Refuse calls that arrive from now on; those that wait keep their turn."""
        if self._drained_from is None:
            self._drained_from = time.perf_counter()
            self.closing.set()

    @contextmanager
    def present(self, call: Call) -> Iterator[None]:
        """A call on its way, in the engine or not: the drain waits for its end. Raises DrainingError."""
        self.check_open(call)
        self._calls += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._calls -= 1
            if not self._calls:
                self._empty.set()

    def hold(self, call: Call, size: int) -> None:
        """More of a call's body came; `release` gives it back. OverloadedError where all calls together hold too
        much: each is below its own bound, but there may be many."""
        if self._bytes + size > self._max_bytes:
            raise self._full("The calls that the server holds take as much memory as they may")
        self._bytes += size
        call.body_bytes += size

    def release(self, call: Call) -> None:
        """The call is over, and its body with it. Idempotent."""
        self._bytes -= call.body_bytes
        call.body_bytes = 0

    @property
    def bytes_held(self) -> int:
        """Of the bodies of calls on their way."""
        return self._bytes

    async def empty(self) -> None:
        """Wait until no call is on its way."""
        await self._empty.wait()

    @property
    def calls(self) -> int:
        """Calls on their way."""
        return self._calls

    def check_open(self, call: Call) -> None:
        """DrainingError for a call that came after the drain began."""
        if self._drained_from is not None and call.arrival >= self._drained_from:
            raise DrainingError("The server is shutting down and takes no new calls. Try another, or this one later.",
                                retry_after=5)  # fmt: skip

    @asynccontextmanager
    async def enter(self, call: Call) -> AsyncIterator[None]:
        """Wait for a place, hold it while inside. Raises OverloadedError, DrainingError; both at once."""
        self.check_open(call)
        if self.running < self.max_running and not self._waiting:
            self.running += 1
        else:
            await self._wait(call)
        try:
            yield
        finally:
            self._leave()

    async def _wait(self, call: Call) -> None:
        name = call.caller.name
        if self._waiting >= self.max_waiting:
            raise self._full("The server has as many calls waiting as it keeps")
        if len(self._queues.get(name, ())) >= self.max_waiting_per_caller:
            raise self._full("This key has as many calls waiting as one key may")
        if self.max_queue_s is not None and (self._expected_wait(name) or 0.0) > self.max_queue_s:
            raise self._full(f"The wait would be longer than {self.max_queue_s:g} s")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(name, deque()).append(turn)
        self._waiting += 1
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # the place came with the cancellation: pass it on
                self._leave()
            else:
                self._forget(name, turn)
            raise

    def _forget(self, name: str, turn: asyncio.Future[None]) -> None:
        own = self._queues.get(name)
        if own is None or turn not in own:  # met, and passed over, by _leave
            return
        own.remove(turn)
        self._waiting -= 1
        if not own:
            del self._queues[name]

    def _leave(self) -> None:
        """One place becomes free: it goes to the next caller's oldest call."""
        self.running -= 1
        if self._waiting:
            self._ends.append(time.perf_counter())
        else:  # the rate at which calls end says something only while places are what is short
            self._ends.clear()
        while self._queues and self.running < self.max_running:
            name, own = next(iter(self._queues.items()))
            turn = own.popleft()
            self._waiting -= 1
            if own:
                self._queues.move_to_end(name)
            else:
                del self._queues[name]
            if not turn.done():
                self.running += 1
                turn.set_result(None)

    def _full(self, what: str) -> OverloadedError:
        self.refused += 1
        seconds = self.retry_after()
        return OverloadedError(f"{what}. Try again in {seconds} s.", retry_after=seconds)

    def rate(self) -> float | None:
        """Calls that end in a second since some have been waiting; None before there were some."""
        if len(self._ends) < _FEWEST:
            return None
        span = time.perf_counter() - self._ends[0]
        return (len(self._ends) - 1) / span if span > 0 else None

    def retry_after(self) -> int:
        """Seconds until those that wait now may have been served."""
        rate = self.rate()
        if not rate:
            return 1
        return min(max(math.ceil((self._waiting + 1) / rate), 1), _MAX_RETRY_AFTER_S)

    def _expected_wait(self, name: str) -> float | None:
        """Seconds until a new call of that caller would have its turn: each other caller has as many before it as it
        has itself, at most."""
        rate = self.rate()
        if not rate:
            return None
        own = len(self._queues.get(name, ()))
        ahead = own + sum(min(len(queue), own + 1) for other, queue in self._queues.items() if other != name)
        return (ahead + 1) / rate
