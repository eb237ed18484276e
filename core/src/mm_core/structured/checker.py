"""Trying grammars in a process of its own, which is killed where one takes too long."""

from __future__ import annotations

import logging
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import BinaryIO, cast

from mm_core.confinement import child_environment
from mm_core.errors import EngineError, InvalidGrammarError
from mm_core.structured.check_main import read_message, write_message
from mm_core.structured.library import COMPILE_S, PARAM, TokenTable

logger = logging.getLogger(__name__)

_START_S = 60.0


class Checker:
    """Says whether grammars compile in time and memory. One at a time; thread-safe. The process is started by the
    first one, and anew, ahead of the next one, after one that it did not survive."""

    def __init__(self, table: Callable[[], TokenTable], limit_s: float = COMPILE_S) -> None:
        self._table = table
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._closed = False

    def begin(self) -> None:
        """Start the process, if it is not there, without waiting for it. Raises EngineError."""
        with self._lock:
            self._spawned()

    def check(self, text: str) -> int:
        """About how many bytes the compiled grammar takes. Raises InvalidGrammarError."""
        with self._lock:
            process = self._started()
            try:
                write_message(_in(process), text)
                error, size = self._reply(process, self._limit_s)
            except (TimeoutError, EOFError, BrokenPipeError) as fault:
                self._stop()
                threading.Thread(target=self._restart, name="mm-grammar-restart", daemon=True).start()
                much = f"more than {self._limit_s:g} s" if isinstance(fault, TimeoutError) else "too much memory"
                raise InvalidGrammarError(
                    f"The grammar cannot be used: compiling it takes {much}. Simplify it: fewer alternatives, smaller "
                    "counts.",
                    param=PARAM,
                ) from None
        if error:
            raise InvalidGrammarError(error, param=PARAM)
        return int(size)

    @property
    def pid(self) -> int | None:
        """The process that is ready, if there is one."""
        return None if self._process is None else self._process.pid

    def close(self) -> None:
        """End the process. Idempotent."""
        with self._lock:
            self._closed = True
            self._stop()

    def _spawned(self) -> subprocess.Popen[bytes]:
        if self._closed:
            raise EngineError("Grammars are not checked any more: the engine is closed.")
        if self._process is None or self._process.poll() is not None:
            self._stop()
            table = self._table()
            # -P: nothing is imported from the working directory.
            command = [sys.executable, "-P", "-m", "mm_core.structured.check_main"]
            self._process = subprocess.Popen(
                command, env=child_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
            self._ready = False
            try:
                write_message(_in(self._process), [table.tokens, table.special, table.ends])
            except BrokenPipeError as fault:
                raise self._does_not_start() from fault
        return self._process

    def _started(self) -> subprocess.Popen[bytes]:
        process = self._spawned()
        if not self._ready:
            try:
                self._reply(process, _START_S)
            except (TimeoutError, EOFError) as fault:
                raise self._does_not_start() from fault
            self._ready = True
        return process

    def _does_not_start(self) -> EngineError:
        code = None if self._process is None else self._process.poll()
        self._stop()
        return EngineError(
            f"The process that checks grammars does not start (exit status {code}). Free some memory, or see whether "
            "`python -m mm_core.structured.check_main` works."
        )

    def _reply(self, process: subprocess.Popen[bytes], limit_s: float) -> tuple[str, int]:
        """What the process answers. Raises TimeoutError, or EOFError where it is gone."""
        pipe = cast(BinaryIO, process.stdout)
        deadline = time.monotonic() + limit_s
        while not select.select([pipe], [], [], max(deadline - time.monotonic(), 0))[0]:
            if time.monotonic() >= deadline:
                raise TimeoutError
        error, size = read_message(pipe)  # short, and written at once
        return error, size

    def _restart(self) -> None:
        with self._lock:
            try:
                self._started()
            except EngineError as error:
                if not self._closed:
                    logger.warning("%s", error)

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            with suppress(BrokenPipeError):  # something was not flushed
                _in(process).close()
            cast(BinaryIO, process.stdout).close()


def _in(process: subprocess.Popen[bytes]) -> BinaryIO:
    return cast(BinaryIO, process.stdin)
