"""What crosses the border of the engine core: plain frozen values, nothing else.

The core may run in a thread of the caller or in another process; only these types, and what
they hold, travel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from mm_core.errors import MMError
from mm_core.types import Logprob, PreparedRequest


@dataclass(frozen=True)
class Submit:
    """Run a prepared request; its `n` answers become as many sequences."""

    request: PreparedRequest


@dataclass(frozen=True)
class Abort:
    """End a request (index None) or one of its answers, and free all it holds.

    stopped: the answer is complete (a stop string was found), nothing went wrong.
    """

    request_id: str
    index: int | None = None
    stopped: bool = False


@dataclass(frozen=True)
class ClearCache:
    """Forget every reusable KV block that nobody uses."""


class TokenOutput(NamedTuple):  # one a sequence and step: half the cost of a dataclass
    """One token, or the end, of one answer.

    cached_tokens and encoded_rows count for the request so far. error is set where the request
    failed; finish_reason ends the answer.
    """

    request_id: str
    index: int  # type: ignore[assignment]  # tuple.index is nothing anybody wants of an output
    token_id: int | None
    logprobs: Mapping[int, Logprob] | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None
    cached_tokens: int = 0
    encoded_rows: int = 0
    error: MMError | None = None


Message = Submit | Abort | ClearCache
