"""One thread that runs many tasks by turns, each until it has to wait.

Preparing a request is mostly Python, which only one thread at a time can run. Threads that contend for the
interpreter's lock gain nothing and make everybody wait who needs it, the engine's thread above all. So one
thread does the Python of all requests, and pool threads what lets go of the lock: decoding, resizing.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError, Future
from typing import Any, Generic, TypeVar

T = TypeVar("T")

Steps = Generator[Future[Any], None, T]  # yields what it waits for; a yield returns when that is done


def nobody() -> None:
    """Nobody goes first."""


class _Wanted(Future[T]):
    """Remembers that somebody asked to cancel it, be it too late; a future with `alone` that it waits for is cancelled
    then, as nobody else waits for that."""

    dropped = False
    awaited: Future[Any] | None = None

    def cancel(self) -> bool:
        self.dropped = True
        self.let_go()
        return super().cancel()

    def let_go(self) -> None:
        """Cancel what is waited for, where nobody else does."""
        if self.awaited is not None and getattr(self.awaited, "alone", False):
            self.awaited.cancel()


class _Task(Generic[T]):
    def __init__(self, steps: Steps[T]) -> None:
        self.steps = steps
        self.future: _Wanted[T] = _Wanted()


class Coordinator:
    """Runs tasks in the order of their coming; those that need not wait any longer first. One whose
    future was asked to cancel ends, if it has begun, when its wait does: at once where it waits alone.

    give_way: called before each stretch of work; returns when nothing more urgent runs.
    """

    def __init__(self, name: str, give_way: Callable[[], None] = nobody) -> None:
        self._give_way = give_way
        self._new: deque[_Task[Any]] = deque()
        self._awake: deque[_Task[Any]] = deque()
        self._begun: set[_Task[Any]] = set()
        self._signals: queue.SimpleQueue[bool] = queue.SimpleQueue()  # one a task in either queue; False: stop
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, steps: Steps[T]) -> Future[T]:
        """Begin a task when its turn comes. Raises RuntimeError after `refuse`."""
        task = _Task(steps)
        with self._lock:
            if self._closed:
                raise RuntimeError("closed")
            self._new.append(task)
        self._signals.put(True)
        return task.future

    def refuse(self) -> None:
        """Take no new tasks, and cancel those that were not begun."""
        with self._lock:
            self._closed = True
        for task in tuple(self._new):
            task.future.cancel()

    def close(self) -> None:
        """Run what need not wait any longer, cancel the rest, and stop. Idempotent."""
        self.refuse()
        self._signals.put(False)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while self._signals.get():
            if self._awake:
                self._step(self._awake.popleft())
            else:
                self._begin(self._new.popleft())
        while self._awake:
            self._step(self._awake.popleft())
        for task in tuple(self._begun):
            self._end(task, CancelledError())

    def _begin(self, task: _Task[Any]) -> None:
        if task.future.set_running_or_notify_cancel():
            self._begun.add(task)
            self._step(task)

    def _step(self, task: _Task[Any]) -> None:
        """Run a task until it waits or ends."""
        if task.future.dropped:
            self._end(task, CancelledError())
            return
        self._give_way()
        try:
            awaited = next(task.steps)
        except StopIteration as end:
            self._begun.discard(task)
            task.future.set_result(end.value)
        except BaseException as error:  # a plugin's sys.exit: this thread serves the others' requests
            self._end(task, error)
        else:
            task.future.awaited = awaited
            awaited.add_done_callback(lambda _: self._wake(task))
            if task.future.dropped:  # meanwhile
                task.future.let_go()

    def _end(self, task: _Task[Any], error: BaseException) -> None:
        self._begun.discard(task)
        task.steps.close()
        task.future.set_exception(error)

    def _wake(self, task: _Task[Any]) -> None:
        """In whatever thread completed what the task waited for."""
        self._awake.append(task)
        self._signals.put(True)
