"""Grammars: compiles what requests ask for, and keeps it for the next ones."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

from mm_core.config import StructuredOutput
from mm_core.errors import EngineClosedError, InvalidGrammarError, MMError, OverloadedError
from mm_core.structured.checker import Checker
from mm_core.structured.grammar import grammar_text
from mm_core.structured.lanes import Lanes
from mm_core.structured.library import PARAM, Library, TokenTable, load
from mm_core.structured.matcher import Compiled
from mm_core.structured.tokens import unsupported

T = TypeVar("T")

KEPT_BYTES = 256 * 2**20
_KEPT = 4096  # grammars, good and bad ones
_BYTES_PER_CHARACTER = 256  # of a grammar's text, at least; measured: 40 to 280
_LEAST_BYTES = 2 * 2**20  # what the states of its lexer may come to with use, a quarter of the most
_REFUSED_BYTES = 64 * 2**10

MAX_WAITING = 256
"""Grammars that may wait to be compiled, where their number is bounded; a quarter of them in one lane."""
_LANE_CHARACTERS = 32  # of a salt; a server's salts begin alike where they are of one key


class Ticket(Future[Compiled]):
    """One waiter's. What nobody waits for any more, every ticket of it being cancelled, is not compiled."""

    alone = True


@dataclass(eq=False)
class _Work:
    """What is to be compiled, and who waits for it, each with its lane."""

    check: bool
    begun: bool = False
    tickets: dict[Ticket, str | None] = field(default_factory=dict)


class Grammars:
    """Compiled grammars by what was asked for. A thread of its own compiles; a process of its own tries them before.
    Who waits takes turns, by salt.

    table: reads the vocabulary, once, when the first grammar comes. What could not be compiled is remembered, too.
    Thread-safe.
    """

    def __init__(self, table: Callable[[], TokenTable], kept_bytes: int = KEPT_BYTES) -> None:
        self._read_table = table
        self._kept_bytes = kept_bytes
        self._checker = Checker(lambda: self._table)
        self._changed = threading.Condition()
        self._known: OrderedDict[StructuredOutput, Future[Compiled]] = OrderedDict()
        self._sizes: dict[StructuredOutput, int] = {}
        self._pending: dict[StructuredOutput, _Work] = {}
        self._lanes: Lanes[StructuredOutput] = Lanes()
        self._thread: threading.Thread | None = None
        self._unusable: str | None = None
        self._closed = False

    @cached_property
    def _table(self) -> TokenTable:
        return self._readable(self._read_table)

    @cached_property
    def _library(self) -> Library:
        table = self._table
        return self._readable(lambda: Library(table))

    def start(
        self, spec: StructuredOutput, *, check: bool = False, salt: str | None = None, bounded: bool = False
    ) -> Future[Compiled]:
        """Compile a grammar, or find it. Its errors (InvalidGrammarError, MissingExtraError, EngineError) come
        through the future; one that is not done is the caller's own, to be cancelled if it is not waited for.

        check: try it first, elsewhere; left out only for what was tried by the process that took the request. salt:
        of the request; those of one beginning take one turn. bounded: raises OverloadedError where too many wait.
        Raises EngineClosedError.
        """
        lane = None if salt is None else salt[:_LANE_CHARACTERS]
        ticket = Ticket()
        with self._changed:
            if self._closed:
                raise EngineClosedError("The engine was closed. Create a new one.")
            known = self._known.get(spec)
            if known is not None:
                self._known.move_to_end(spec)
                return known
            work = self._pending.get(spec)
            if bounded and work is None:
                self._check_room(lane)
            if work is None:
                work = self._pending[spec] = _Work(check)
            work.check |= check
            work.tickets[ticket] = lane
            if not work.begun:
                self._lanes.add(lane, spec)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mm-grammar", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        ticket.add_done_callback(lambda _: self._leave(spec, ticket))
        return ticket

    def warm(self) -> None:
        """Do now what the first grammar would wait for. Raises MMError."""
        try:
            outcome(self.start(StructuredOutput(json_object=True), check=True))
        except CancelledError:
            raise EngineClosedError("The engine was closed before its grammars were ready.") from None

    @property
    def kept(self) -> tuple[int, int]:
        """Grammars that are known, and about how many bytes they take."""
        with self._changed:
            return len(self._known), sum(self._sizes.values())

    @property
    def waiting(self) -> int:
        """Grammars that somebody waits for, and that were not begun."""
        with self._changed:
            return len(self._lanes)

    @property
    def checker_pid(self) -> int | None:
        """The process that tries grammars, if it runs."""
        return self._checker.pid

    def close(self) -> None:
        """End the thread and the process; who waits is cancelled. Idempotent."""
        with self._changed:
            self._closed = True
            waiting = [ticket for work in self._pending.values() if not work.begun for ticket in work.tickets]
            self._changed.notify_all()
        for ticket in waiting:
            ticket.cancel()
        if self._thread is not None:
            self._thread.join()
        self._checker.close()
        with self._changed:
            self._known.clear()
            self._sizes.clear()

    # -- who waits ---------------------------------------------------------------------------

    def _check_room(self, lane: str | None) -> None:
        if len(self._lanes) >= MAX_WAITING or self._lanes.count(lane) >= MAX_WAITING // 4:
            raise OverloadedError("Too many grammars wait to be compiled. Try again in a second, or use fewer at once.")

    def _leave(self, spec: StructuredOutput, ticket: Ticket) -> None:
        """A ticket is done. One that was cancelled takes with it what nobody else waits for."""
        if not ticket.cancelled():
            return
        with self._changed:
            work = self._pending.get(spec)
            if work is None or ticket not in work.tickets:
                return
            lane = work.tickets.pop(ticket)
            if work.begun:
                return
            if lane not in work.tickets.values():
                self._lanes.remove(lane, spec)
            if not work.tickets:
                del self._pending[spec]

    # -- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        while (spec := self._next()) is not None:
            done: Future[Compiled] = Future()
            try:
                done.set_result(self._compile(spec, self._pending[spec].check))
            except BaseException as error:  # a panic of the library's
                done.set_exception(error)
            with self._changed:
                work = self._pending.pop(spec)
                self._keep(spec, done)
            for ticket in tuple(work.tickets):
                if ticket.set_running_or_notify_cancel():
                    _copy(done, ticket)

    def _next(self) -> StructuredOutput | None:
        """What is compiled next, once there is something; None at the end."""
        with self._changed:
            while not self._closed:
                spec = self._lanes.take()
                if spec is not None:
                    self._pending[spec].begun = True
                    return spec
                self._changed.wait()
        return None

    def _compile(self, spec: StructuredOutput, check: bool) -> Compiled:
        if check:
            load()  # else its absence would be told by the process
            self._checker.begin()
        library = self._library
        text = grammar_text(spec, self._table.leading_space)
        size = max(len(text) * _BYTES_PER_CHARACTER, _LEAST_BYTES)
        if check:
            size = max(size, self._checker.check(text))
        return Compiled(library, text, size)

    def _readable(self, read: Callable[[], T]) -> T:
        """What is read of the vocabulary. Where that failed it fails again without being tried."""
        if self._unusable is None:
            try:
                return read()
            except InvalidGrammarError as error:
                self._unusable = str(error)
            except (MMError, MemoryError, OSError):
                raise
            except Exception as error:
                self._unusable = str(unsupported(f"reading it fails with {type(error).__name__}"))
        raise InvalidGrammarError(self._unusable, param=PARAM)

    def _keep(self, spec: StructuredOutput, done: Future[Compiled]) -> None:
        """Count what was compiled, forget what may go better next time, and what is too much."""
        error = done.exception()
        if self._closed or (error is not None and not isinstance(error, InvalidGrammarError)):
            return
        self._known[spec] = done
        self._sizes[spec] = _REFUSED_BYTES if error is not None else done.result().size
        total = sum(self._sizes.values())
        while len(self._known) > 1 and (total > self._kept_bytes or len(self._known) > _KEPT):
            old, _ = self._known.popitem(last=False)
            total -= self._sizes.pop(old, 0)


def outcome(done: Future[Compiled]) -> Compiled:
    """The result of a future that others look at, too: an error of one's own."""
    error = done.exception()
    if isinstance(error, InvalidGrammarError):
        raise InvalidGrammarError(str(error), param=error.param)
    if isinstance(error, MMError):
        raise type(error)(str(error))
    return done.result()


def _copy(done: Future[Compiled], ticket: Ticket) -> None:
    error = done.exception()
    if error is None:
        ticket.set_result(done.result())
    else:
        ticket.set_exception(error)
