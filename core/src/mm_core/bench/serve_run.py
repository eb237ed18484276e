"""Open-loop load: requests are sent when their time has come, whatever became of those before."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mm_core.bench.serve_http import Reply, Target, ask
from mm_core.bench.serve_loads import (
    Load,
    Pieces,
    arrivals,
    assistant_message,
    body,
    conversations,
    fitting_message,
)
from mm_core.errors import EngineError

CHAT = "/chat/completions"
_SPIN_S = 0.002  # before a request's time, the loop is no longer slept in: timers are late by up to a millisecond
_TICK_S = 0.02


@dataclass(frozen=True)
class Setup:
    """Who is asked, and how the client behaves. max_concurrency: requests in flight at most (None: any number)."""

    target: Target
    model: str
    timeout_s: float = 600.0
    max_concurrency: int | None = None


@dataclass(slots=True)
class Record:
    """What became of one request. Seconds after the run's start.

    due: when it should have been sent; held: seconds that it then waited for a place under max_concurrency; sent:
    when it was. times: of the events with text. error: a short kind, None for a good answer.
    """

    number: int
    turn: int
    due: float
    held: float
    sent: float
    ended: float
    times: list[float]
    asked_tokens: int
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    status: int = 0
    error: str | None = None
    detail: str = ""


@dataclass
class Outcome:
    """All requests of a run, and how the client itself did. delays: seconds by which its loop was late, a sample each
    _TICK_S. cpu_s: processor time of the client. seconds: from the start to the last answer."""

    records: list[Record] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)
    cpu_s: float = 0.0
    seconds: float = 0.0
    health: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For a line of JSON."""
        return asdict(self)

    @classmethod
    def merged(cls, parts: Sequence[dict[str, Any]]) -> Outcome:
        """Of several processes' `to_dict`."""
        records = sorted((Record(**each) for part in parts for each in part["records"]), key=lambda r: r.due)
        delays = [delay for part in parts for delay in part["delays"]]
        seconds = max((part["seconds"] for part in parts), default=0.0)
        return cls(records, delays, sum(part["cpu_s"] for part in parts), seconds)


@dataclass
class Progress:
    """Counts while a run goes on."""

    total: int
    sent: int = 0
    done: int = 0
    failed: int = 0

    @property
    def running(self) -> int:
        """Requests without an answer yet."""
        return self.sent - self.done


Report = Callable[[Progress], None]


class Part:
    """One process's share of a load, ready to be sent."""

    def __init__(self, setup: Setup, load: Load, part: int = 0, parts: int = 1) -> None:
        self._setup = setup
        self._load = load
        self._talks = conversations(load, part, parts)
        self._due = arrivals(load)[part::parts]
        self._numbers = list(range(part, load.requests, parts))
        # Of the first turns everything is known beforehand.
        self._first = [_call(setup, load, [talk.turns[0]], talk.output_tokens) for talk in self._talks]
        limit = setup.max_concurrency
        self._slots = None if limit is None else asyncio.Semaphore(max(1, limit // parts + (part < limit % parts)))
        self.progress = Progress(sum(len(talk.turns) for talk in self._talks))
        self._outcome = Outcome()
        self._begin = 0.0

    async def run(self, begin: float, report: Report | None = None) -> Outcome:
        """Send everything; `begin` is the run's start, of `time.perf_counter()`."""
        self._begin = begin
        await _until(begin)
        cpu = time.process_time()
        ticking = asyncio.create_task(self._tick(report))
        talks = []
        for place, due in enumerate(self._due):
            await _until(begin + due)
            talks.append(asyncio.create_task(self._talk(place, due)))
        await asyncio.gather(*talks)
        ticking.cancel()
        outcome = self._outcome
        outcome.cpu_s = time.process_time() - cpu
        outcome.seconds = max((r.ended for r in outcome.records), default=0.0)
        return outcome

    async def _tick(self, report: Report | None) -> None:
        """Watch how late the loop is, and tell how far the run is."""
        told = time.perf_counter()
        while True:
            wanted = time.perf_counter() + _TICK_S
            await asyncio.sleep(_TICK_S)
            now = time.perf_counter()
            self._outcome.delays.append(max(0.0, now - wanted))
            if report is not None and now - told >= 1.0:
                told = now
                report(self.progress)

    async def _talk(self, place: int, due: float) -> None:
        """A conversation: its turns one after another, until one fails."""
        talk, pieces = self._talks[place], self._first[place]
        messages: list[Pieces | bytes] = [talk.turns[0]]
        for turn in range(len(talk.turns)):
            if turn:
                messages.append(talk.turns[turn])
                pieces = _call(self._setup, self._load, messages, talk.output_tokens)
                due = time.perf_counter() - self._begin + self._load.think_s
                await asyncio.sleep(self._load.think_s)
            reply = await self._send(self._numbers[place], turn, due, pieces, talk.output_tokens)
            if reply.error is not None:
                self.progress.total -= len(talk.turns) - turn - 1
                return
            messages.append(assistant_message("".join(reply.words)))

    async def _send(self, number: int, turn: int, due: float, pieces: list[bytes], tokens: int) -> Reply:
        free = time.perf_counter()
        if self._slots is not None:
            await self._slots.acquire()
        held = time.perf_counter() - free if self._slots is not None else 0.0
        self.progress.sent += 1
        try:
            reply = await ask(self._setup.target, pieces, self._setup.timeout_s)
        finally:
            if self._slots is not None:
                self._slots.release()
        self.progress.done += 1
        self.progress.failed += reply.error is not None
        self._outcome.records.append(self._record(reply, number, turn, due, held, tokens))
        return reply

    def _record(self, reply: Reply, number: int, turn: int, due: float, held: float, tokens: int) -> Record:
        begin, usage = self._begin, reply.usage
        record = Record(
            number,
            turn,
            due,
            held,
            reply.started - begin,
            reply.ended - begin,
            [t - begin for t in reply.times],
            tokens,
        )
        record.status, record.error, record.detail = reply.status, reply.error, reply.detail
        if usage is not None:
            record.prompt_tokens, record.output_tokens = usage.prompt_tokens, usage.completion_tokens
            record.cached_tokens = usage.cached
        if record.error is None and not reply.words and not record.output_tokens:
            record.error = "empty answer"
        return record


def _call(setup: Setup, load: Load, messages: Sequence[Pieces | bytes], tokens: int) -> list[bytes]:
    """A whole call: head and body, in pieces."""
    pieces = body(setup.model, load, messages, tokens)
    target = setup.target
    return [target.head("POST", target.base + CHAT, sum(map(len, pieces))), *pieces]


async def _until(when: float) -> None:
    """Wait until that time of `time.perf_counter()`; the last stretch in turns with what else there is to do."""
    while (left := when - time.perf_counter()) > 0:
        await asyncio.sleep(left - _SPIN_S if left > _SPIN_S else 0)


async def warm_up(setup: Setup, load: Load, count: int) -> None:
    """Some requests at once, with other pictures and short answers. Raises EngineError where one fails."""
    talks = conversations(replace(load, requests=count), warm_up=True)
    calls = [_call(setup, load, [talk.turns[0]], talk.output_tokens) for talk in talks]
    for reply in await asyncio.gather(*(ask(setup.target, call, setup.timeout_s) for call in calls)):
        check(reply, "The warm-up")


def fault_of(reply: Reply) -> str:
    """What went wrong, without a full stop: a sentence of the caller's goes on behind it."""
    told = f"{reply.error}: {reply.detail}" if reply.detail else str(reply.error)
    return told.rstrip(". ")


def check(reply: Reply, what: str) -> None:
    """Raise EngineError for a reply that is none."""
    if reply.error is not None:
        raise EngineError(
            f"{what} failed: {fault_of(reply)}. Check --url, --model and --api-key, and the server's log."
        )


async def prompt_tokens(setup: Setup, load: Load, characters: int) -> int:
    """How many tokens the server makes of a request of the load whose text has that many characters."""
    probe = replace(load, characters=characters, stream=False)
    reply = await ask(setup.target, _call(setup, probe, [fitting_message(probe)], 1), setup.timeout_s)
    check(reply, "The request that counts prompt tokens")
    if reply.usage is None:
        raise EngineError("The server tells no usage, so --prompt-tokens cannot be met. Leave it out.")
    return reply.usage.prompt_tokens


async def fitted(setup: Setup, load: Load, wanted: int) -> int:
    """Characters of text for which a prompt has `wanted` tokens, or the most that do not exceed them.

    Raises EngineError where already the shortest text is too long.
    """
    low, high = 1, 64
    if (least := await prompt_tokens(setup, load, low)) > wanted:
        raise EngineError(f"--prompt-tokens {wanted}: the shortest request already has {least} tokens here.")
    while await prompt_tokens(setup, load, high) <= wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        found = await prompt_tokens(setup, load, middle)
        if found == wanted:
            return middle
        low, high = (middle, high) if found < wanted else (low, middle)
    return low
