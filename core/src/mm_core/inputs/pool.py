"""Threads that do what was begun before what is new."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future
from typing import Any, TypeVar

T = TypeVar("T")

_Work = tuple[Future[Any], Callable[[], Any]]


class Pool:
    """At most `count` threads, named `name`_0, `name`_1, …, each begun when it is needed; `begin` is called in each
    first. Work is done in the order of its coming, but what must not wait behind new work goes before it: of many
    requests the first are ready soon then, and few are in memory half done."""

    def __init__(self, count: int, name: str, begin: Callable[[], None]) -> None:
        self._count, self._name, self._begin = count, name, begin
        self._threads: list[threading.Thread] = []
        self._first: deque[_Work] = deque()
        self._rest: deque[_Work] = deque()
        self._idle = 0
        self._closed = False
        self._wake = threading.Condition()

    def submit(self, work: Callable[[], T], *, first: bool = False) -> Future[T]:
        """Have work done, ahead of all that is not `first`. Raises RuntimeError after `shutdown`."""
        future: Future[T] = Future()
        with self._wake:
            if self._closed:
                raise RuntimeError("the pool was shut down")
            (self._first if first else self._rest).append((future, work))
            if self._idle >= len(self._first) + len(self._rest):
                self._wake.notify()
            elif len(self._threads) < self._count:
                thread = threading.Thread(target=self._run, name=f"{self._name}_{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
        return future

    def shutdown(self) -> None:
        """Cancel what has not begun, and wait for what runs. Idempotent."""
        with self._wake:
            self._closed = True
            waiting = [*self._first, *self._rest]
            self._first.clear()
            self._rest.clear()
            self._wake.notify_all()
        for future, _ in waiting:
            future.cancel()
            future.set_running_or_notify_cancel()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _run(self) -> None:
        fault: BaseException | None = None
        try:
            self._begin()
        except BaseException as error:  # nothing that this thread takes can be done, and those who wait are told so
            fault = BrokenExecutor("a thread of the pool could not begin")
            fault.__cause__ = error
        while (taken := self._take()) is not None:
            _do(*taken, fault)
            del taken  # or what it holds would live until the next one comes

    def _take(self) -> _Work | None:
        """The next work; None where there is none and none will come."""
        with self._wake:
            self._idle += 1
            try:
                while not (self._first or self._rest):
                    if self._closed:
                        return None
                    self._wake.wait()
                return (self._first or self._rest).popleft()
            finally:
                self._idle -= 1


def _do(future: Future[Any], work: Callable[[], Any], fault: BaseException | None) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        if fault is not None:
            raise fault
        result = work()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
