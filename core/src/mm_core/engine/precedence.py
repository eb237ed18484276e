"""Who goes first at the interpreter's lock: the engine's thread.

Each operator that the engine's thread launches lets go of the lock and takes it again. With threads that
prepare requests beside it, every one of these waits until another thread lets go: a launch of a tenth of a
millisecond becomes several. So the others stand back, at points of their own choosing, while it launches.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE_S = 0.001
SLICE_S = 0.001
STRETCH_S = 0.0005
BREATH_S = 1e-5


class Precedence:
    """One thread marks when it is at work; the others `give_way` to it. Until it marks, nobody waits.

    A request that is not prepared costs more than a step that is late: an engine that works on and on
    has the lock for itself for PATIENCE_S, then the others have SLICE_S, and so by turns.
    """

    def __init__(self) -> None:
        self._idle = threading.Event()
        self._idle.set()
        self._used = False
        self._slice_end = 0.0

    def claim(self) -> None:
        """The engine's thread is at work from now on."""
        self._idle.clear()

    def release(self) -> None:
        """It is about to wait: for messages, or for the device."""
        self._used = True
        self._idle.set()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what the engine's thread waits for."""
        self.release()
        try:
            yield
        finally:
            self.claim()

    def give_way(self) -> None:
        """Called by other threads before a stretch of Python: returns when the engine's thread waits, or soon."""
        if not self._used or time.perf_counter() < self._slice_end:
            return
        if self._idle.is_set():
            # The engine's thread may be back and wait for the lock. It would get it in 5 ms: nobody is handed the
            # lock unless it is let go of for a while.
            time.sleep(BREATH_S)
        if self._idle.is_set() or self._idle.wait(PATIENCE_S):
            self._slice_end = time.perf_counter() + STRETCH_S
        else:
            self._slice_end = time.perf_counter() + SLICE_S
