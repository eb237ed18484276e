"""Scheduling policies: pure functions of what is known, replayable without a GPU.

A policy decides who starts next, what leaves a cache first, and whether what lies in the host's memory is copied
back or computed again. `POLICIES` has them by the name that `scheduling_policy` takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mm_core.scheduler.costs import CostModel

# Each step of waiting counts like this many cached tokens, so a request without any reuse
# overtakes one with a fully cached 2,304-token picture after at most 144 steps.
AGEING_TOKENS_PER_STEP = 16
# What a candidate may be behind the first of its group and still go with it.
GROUP_TOKENS = 4096
RESTORABLE_SHARE = 0.5  # of a cached token, for one that has to be copied back first


class Candidate(NamedTuple):
    """A waiting sequence as a policy sees it. arrival: its number in order of arrival. group: what it would compute
    first, the same for all that share it; empty: nothing that others could use. restorable_tokens: behind the cached
    ones, in the host's memory or on disk."""

    arrival: int
    cached_tokens: int
    waited_steps: int
    group: bytes = b""
    restorable_tokens: int = 0


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
    """Indices in order: most cached tokens first, with ageing so that nothing starves; among equals what most others
    wait for too, then by arrival. Those who would compute the same first follow the first of them at once, if they
    are not too far behind it: so what it computed is there when they need it.

    All age alike. So whoever arrives more than (tokens of the longest prefix + GROUP_TOKENS) /
    AGEING_TOKENS_PER_STEP steps after another, that wait in one window, cannot overtake it.
    """
    sizes = Counter(c.group for c in candidates)
    sizes[b""] = 1
    ranked = []
    for index, (arrival, cached, waited, group, restorable) in enumerate(candidates):
        score = cached + AGEING_TOKENS_PER_STEP * waited + int(RESTORABLE_SHARE * restorable)
        ranked.append((-score, -sizes[group], arrival, index))
    ranked.sort()
    if len(sizes) > len(candidates):  # the usual case: nobody shares anything
        return [row[3] for row in ranked]
    return _grouped(ranked, candidates)


def _grouped(ranked: Sequence[tuple[int, int, int, int]], candidates: Sequence[Candidate]) -> list[int]:
    """The same order, with the members of a group behind the first of them that is not too far before them."""
    firsts: dict[bytes, tuple[int, list[int]]] = {}  # group → where its latest row begins, and the row
    rows: list[list[int]] = []
    for behind, _, _, index in ranked:
        group = candidates[index].group
        first, row = firsts.get(group, (0, None)) if group else (0, None)
        if row is not None and behind - first <= GROUP_TOKENS:
            row.append(index)
        else:
            firsts[group] = behind, [index]
            rows.append(firsts[group][1])
    return [index for row in rows for index in row]


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
