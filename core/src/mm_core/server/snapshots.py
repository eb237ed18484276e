"""The engine's counters for those who look often: asked for once for all who look at the same time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mm_core.errors import MMError

if TYPE_CHECKING:
    from mm_core.engine.async_engine import AsyncEngine

WAIT_S = 3.0  # for an engine in a long step; then the last known counters serve
COUNTERS = (
    "steps", "prompt_tokens", "generated_tokens", "computed_tokens", "queried_tokens", "preemptions", "encoded_rows",
    "encoder_calls", "encoder_seconds", "block_evictions",
)  # fmt: skip
_HITS = ("device", "host", "disk")


class Snapshots:
    """Counters that never fall: the engine's begin at 0 with every start of its process, and what was counted before
    is added. (What it counted between the last look and its end is lost.)"""

    def __init__(self) -> None:
        self._latest: Mapping[str, Any] = {}
        self._taken = -1e9
        self._job: asyncio.Task[None] | None = None
        self._now: dict[str, float] = {}
        self._before: dict[str, float] = {}

    async def take(self, engine: AsyncEngine, max_age_s: float = 0.0) -> Mapping[str, Any]:
        """The engine's `stats()`, at most `max_age_s` old; the last known ones where it does not answer in time."""
        if time.perf_counter() - self._taken >= max_age_s:
            if self._job is None or self._job.done():
                self._job = asyncio.create_task(self._ask(engine))
            await asyncio.wait((self._job,), timeout=WAIT_S)
        return self._latest

    async def _ask(self, engine: AsyncEngine) -> None:
        try:
            stats = await engine.stats()
        except MMError:
            return
        self.put(stats)
        self._taken = time.perf_counter()

    def put(self, stats: Mapping[str, Any]) -> None:
        """Take in counters as the engine tells them."""
        if "steps" not in stats:  # it has told none yet
            return
        found = {name: float(stats.get(name, 0)) for name in COUNTERS}
        hits = stats.get("prompt_hits", {})
        found.update({f"{level}_hits": float(hits.get(level, 0)) for level in _HITS})
        if any(value < self._now.get(name, 0) for name, value in found.items()):  # another process counts now
            for name, value in self._now.items():
                self._before[name] = self._before.get(name, 0) + value
        self._now, self._latest = found, stats

    @property
    def counters(self) -> dict[str, float]:
        """COUNTERS, and `device_hits`, `host_hits` and `disk_hits` in tokens, since the server's start."""
        return {name: value + self._before.get(name, 0) for name, value in self._now.items()}

    @property
    def latest(self) -> Mapping[str, Any]:
        """The engine's `stats()` as of the last look; empty before the first."""
        return self._latest
