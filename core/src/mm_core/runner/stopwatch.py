"""How long work on the device takes, without waiting for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_OPEN = 256  # stretches on a GPU whose ends may be outstanding; beyond, older ones are not counted


class Stopwatch:
    """Adds up seconds of stretches on one device: host time on a CPU, time between two events on a GPU's stream."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._open: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=_OPEN)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what is launched inside, on the current stream. What raises is not counted."""
        if not self._cuda:
            begin = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begin
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        yield
        end.record()
        if len(self._open) == _OPEN // 2:
            self._take_ended()
        self._open.append((start, end))

    def seconds(self) -> float:
        """Of all stretches whose ends have come."""
        self._take_ended()
        return self._seconds

    def _take_ended(self) -> None:
        while self._open and self._open[0][1].query():  # type: ignore[no-untyped-call]
            start, end = self._open.popleft()
            self._seconds += start.elapsed_time(end) / 1e3
