"""The process that tries grammars before the engine's does: `python -m mm_core.structured.check_main`.

It may be killed at any time, has bounds on its memory, and no rights, so that a grammar that the library cannot cope
with costs nothing but an error. It ends with its input, and where one grammar takes much longer than the parent waits.
"""

from __future__ import annotations

import resource
import signal
import sys
from contextlib import suppress
from typing import Any, BinaryIO

import msgspec

from mm_core import confinement
from mm_core.errors import InvalidGrammarError
from mm_core.structured.library import COMPILE_S, Library, TokenTable

GROWTH_BYTES = 512 * 2**20
"""Memory that trying grammars may take beside the vocabulary's."""

_OPEN_FILES = 64
_LENGTH = 4  # bytes before each message that say how long it is


def write_message(pipe: BinaryIO, message: Any) -> None:
    """Send a value of plain types."""
    body = msgspec.msgpack.encode(message)
    pipe.write(len(body).to_bytes(_LENGTH, "little") + body)
    pipe.flush()


def read_message(pipe: BinaryIO) -> Any:
    """The next value; EOFError at the end."""
    head = pipe.read(_LENGTH)
    body = pipe.read(int.from_bytes(head, "little")) if len(head) == _LENGTH else b""
    if not body:
        raise EOFError
    return msgspec.msgpack.decode(body)


def main() -> None:
    """Take the vocabulary, then answer each grammar with [what is wrong or "", bytes it took]."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    confinement.drop_privileges()
    pipe_in, pipe_out = sys.stdin.buffer, sys.stdout.buffer
    with suppress(EOFError, BrokenPipeError):
        tokens, special, ends = read_message(pipe_in)
        library = Library(TokenTable(tokens, special, ends))
        # The library's threads are there by now.
        confinement.limit(AS=_memory(0) + GROWTH_BYTES, NOFILE=_OPEN_FILES, NPROC=0, FSIZE=0, CORE=0)
        confinement.refuse_calls()
        write_message(pipe_out, ["", 0])
        while True:
            write_message(pipe_out, _try(library, read_message(pipe_in)))


def _try(library: Library, text: str) -> list[str | int]:
    before = _memory(1)
    signal.setitimer(signal.ITIMER_REAL, 2 * COMPILE_S)  # the parent may be gone
    try:
        matcher = library.compile(text)
    except InvalidGrammarError as error:
        return [str(error), 0]
    except BaseException as error:  # a panic of the library's
        return [f"The grammar cannot be used: it fails with {type(error).__name__}. Simplify it.", 0]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    taken = _memory(1) - before
    del matcher
    return ["", max(taken, 0)]


def _memory(kind: int) -> int:
    """Bytes of the address space (0), or of those that are in memory (1)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[kind]) * resource.getpagesize()


if __name__ == "__main__":
    main()
