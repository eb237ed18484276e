"""Between the engine's loop and the callers: a thread that makes texts of tokens.

The loop must launch its next step, not decode text: it hands over a step's outputs with one `put`.
Nothing here may call torch: on a CPU only one thread may (see `CoreThread`).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence

from mm_core.engine.messages import TokenOutput

Handler = Callable[[float, Sequence[TokenOutput]], None]


class OutputThread:
    """Calls `handle(when, outputs)` for each `put(outputs)`, in order, in a thread of its own.

    when: `time.perf_counter()` of the put, unless it was given. `handle` must not raise.
    """

    def __init__(self, handle: Handler) -> None:
        self._handle = handle
        self._inbox: queue.SimpleQueue[tuple[float, Sequence[TokenOutput]] | Callable[[], object] | None]
        self._inbox = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="mm-core-outputs", daemon=True)

    def start(self) -> None:
        """Begin to handle; what was put before waits."""
        self._thread.start()

    def put(self, outputs: Sequence[TokenOutput]) -> None:
        """Queue a step's outputs, stamped with the time; returns at once."""
        self._inbox.put((time.perf_counter(), outputs))

    def put_at(self, when: float, outputs: Sequence[TokenOutput]) -> None:
        """The same for outputs of another process, which says when they came."""
        self._inbox.put((when, outputs))

    def call(self, work: Callable[[], object]) -> None:
        """Have something done behind what was put so far. It must not raise."""
        self._inbox.put(work)

    def close(self) -> None:
        """Handle what was put so far, then stop. From a listener, so from this thread: stop after it returned."""
        self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while (item := self._inbox.get()) is not None:
            if callable(item):
                item()
            else:
                self._handle(*item)
