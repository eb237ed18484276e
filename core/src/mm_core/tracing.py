"""What ran when: spans on named tracks, for timelines. Off unless somebody holds a recorder."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

MAX_SPANS = 1_000_000


@dataclass(frozen=True)
class Span:
    """One piece of work: start and end in nanoseconds of `time.perf_counter_ns()`."""

    track: str
    name: str
    start_ns: int
    end_ns: int
    args: Mapping[str, Any] = field(default_factory=dict)


class SpanRecorder:
    """Collects spans from any thread; between two calls of `take` the first MAX_SPANS are kept, and later
    ones only counted, in `dropped`."""

    def __init__(self) -> None:
        self.dropped = 0
        self._spans: list[Span] = []
        self._lock = threading.Lock()

    def add(self, span: Span) -> None:
        """Record a span."""
        with self._lock:
            if len(self._spans) < MAX_SPANS:
                self._spans.append(span)
            else:
                self.dropped += 1

    @contextmanager
    def span(self, track: str, name: str, **args: Any) -> Iterator[None]:
        """Record what runs inside the `with`, on the host's clock."""
        start = time.perf_counter_ns()
        try:
            yield
        finally:
            self.add(Span(track, name, start, time.perf_counter_ns(), args))

    def take(self) -> list[Span]:
        """All spans so far, in the order they ended; the recorder is empty afterwards, and `dropped` 0."""
        with self._lock:
            spans, self._spans, self.dropped = self._spans, [], 0
        return spans
