"""Short work in the loop: in order, a little at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import pytest

from mm_core.server.desk import Desk


def run(what: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(what, 30))


def test_what_was_here_before_goes_first_and_all_else_in_order() -> None:
    async def calls() -> None:
        desk, done = Desk(), []

        async def one(name: int) -> None:
            await desk.do(lambda: done.append(("parse", name)) or time.sleep(0.002))
            await desk.do(lambda: done.append(("media", name)), first=True)

        await asyncio.gather(*(one(name) for name in range(12)))
        for kind in ("parse", "media"):
            assert [name for which, name in done if which == kind] == list(range(12))
        # The first calls are through before the last ones have begun.
        assert done.index(("media", 0)) < done.index(("parse", 4))
        assert done.index(("media", 7)) < done.index(("parse", 11))

    run(calls())


def test_others_have_their_turn_between() -> None:
    async def calls() -> None:
        desk, ticks = Desk(), 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0)
                ticks += 1

        ticking = asyncio.ensure_future(tick())
        await asyncio.gather(*(desk.do(lambda: time.sleep(0.002)) for _ in range(30)))
        ticking.cancel()
        assert ticks >= 10  # two pieces at a time

    run(calls())


def test_errors_go_to_who_asked_and_who_is_gone_is_passed_over() -> None:
    async def calls() -> None:
        desk, done = Desk(), []
        gone = asyncio.ensure_future(desk.do(lambda: done.append("gone")))
        wrong = asyncio.ensure_future(desk.do(lambda: 1 // 0))
        right = asyncio.ensure_future(desk.do(lambda: "right"))
        await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(ZeroDivisionError):
            await wrong
        assert await right == "right"
        assert done == []
        assert await desk.do(lambda: "again") == "again"

    run(calls())
