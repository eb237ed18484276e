"""Threads for work on the host's memory and on files: checksums, disk. They never call the device."""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)


class _Job(NamedTuple):
    work: Callable[[], Any]
    then: Callable[[Any], None]
    otherwise: Any


class Workers:
    """`count` threads that work off what is submitted, in order. With no thread it is done at once, by the caller.

    What becomes of a job is told where `take` is called: in the thread that submitted it. news: set when there is
    something to take, perhaps also when there is not; whoever waits for it clears it first, and then takes.
    """

    def __init__(self, name: str, count: int, news: threading.Event) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._ended: deque[tuple[_Job, Any]] = deque()
        self._news = news
        self.pending = 0
        self._threads = [
            threading.Thread(target=self._run, name=f"mm-core-{name}-{index}", daemon=True) for index in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[], Any], then: Callable[[Any], None], otherwise: Any) -> None:
        """Do `work` and tell `then` its result, or `otherwise` where it raised."""
        self.pending += 1
        job = _Job(work, then, otherwise)
        if self._threads:
            self._jobs.put(job)
        else:
            self._do(job)

    def share(self, work: Callable[[Sequence[int]], list[int]], numbers: Sequence[int]) -> list[int]:
        """What `work` gives for parts of the numbers, together; all of a part's numbers where it raised. Waits: the
        threads do it at once, behind what was submitted."""
        step = -(-len(numbers) // max(len(self._threads), 1))
        parts = [numbers[at : at + step] for at in range(0, len(numbers), step or 1)]
        results: queue.SimpleQueue[list[int]] = queue.SimpleQueue()

        def do(part: Sequence[int]) -> None:
            found = list(part)
            try:
                found = work(part)
            finally:
                results.put(found)

        for part in parts:
            self.submit(lambda part=part: do(part), lambda _: None, None)  # type: ignore[misc]
        return [number for _ in parts for number in results.get()]

    def _do(self, job: _Job) -> None:
        try:
            result = job.work()
        except BaseException:  # the thread must live on, and whoever waits be told
            logger.exception("a copy in the background failed")
            result = job.otherwise
        self._ended.append((job, result))
        self._news.set()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._do(job)

    def take(self) -> None:
        """Tell the results that are there."""
        while self._ended:
            job, result = self._ended.popleft()
            self.pending -= 1
            job.then(result)

    def close(self, seconds: float = 10.0) -> None:
        """End the threads behind what was submitted; wait so long at most."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(seconds)
