"""Live: what the frontend knows of a request that has not ended."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from mm_core.config import SamplingParams
from mm_core.engine.messages import TokenOutput
from mm_core.engine.output import RequestText
from mm_core.errors import MMError
from mm_core.types import PreparedRequest, RequestMetrics, RequestOutput, Usage

logger = logging.getLogger(__name__)

Listener = Callable[[RequestOutput | MMError], None]


@dataclass(slots=True)
class Live:
    """A request between `add` and its end. ask is what to prepare (where media are str, they may be
    paths if allow_paths), until that begins; text is None
    until it is done. open: answers that have not ended. Times are those of `RequestMetrics`; the
    counts are of `Usage`, prompt-side ones those of the first answer."""

    listener: Listener
    stream: bool
    ask: tuple[Any, SamplingParams, bool | None] | None
    allow_paths: bool
    arrival: float
    text: RequestText | None = None
    plain: bool = False
    open: set[int] = field(default_factory=set)
    preparing: Future[PreparedRequest] | None = None
    busy: bool = False  # being prepared, even if the request ended meanwhile
    prepared: float | None = None
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    token_times: list[float] | None = None
    prompt_tokens: int = 0
    media_tokens: int = 0
    cached_tokens: int = 0
    encoded_tokens: int = 0

    def count(self, output: TokenOutput) -> None:
        """Take in what an output says of the request so far."""
        if output.index == 0:
            self.cached_tokens = output.cached_tokens
        # An item encoded again after a preemption counts once: more than there is was not asked for.
        if output.started is not None and (self.started is None or output.started < self.started):
            self.started = output.started
        self.encoded_tokens = min(max(self.encoded_tokens, output.encoded_rows), self.media_tokens)

    def stamp(self, when: float, index: int) -> None:
        """A token came."""
        self.last_token = when
        if self.first_token is None:
            self.first_token = when
        if self.token_times is not None and index == 0:
            self.token_times.append(when)

    def output(self, text: RequestText) -> RequestOutput:
        """The answers so far."""
        times = None if self.token_times is None else tuple(self.token_times)
        metrics = RequestMetrics(self.arrival, self.prepared, self.first_token, self.last_token, times, self.started)
        counts = Usage(
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            completion_tokens=text.num_tokens,
            media_tokens=self.media_tokens,
            encoded_media_tokens=self.encoded_tokens,
        )
        return text.output(counts, metrics)

    def tell(self, result: RequestOutput | MMError) -> None:
        """Call the listener; its fault is its own, not other requests'."""
        try:
            self.listener(result)
        except Exception:
            logger.exception("a listener failed")
