"""Passes whose shapes repeat, as CUDA graphs: one launch instead of hundreds."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_REMEMBERED = 1024  # shapes whose sightings are counted
# Capturing takes about three times as long as running eagerly: a shape that pushes another one out has to be
# worth it, or more shapes than graphs would be captured over and over.
_SIGHTINGS, _SIGHTINGS_WHEN_FULL = 2, 16


def capture(run: Callable[[], object], pool: Any) -> torch.cuda.CUDAGraph:
    """What `run` launches on the current stream, as a graph. It has to have run before: kernels are
    compiled and libraries choose theirs on a first run.

    torch.cuda.graph() would also collect garbage and wait for the device, each time; other threads go on
    pinning memory meanwhile.
    """
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        run()
    finally:
        graph.capture_end()
    return graph


class _Captured(NamedTuple):
    """run is kept for what it refers to: the graph reads that memory."""

    graph: torch.cuda.CUDAGraph
    input: Tensor
    output: Tensor
    run: Callable[[Tensor], Tensor]


class CapturedPasses:
    """Up to `limit` shapes of a pass that come again and again, each as a graph; all share one memory pool.

    Nothing is captured before `enabled` is set: while kernels are compiled ahead, launches may do nothing.
    A pass is a function of one tensor that launches the same work whenever its key is the same. It
    may read other tensors that it holds references to, if their content never changes.
    """

    def __init__(self, limit: int) -> None:
        self.enabled = False
        self._limit = limit
        self._graphs: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._seen: OrderedDict[Hashable, int] = OrderedDict()
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._broken = False

    def repeats(self, key: Hashable) -> bool:
        """Note a sighting; whether the key came often enough to be `run`."""
        if self._broken or not self.enabled:
            return False
        if key in self._graphs:
            return True
        count = self._seen.pop(key, 0) + 1
        self._seen[key] = count
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        return count >= (_SIGHTINGS if len(self._graphs) < self._limit else _SIGHTINGS_WHEN_FULL)

    def run(self, key: Hashable, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """run(x), from the key's graph; captured now where there is none."""
        found = self._graphs.get(key)
        if found is None:
            return self._capture(key, run, x)
        self._graphs.move_to_end(key)
        found.input.copy_(x)
        found.graph.replay()
        return found.output.clone()

    def _capture(self, key: Hashable, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        current = torch.cuda.current_stream(x.device)
        stream = current
        if current == torch.cuda.default_stream(x.device):  # which cannot be captured
            self._stream = stream = self._stream or torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call]
        kept = x.clone()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            out = run(kept)  # the result of this time; compiles and picks kernels, which a capture must not do
            try:
                self._graphs[key] = self._record(run, kept)
            except RuntimeError as error:
                # Out of memory, or an op that cannot be captured: everything works without graphs as well.
                self._broken = True
                logger.warning("a pass could not be captured as a CUDA graph; going on without: %s", error)
        current.wait_stream(stream)
        out.record_stream(current)
        self._seen.pop(key, None)
        if len(self._graphs) > self._limit:
            self._graphs.popitem(last=False)
        return out

    def _record(self, run: Callable[[Tensor], Tensor], x: Tensor) -> _Captured:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        found: list[Tensor] = []
        graph = capture(lambda: found.append(run(x)), self._pool)
        return _Captured(graph, x, found[0], run)
