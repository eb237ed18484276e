"""What leaves a cache first: the policy's word, for blocks and for encoder rows."""

from __future__ import annotations

from collections.abc import Callable

from mm_core.cache.blocks import BlockPool
from mm_core.cache.encoder import EncoderCache
from mm_core.scheduler.costs import CostModel
from mm_core.scheduler.policy import Retained, SchedulingPolicy


def retain_by(
    policy: SchedulingPolicy, costs: Callable[[], CostModel], pool: BlockPool, encoder_cache: EncoderCache
) -> None:
    """Have both caches evict by the policy's worth. Each compares only its own: sizes are blocks, or rows."""

    def of_block(encoder_cost: float, hits: int, clock: float, stamp: int) -> float:
        return policy.worth(Retained(costs().weight(pool.block_size, encoder_cost), 1, hits, clock, stamp))

    def of_rows(cost: float, rows: int, hits: int, clock: float, stamp: int) -> float:
        return policy.worth(Retained(costs().weight(0, cost), rows, hits, clock, stamp))

    pool.worth = of_block
    encoder_cache.worth = of_rows
