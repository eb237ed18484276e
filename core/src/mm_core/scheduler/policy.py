"""Which waiting sequence comes next: pure functions of what is known, replayable without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

# Each step of waiting counts like this many cached tokens, so a request without any reuse
# overtakes one with a fully cached 2,304-token picture after at most 144 steps.
AGEING_TOKENS_PER_STEP = 16


class Candidate(NamedTuple):
    """A waiting sequence as a policy sees it. arrival: its number in order of arrival."""

    arrival: int
    cached_tokens: int
    waited_steps: int


WaitingPolicy = Callable[[Sequence[Candidate]], list[int]]


def longest_prefix_first(candidates: Sequence[Candidate]) -> list[int]:
    """Indices in order: most cached tokens first, with ageing so that nothing starves; ties by arrival."""

    def rank(index: int) -> tuple[int, int]:
        candidate = candidates[index]
        score = candidate.cached_tokens + AGEING_TOKENS_PER_STEP * candidate.waited_steps
        return -score, candidate.arrival

    return sorted(range(len(candidates)), key=rank)
