"""Short work of calls in the loop, little of it at a time: of many calls that come at once the first are in the engine
while the others are still read, and whoever asks for health in between is answered."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

_TURN_S = 0.003

_Done = asyncio.Future[tuple[Any, BaseException | None]]


class Desk:
    """Does work by turns, in the order of its coming; between two turns the loop does all else. Belongs to one loop."""

    def __init__(self) -> None:
        self._first: deque[tuple[_Done, Callable[[], Any]]] = deque()
        self._rest: deque[tuple[_Done, Callable[[], Any]]] = deque()

    async def do(self, work: Callable[[], T], *, first: bool = False) -> T:
        """The result of `work`, or what it raises. first: for calls that were here before; it goes ahead of all that
        is new."""
        loop = asyncio.get_running_loop()
        if not self._first and not self._rest:
            loop.call_soon(self._turn)
        done: _Done = loop.create_future()
        (self._first if first else self._rest).append((done, work))
        result, error = await done
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    def _turn(self) -> None:
        end = time.perf_counter() + _TURN_S
        while (waiting := self._first or self._rest) and time.perf_counter() < end:
            done, work = waiting.popleft()
            if done.cancelled():
                continue
            try:
                done.set_result((work(), None))
            except BaseException as error:
                done.set_result((None, error))
        if waiting:
            asyncio.get_running_loop().call_soon(self._turn)
