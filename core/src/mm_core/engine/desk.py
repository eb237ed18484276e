"""CacheDesk: the frontend's side of what is asked of the caches."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from mm_core.engine.feeds import Feed
from mm_core.engine.messages import CacheNews, CacheReply, Message, Notice, WatchCaches
from mm_core.errors import EngineClosedError, EngineDiedError, MMError


class CacheDesk:
    """Numbers the queries, hands their replies to who waits, and events to who listens.

    send: takes messages to the engine core. The core calls `take` with its notices, in its own thread.
    """

    def __init__(self, send: Callable[[Message], None]) -> None:
        self.changes = threading.Lock()  # held by whoever pins, unpins or evicts: in the pipeline and in the core
        self._send = send
        self._numbers = itertools.count()
        self._waiting: dict[int, Future[Any]] = {}
        self._joining: dict[int, Feed] = {}
        self._feeds: list[Feed] = []
        self._listeners = 0
        self._closed = False
        self._down: EngineDiedError | None = None
        self._lock = threading.RLock()

    def ask(self, kind: Callable[..., Any], *args: Any, **options: Any) -> Future[Any]:
        """Send `kind(number, *args)` to the core; what it answers. Raises EngineClosedError, and EngineDiedError while
        the engine's process is down."""
        return self._ask(None, kind, *args, **options)

    def _ask(self, joining: Feed | None, kind: Callable[..., Any], *args: Any, **options: Any) -> Future[Any]:
        number = next(self._numbers)
        answer: Future[Any] = Future()
        with self._lock:
            if self._closed:
                raise _closed()
            if self._down is not None:
                raise type(self._down)(str(self._down))
            self._waiting[number] = answer
            if joining is not None:
                self._joining[number] = joining
            self._send(kind(number, *args, **options))
        return answer

    def join(self, feed: Feed) -> Future[Any]:
        """Give a feed what there is, then all that comes, without a gap; done when it has begun."""
        with self._lock:
            begun = self._ask(feed, WatchCaches)
            self._listeners += 1
        return begun

    def leave(self, feed: Feed) -> None:
        """Give a feed no more. Idempotent."""
        with self._lock:
            known = feed in self._feeds or feed in self._joining.values()
            self._feeds = [f for f in self._feeds if f is not feed]
            self._joining = {number: f for number, f in self._joining.items() if f is not feed}
            self._listeners -= known
            if known and not self._listeners and not self._closed and self._down is None:
                self._ask(None, WatchCaches, on=False)
        feed.close()

    def take(self, notice: Notice) -> None:
        """What the core tells. Returns soon: it is called between two steps."""
        match notice:
            case CacheNews(events):
                for feed in self._feeds:
                    feed.put(events)
            case CacheReply():
                self._take_reply(notice)

    def _take_reply(self, reply: CacheReply) -> None:
        with self._lock:
            answer = self._waiting.pop(reply.query_id, None)
            feed = self._joining.pop(reply.query_id, None)
            if feed is not None and isinstance(reply.result, tuple):
                feed.begin(reply.result)  # type: ignore[arg-type]
                self._feeds = [*self._feeds, feed]
        if answer is not None and answer.set_running_or_notify_cancel():
            if reply.error is None:
                answer.set_result(reply.result)
            else:
                answer.set_exception(reply.error)

    def close(self) -> None:
        """Nothing is answered any more: who waits is told. Idempotent."""
        self._closed = True
        self._end(_closed())

    def go_down(self, error: EngineDiedError) -> None:
        """The engine's process died, and what it cached: who waits is told, and until `come_up` whoever asks. Feeds
        end: what there is from then on is for readers who join anew."""
        self._down = error
        self._end(error)

    def come_up(self) -> None:
        """Another process is ready."""
        self._down = None

    def _end(self, error: MMError) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, {}
            feeds = [*self._feeds, *self._joining.values()]
            self._feeds, self._joining, self._listeners = [], {}, 0
        for answer in waiting.values():
            if answer.set_running_or_notify_cancel():
                answer.set_exception(error)
        for feed in feeds:
            feed.close()


def _closed() -> EngineClosedError:
    return EngineClosedError("The engine is closed. Make a new one with Engine.from_pretrained(...).")
