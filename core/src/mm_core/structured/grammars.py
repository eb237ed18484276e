"""Grammars: compiles what requests ask for, and keeps it for the next ones."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

from mm_core.config import StructuredOutput
from mm_core.errors import EngineClosedError, InvalidGrammarError, MMError
from mm_core.structured.checker import Checker
from mm_core.structured.grammar import grammar_text
from mm_core.structured.library import Library, TokenTable, load
from mm_core.structured.matcher import Compiled

KEPT_BYTES = 256 * 2**20
_KEPT = 4096  # grammars, good and bad ones
_BYTES_PER_CHARACTER = 256  # of a grammar's text, at least; measured: 40 to 280
_LEAST_BYTES = 2 * 2**20  # what the states of its lexer may come to with use, a quarter of the most
_REFUSED_BYTES = 64 * 2**10


class Grammars:
    """Compiled grammars by what was asked for. A thread of its own compiles; a process of its own tries them before.

    table: reads the vocabulary, once, when the first grammar comes. What could not be compiled is remembered, too.
    Thread-safe.
    """

    def __init__(self, table: Callable[[], TokenTable], kept_bytes: int = KEPT_BYTES) -> None:
        self._read_table = table
        self._kept_bytes = kept_bytes
        self._checker = Checker(lambda: self._table)
        self._lock = threading.Lock()
        self._known: OrderedDict[StructuredOutput, Future[Compiled]] = OrderedDict()
        self._sizes: dict[StructuredOutput, int] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mm-grammar")
        self._closed = False

    @cached_property
    def _table(self) -> TokenTable:
        return self._read_table()

    @cached_property
    def _library(self) -> Library:
        return Library(self._table)

    def start(self, spec: StructuredOutput, *, check: bool = False) -> Future[Compiled]:
        """Compile a grammar, or find it. Its errors (InvalidGrammarError, MissingExtraError, EngineError) come
        through the future, which several may share. check: try it first, elsewhere; left out only for what was tried
        by the process that took the request. Raises EngineClosedError."""
        with self._lock:
            if self._closed:
                raise EngineClosedError("The engine was closed. Create a new one.")
            known = self._known.get(spec)
            if known is not None:
                self._known.move_to_end(spec)
                return known
            future = self._known[spec] = self._pool.submit(self._compile, spec, check)
        future.add_done_callback(lambda done: self._keep(spec, done))
        return future

    def warm(self) -> None:
        """Do now what the first grammar would wait for. Raises MissingExtraError."""
        self.start(StructuredOutput(json_object=True), check=True).result()

    @property
    def kept(self) -> tuple[int, int]:
        """Grammars that are known, and about how many bytes they take."""
        with self._lock:
            return len(self._known), sum(self._sizes.values())

    @property
    def checker_pid(self) -> int | None:
        """The process that tries grammars, if it runs."""
        return self._checker.pid

    def close(self) -> None:
        """End the thread and the process. Idempotent."""
        with self._lock:
            self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._checker.close()
        self._known.clear()
        self._sizes.clear()

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

    def _keep(self, spec: StructuredOutput, done: Future[Compiled]) -> None:
        """Count what was compiled, forget what may go better next time, and what is too much."""
        error = None if done.cancelled() else done.exception()
        with self._lock:
            if done.cancelled() or (error is not None and not isinstance(error, InvalidGrammarError)):
                self._known.pop(spec, None)
                return
            self._sizes[spec] = _REFUSED_BYTES if error is not None else done.result().size
            total = sum(self._sizes.values())
            for old, future in list(self._known.items()):
                if total <= self._kept_bytes and len(self._known) <= _KEPT:
                    break
                if future.done() and old != spec:
                    total -= self._sizes.pop(old, 0)
                    del self._known[old]


def outcome(done: Future[Compiled]) -> Compiled:
    """The result of a future that others look at, too: an error of one's own."""
    error = done.exception()
    if isinstance(error, InvalidGrammarError):
        raise InvalidGrammarError(str(error), param=error.param)
    if isinstance(error, MMError):
        raise type(error)(str(error))
    return done.result()
