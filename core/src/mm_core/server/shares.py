"""Room for a few at a time, of which nobody takes all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary


class Shares:
    """At most `total` at a time, and half of that for one caller."""

    def __init__(self, total: int) -> None:
        self._each = max(total // 2, 1)
        self._all = asyncio.Semaphore(total)
        self._own: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    @asynccontextmanager
    async def of(self, caller: str) -> AsyncIterator[None]:
        """Wait for room, and hold it while inside."""
        own = self._own.setdefault(caller, asyncio.Semaphore(self._each))
        async with own, self._all:
            yield
