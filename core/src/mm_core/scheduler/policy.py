"""Scheduling policies: pure functions of what is known, replayable without a GPU.

A policy decides who starts next, what leaves a cache first, and whether what lies in the host's memory is copied
back or computed again. `POLICIES` has them by the name that `scheduling_policy` takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mm_core.scheduler.costs import CostModel

# Each step of waiting counts like this many cached tokens, so a request without any reuse
# overtakes one with a fully cached 2,304-token picture after at most 144 steps.
AGEING_TOKENS_PER_STEP = 16


class Candidate(NamedTuple):
    """A waiting sequence as a policy sees it. arrival: its number in order of arrival. group: what it would compute
    first, the same for all that share it; empty: nothing that others could use."""

    arrival: int
    cached_tokens: int
    waited_steps: int
    group: bytes = b""


class Retained(NamedTuple):
    """Something in a cache that nobody uses now. seconds: what making it again takes (relative to others where
    nothing is measured). nbytes: its size. hits: how often it was found. clock: worth of what left last. stamp:
    grows with every use."""

    seconds: float
    nbytes: int
    hits: int
    clock: float
    stamp: int


class Restorable(NamedTuple):
    """What lies in the host's memory or on disk for a waiting sequence: tokens, the encoder's cost of their media,
    bytes."""

    tokens: int
    encoder_cost: float
    nbytes: int


WaitingPolicy = Callable[[Sequence[Candidate]], list[int]]
RetentionPolicy = Callable[[Retained], float]
RestorePolicy = Callable[[Restorable, CostModel], bool]


@dataclass(frozen=True)
class SchedulingPolicy:
    """order: indices of the candidates, first to start first. worth: of something retained; what has the least
    leaves first. restores: whether to copy back rather than to compute."""

    name: str
    order: WaitingPolicy
    worth: RetentionPolicy
    restores: RestorePolicy


def longest_prefix_first(candidates: Sequence[Candidate]) -> list[int]:
    """Indices in order: most cached tokens first, with ageing so that nothing starves; ties by arrival."""

    def rank(index: int) -> tuple[int, int]:
        candidate = candidates[index]
        score = candidate.cached_tokens + AGEING_TOKENS_PER_STEP * candidate.waited_steps
        return -score, candidate.arrival

    return sorted(range(len(candidates)), key=rank)


def first_come_first_served(candidates: Sequence[Candidate]) -> list[int]:
    """Indices in order of arrival."""
    return sorted(range(len(candidates)), key=lambda index: candidates[index].arrival)


def recompute_cost_for_size(retained: Retained) -> float:
    """GreedyDual-Size-Frequency (Cherkasova, 1998): seconds saved a byte, times uses, above the clock."""
    return retained.clock + (1 + retained.hits) * retained.seconds / max(retained.nbytes, 1)


def least_recently_used(retained: Retained) -> float:
    """The order of last use."""
    return float(retained.stamp)


def if_faster(restorable: Restorable, costs: CostModel) -> bool:
    """Copy back where that takes less time than computing; as long as computing was not measured, too."""
    recompute = costs.recompute(restorable.tokens, restorable.encoder_cost)
    return recompute == 0.0 or costs.restore(restorable.nbytes) < recompute


POLICIES: Mapping[str, SchedulingPolicy] = {
    policy.name: policy
    for policy in (
        SchedulingPolicy("reuse", longest_prefix_first, recompute_cost_for_size, if_faster),
        SchedulingPolicy("fcfs", first_come_first_served, least_recently_used, if_faster),
    )
}
