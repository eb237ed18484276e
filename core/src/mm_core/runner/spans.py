"""Spans of work on the device, measured by its own events and put on the host's clock."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mm_core.tracing import Span, SpanRecorder


class DeviceSpans:
    """Hands spans to a recorder once the device is past them; without a recorder it does nothing."""

    def __init__(self, recorder: SpanRecorder | None, device: torch.device) -> None:
        self._recorder = recorder
        self._cuda = device.type == "cuda"
        self._open: deque[tuple[str, str, Any, Any, dict[str, Any]]] = deque()
        if recorder is not None and self._cuda:
            self._anchor = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._anchor.record()
            self._anchor.synchronize()
            self._anchor_ns = time.perf_counter_ns()

    @contextmanager
    def span(self, track: str, name: str, **args: Any) -> Iterator[None]:
        """What the current stream is given inside the `with`; on a CPU, what runs inside it."""
        if self._recorder is None:
            yield
        elif not self._cuda:
            with self._recorder.span(track, name, **args):
                yield
        else:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            yield
            end.record()
            self._open.append((track, name, start, end, args))

    def resolve(self) -> None:
        """Pass on what has ended on the device."""
        if self._recorder is None:
            return
        waiting: deque[tuple[str, str, Any, Any, dict[str, Any]]] = deque()
        while self._open:
            track, name, start, end, args = entry = self._open.popleft()
            if end.query():
                begin = self._anchor_ns + int(self._anchor.elapsed_time(start) * 1e6)
                # Not from the anchor: the device counts in float32, and that is minutes away.
                duration = int(start.elapsed_time(end) * 1e6)
                self._recorder.add(Span(track, name, begin, begin + duration, args))
            else:
                waiting.append(entry)
        self._open = waiting
