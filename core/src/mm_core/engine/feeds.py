"""Feeds: cache events on their way to a reader who may be slower than the engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from types import TracebackType
from typing import Self

from mm_core.types import CacheEvent

logger = logging.getLogger(__name__)


class Feed:
    """A queue of at most `capacity` events, and what there was at the start. Where the reader is too slow the oldest
    ones are lost; `lost` counts them. on_put is called in the thread that puts."""

    def __init__(self, capacity: int, on_put: Callable[[], None] | None = None) -> None:
        self.lost = 0
        self._capacity = capacity
        self._on_put = on_put
        self._events: deque[CacheEvent] = deque()
        self._ready = threading.Condition()
        self._closed = False

    def begin(self, events: Sequence[CacheEvent]) -> None:
        """What there is at the start; it counts to nobody's room."""
        self._capacity += len(events)
        self.put(events)

    def put(self, events: Sequence[CacheEvent]) -> None:
        """Add events; the oldest make room."""
        with self._ready:
            if self._closed:
                return
            self._events.extend(events)
            while len(self._events) > self._capacity:
                self._events.popleft()
                self.lost += 1
            self._ready.notify_all()
        self._tell()

    def close(self) -> None:
        """No more come; what is there can still be read."""
        with self._ready:
            self._closed = True
            self._ready.notify_all()
        self._tell()

    def _tell(self) -> None:
        if self._on_put is not None:
            with contextlib.suppress(RuntimeError):  # the reader's loop is closed
                self._on_put()

    def take(self) -> CacheEvent | None:
        """The oldest event, waiting for one; None at the end."""
        with self._ready:
            while not self._events:
                if self._closed:
                    return None
                self._ready.wait()
            return self._events.popleft()

    def poll(self) -> tuple[CacheEvent | None, bool]:
        """The oldest event, if there is one, and whether the end is reached."""
        with self._ready:
            event = self._events.popleft() if self._events else None
            return event, event is None and self._closed


class CacheEvents(Iterator[CacheEvent]):
    """Cache events as they come; ends with `close()` and with the engine. lost: how many a slow reader missed."""

    def __init__(self, feed: Feed, leave: Callable[[Feed], None]) -> None:
        self._feed = feed
        self._leave = leave

    @property
    def lost(self) -> int:
        """Events that were dropped, oldest first, because they were not read in time."""
        return self._feed.lost

    def __next__(self) -> CacheEvent:
        event = self._feed.take()
        if event is None:
            raise StopIteration
        return event

    def close(self) -> None:
        """Listen no more. Idempotent."""
        self._leave(self._feed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class Subscription:
    """Calls a listener for each event, in a thread of its own; call it to unsubscribe. lost: as of `CacheEvents`."""

    def __init__(self, feed: Feed, leave: Callable[[Feed], None], listener: Callable[[CacheEvent], None]) -> None:
        self._feed = feed
        self._leave = leave
        self._thread = threading.Thread(target=_listen, args=(feed, listener), name="mm-core-cache-events", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> int:
        """Events that were dropped, oldest first, because the listener was too slow."""
        return self._feed.lost

    def __call__(self) -> None:
        """Listen no more; what is queued is still told of, before this returns. Idempotent."""
        self._leave(self._feed)
        if threading.current_thread() is not self._thread:
            self._thread.join()


def _listen(feed: Feed, listener: Callable[[CacheEvent], None]) -> None:
    while (event := feed.take()) is not None:
        try:
            listener(event)
        except Exception:
            logger.exception("a listener of cache events failed")


class AsyncCacheEvents(AsyncIterator[CacheEvent]):
    """As `CacheEvents`, for `async for`."""

    def __init__(self, feed: Feed, leave: Callable[[Feed], None], news: asyncio.Event) -> None:
        self._feed = feed
        self._leave = leave
        self._news = news

    @property
    def lost(self) -> int:
        """Events that were dropped, oldest first, because they were not read in time."""
        return self._feed.lost

    async def __anext__(self) -> CacheEvent:
        while True:
            self._news.clear()
            event, ended = self._feed.poll()
            if event is not None:
                return event
            if ended:
                raise StopAsyncIteration
            await self._news.wait()

    async def aclose(self) -> None:
        """Listen no more. Idempotent."""
        self._leave(self._feed)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._leave(self._feed)
