"""Nobody takes all of what there is little of."""

from __future__ import annotations

import asyncio
import gc
from contextlib import AsyncExitStack

from mm_core.server.shares import Shares


def test_one_caller_has_half_and_all_together_no_more_than_there_is() -> None:
    async def main() -> None:
        shares = Shares(4)
        async with AsyncExitStack() as held:
            for caller in ("a", "a", "b"):
                await held.enter_async_context(shares.of(caller))
            third = asyncio.ensure_future(held.enter_async_context(shares.of("a")))
            await asyncio.sleep(0)
            assert not third.done()
            await held.enter_async_context(shares.of("c"))
            fifth = asyncio.ensure_future(held.enter_async_context(shares.of("d")))
            await asyncio.sleep(0.01)
            assert not third.done()
            assert not fifth.done()
            third.cancel()
            fifth.cancel()
            await asyncio.gather(third, fifth, return_exceptions=True)
        async with shares.of("a"), shares.of("a"), shares.of("b"), shares.of("b"):
            pass
        del third, fifth  # who was cancelled knows where
        await asyncio.sleep(0)
        gc.collect()
        assert not shares._own

    asyncio.run(main())
