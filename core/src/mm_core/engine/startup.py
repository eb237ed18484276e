"""What a start takes, part by part, and a line on the terminal that says what is happening."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

logger = logging.getLogger(__name__)

_SHOW_AFTER_S = 2.0


class StartupTimes:
    """Seconds by part, in the order the parts ended; "ready" is all of it, from the call on.

    Parts of the loading thread follow each other and add up to "ready" but for small change. Those
    whose names begin with "background" ran beside them. show_progress: name the running part on a
    terminal once the start has taken two seconds.
    """

    def __init__(self, *, show_progress: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self._begin = time.perf_counter()
        self._lock = threading.RLock()
        self._part = "Starting"
        self._bar: tqdm[None] | None = None
        self._timer: threading.Timer | None = None
        if show_progress:
            self._timer = threading.Timer(_SHOW_AFTER_S, self._show)
            self._timer.daemon = True
            self._timer.start()

    @contextmanager
    def part(self, name: str, doing: str = "") -> Iterator[None]:
        """Measure what runs inside the `with`; `doing` says it to the user."""
        if doing:
            self.say(doing)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Count seconds towards a part; from any thread."""
        with self._lock:
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def finish(self) -> None:
        """The engine is ready: log the parts, take the line off the terminal."""
        self.add("ready", time.perf_counter() - self._begin)
        self.close()
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.seconds.items() if name != "ready")
        logger.info("ready after %.2f s (%s)", self.seconds["ready"], parts)

    def close(self) -> None:
        """Take the line off the terminal. Idempotent."""
        with self._lock:
            timer, self._timer = self._timer, None
            bar, self._bar = self._bar, None
        if timer is not None:
            timer.cancel()
        if bar is not None:
            bar.close()

    def say(self, doing: str) -> None:
        """What is going on now, for the line on the terminal."""
        with self._lock:
            self._part = doing
            if self._bar is not None:
                self._bar.set_description_str(doing)

    def _show(self) -> None:
        with self._lock:
            if self._timer is not None:  # not finished meanwhile
                # disable=None: nothing is written where stderr is no terminal.
                self._bar = tqdm(desc=self._part, bar_format="{desc} … {elapsed}", leave=False, disable=None)
