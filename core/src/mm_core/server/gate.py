"""Gate: how many answers are in the engine, how many calls wait, and whose turn it is."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager

from mm_core.errors import DrainingError, OverloadedError
from mm_core.server.context import Call

_RECENT = 64  # calls that the rate is measured over
_FEWEST = 4  # calls that a rate needs
_MAX_RETRY_AFTER_S = 60
_LOOK_S = 0.01


class _Entry:
    """A call that waits. turns: of its answers that have no place yet, each of as many places as its second says."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.turns: deque[tuple[asyncio.Future[None], int]] = deque()


class Gate:
    """At most `max_running` places are taken inside; up to `max_waiting` calls wait (of one caller:
    `max_waiting_per_caller`), none that would wait longer than `max_queue_s`, as far as the rate of late tells. Bodies
    of all calls: `max_bytes`, of one caller's: `max_bytes_per_caller` (None: half of that).

    A place is an answer. Callers take turns, and one that took many places at a turn has its next one later: one with
    a thousand answers waiting delays another's single one by one place, or by one request of several answers. Where
    no more calls can wait, one of a caller with few of them takes the room of the newest one of whoever has most.
    Whoever is cancelled while waiting leaves without a trace. closing: set when the drain begins; streams without an
    end of their own watch it.
    """

    def __init__(
        self,
        max_running: int,
        max_waiting: int,
        max_waiting_per_caller: int | None = None,
        max_queue_s: float | None = None,
        max_bytes: int = 2**31,
        max_bytes_per_caller: int | None = None,
    ) -> None:
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.max_queue_s = max_queue_s
        self.max_waiting_per_caller = max_waiting if max_waiting_per_caller is None else max_waiting_per_caller
        self.running = 0
        self.refused = 0
        self._queues: dict[str, deque[_Entry]] = {}
        self._entries: dict[Call, _Entry] = {}
        # Fair queueing by start times: a caller's next turn is due behind the places that it was given before.
        self._due: dict[str, int] = {}
        self._now = 0
        self._inside = 0
        self._started: Callable[[], int] | None = None
        self._max_ahead = 0
        self._look: asyncio.TimerHandle | None = None
        self._ends: deque[tuple[float, int]] = deque(maxlen=_RECENT)
        self._drained_from: float | None = None
        self._calls = 0
        self._max_bytes = max_bytes
        self._max_bytes_per_caller = max_bytes // 2 if max_bytes_per_caller is None else max_bytes_per_caller
        self._bytes: Counter[str] = Counter()
        self._empty = asyncio.Event()
        self._empty.set()
        self.closing = asyncio.Event()

    @property
    def waiting(self) -> int:
        """Calls that wait for their turn."""
        return len(self._entries)

    @property
    def draining(self) -> bool:
        """Whether no new calls are let in."""
        return self._drained_from is not None

    def drain(self) -> None:
        """Refuse calls that arrive from now on; those that wait keep their turn."""
        if self._drained_from is None:
            self._drained_from = time.perf_counter()
            self.closing.set()

    def keep_ahead(self, started: Callable[[], int], max_ahead: int) -> None:
        """Let nobody in while more than that many inside have not begun to be answered. started: how many have.

        The engine serves whoever came first, so who waits there has no turn any more: all that one caller put into it
        goes before what another puts into it.
        """
        self._started, self._max_ahead = started, max_ahead

    def _fits(self, places: int) -> bool:
        if self.running + places > self.max_running:
            return False
        if self._started is None or self._inside < self._max_ahead or self._inside - self._started() < self._max_ahead:
            return True
        if self._look is None:  # nobody says when it begins to answer
            self._look = asyncio.get_running_loop().call_later(_LOOK_S, self._look_again)
        return False

    def _look_again(self) -> None:
        self._look = None
        self._let_in()

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
        name = call.caller.name
        if self.bytes_held + size > self._max_bytes:
            raise self._full("The calls that the server holds take as much memory as they may")
        if self._bytes[name] + size > self._max_bytes_per_caller:
            raise self._full("The calls of this key take as much memory as one key's may")
        self._bytes[name] += size
        call.body_bytes += size

    def release(self, call: Call) -> None:
        """The call is over, and its body with it. Idempotent."""
        name = call.caller.name
        self._bytes[name] -= call.body_bytes
        call.body_bytes = 0
        if not self._bytes[name]:
            del self._bytes[name]

    @property
    def bytes_held(self) -> int:
        """Of the bodies of calls on their way."""
        return self._bytes.total()

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
    async def enter(self, call: Call, places: int = 1) -> AsyncIterator[None]:
        """Wait for that many places (all there are, where there are fewer), and hold them while inside. A call may
        enter several times at once, for each of its prompts: where one is in, none of them is refused any more. Raises
        OverloadedError, DrainingError; both at once, or when another caller's call takes its room in the queue."""
        self.check_open(call)
        places = min(places, self.max_running)
        if not self._entries and self._fits(places):
            self._take(call, places)
        else:
            await self._wait(call, places)
        try:
            yield
        finally:
            self._leave(call, places)

    def _take(self, call: Call, places: int) -> None:
        self.running += places
        self._inside += 1
        call.places += places

    async def _wait(self, call: Call, places: int) -> None:
        entry = self._entries.get(call) or self._queue(call)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry.turns.append((turn, places))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._leave(call, places)  # the place came with the cancellation: pass it on
            else:
                self._forget(entry, turn)
            raise

    def _queue(self, call: Call) -> _Entry:
        """A new entry behind the caller's others. Raises OverloadedError where it finds no room."""
        name = call.caller.name
        own = self._queues.get(name, ())
        if not call.places:
            if len(own) >= self.max_waiting_per_caller:
                raise self._full("This key has as many calls waiting as one key may")
            if self.max_queue_s is not None and (self._expected_wait(name) or 0.0) > self.max_queue_s:
                raise self._full(f"The wait would be longer than {self.max_queue_s:g} s")
            if len(self._entries) >= self.max_waiting and not self._displace(len(own)):
                raise self._full("The server has as many calls waiting as it keeps")
        if not own:
            self._due[name] = max(self._due.get(name, 0), self._now)
        entry = self._entries[call] = _Entry(call)
        self._queues.setdefault(name, deque()).append(entry)
        return entry

    def _displace(self, own: int) -> bool:
        """Make room for a call of somebody who has `own` others waiting: whoever has most gives up the newest one,
        unless that would only turn the two around. Whether it did."""
        longest = max(self._queues.values(), key=len, default=deque[_Entry]())
        if len(longest) <= own + 1:
            return False
        entry = next((each for each in reversed(longest) if not each.call.places), None)
        if entry is None:
            return False
        error = self._full("Calls of other keys wait too, and this key has most")
        for turn, _ in entry.turns:
            if not turn.done():
                turn.set_exception(error)
        entry.turns.clear()
        self._drop(entry)
        return True

    def _forget(self, entry: _Entry, turn: asyncio.Future[None]) -> None:
        """Somebody does not wait any more; whoever stood behind may fit in."""
        entry.turns = deque(each for each in entry.turns if each[0] is not turn)
        if not entry.turns and self._entries.get(entry.call) is entry:
            self._drop(entry)
        self._let_in()

    def _drop(self, entry: _Entry) -> None:
        name = entry.call.caller.name
        del self._entries[entry.call]
        self._queues[name].remove(entry)
        if not self._queues[name]:
            del self._queues[name]

    def _leave(self, call: Call, places: int) -> None:
        """Places become free."""
        self.running -= places
        self._inside -= 1
        call.places -= places
        if self._entries:
            self._ends.append((time.perf_counter(), places))
        else:  # the rate at which calls end says something only while places are what is short
            self._ends.clear()
        self._let_in()

    def _let_in(self) -> None:
        """Free places go to the callers whose turns are due, to the oldest call of each. What does not fit holds up
        the rest, or it would wait for ever."""
        while self._queues:
            name = min(self._queues, key=self._due.__getitem__)
            entry = self._queues[name][0]
            turn, places = entry.turns[0]
            if not turn.done() and not self._fits(places):
                return
            entry.turns.popleft()
            if not entry.turns:
                self._drop(entry)
            if turn.done():  # cancelled, and not yet awake
                continue
            self._now = self._due[name]
            self._due[name] += places
            if name in self._queues:  # of callers that are due alike, the others come first
                self._queues[name] = self._queues.pop(name)
            self._take(entry.call, places)
            turn.set_result(None)
        self._due.clear()
        self._now = 0

    def _full(self, what: str) -> OverloadedError:
        self.refused += 1
        seconds = self.retry_after()
        return OverloadedError(f"{what}. Try again in {seconds} s.", retry_after=seconds)

    def rate(self) -> float | None:
        """Places that become free in a second since some have been waiting; None before there were some."""
        if len(self._ends) < _FEWEST:
            return None
        span = time.perf_counter() - self._ends[0][0]
        return (sum(places for _, places in self._ends) - self._ends[0][1]) / span if span > 0 else None

    def retry_after(self) -> int:
        """Seconds until those that wait now may have been served."""
        rate = self.rate()
        if not rate:
            return 1
        waiting = sum(map(_places_of, self._queues.values()))
        return min(max(math.ceil((waiting + 1) / rate), 1), _MAX_RETRY_AFTER_S)

    def _expected_wait(self, name: str) -> float | None:
        """Seconds until a new call of that caller would have its turn: each other caller has as many places before it
        as it has itself, at most."""
        rate = self.rate()
        if not rate:
            return None
        waiting = {other: _places_of(queue) for other, queue in self._queues.items()}
        own = waiting.pop(name, 0)
        return (own + sum(min(other, own + 1) for other in waiting.values()) + 1) / rate


def _places_of(queue: Iterable[_Entry]) -> int:
    return sum(places for entry in queue for _, places in entry.turns)
