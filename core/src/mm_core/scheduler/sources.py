"""SourcePlanner: what cross-attention reads, computed in a sequence's first step unless it is there."""

from __future__ import annotations

from mm_core.cache.blocks import BlockPool
from mm_core.errors import ContextLengthError, MediaTooLargeError
from mm_core.scheduler.media import MediaPlanner
from mm_core.scheduler.plan import StepPlan
from mm_core.scheduler.reuse import BlockReuse
from mm_core.scheduler.sequence import ScheduledBatch, SchedulerStats, Sequence, Status, StepResult
from mm_core.types import PreparedRequest


class SourcePlanner:
    """Sources of the scheduler's sequences.

    A source's keys and values lie in blocks of the same pool as everybody's, in a sequence's "cross"
    table; the last may be partly filled. They are computed in one step, from media that are held until
    that step is done, and are found again only if all of them are still there.
    """

    def __init__(self, pool: BlockPool, reuse: BlockReuse, media: MediaPlanner, stats: SchedulerStats) -> None:
        self._pool = pool
        self._reuse = reuse
        self._media = media
        self._stats = stats

    def blocks_of(self, request: PreparedRequest) -> int:
        """Blocks that the request's source takes; 0 without one."""
        return 0 if request.source is None else self._pool.blocks_for(request.source.num_tokens)

    def check(self, request: PreparedRequest) -> None:
        """Raise the error of a request that could never run, however empty the caches are."""
        rows = {r.feature.key: r.feature.num_tokens for r in request.media}
        largest = max(rows.values(), default=0)
        capacity = self._media.cache.capacity
        if largest > capacity:
            raise MediaTooLargeError(
                f"An item of {largest} media tokens exceeds the encoder cache of {capacity}. Raise "
                "encoder_cache_tokens, or send the item smaller (mm_processor_kwargs)."
            )
        if request.source is None:
            return
        if sum(rows.values()) > capacity:
            raise MediaTooLargeError(
                f"The request's media have {sum(rows.values())} media tokens, which the encoder cache of {capacity} "
                "must hold at once. Raise encoder_cache_tokens, or send fewer or smaller items."
            )
        left = self._pool.num_blocks - self.blocks_of(request)
        if self._pool.blocks_for(len(request.token_ids) + 1) > left:
            raise ContextLengthError(
                f"The request needs {request.source.num_tokens} tokens of the KV cache for what its answer attends "
                f"to, and {len(request.token_ids)} for its prompt; the cache holds "
                f"{self._pool.num_blocks * self._pool.block_size}. Give it more room: KvCacheConfig(num_blocks=...), "
                "cpu_cache_size or free_gpu_memory_fraction."
            )

    def max_length(self, request: PreparedRequest) -> int:
        """Tokens of prompt and answer that the pool can hold beside the source."""
        return (self._pool.num_blocks - self.blocks_of(request)) * self._pool.block_size

    def fit(self, seq: Sequence, plan: StepPlan) -> bool:
        """Whether the sequence's source, which is not there, can be computed in this step."""
        if seq.source is None:
            return True
        if not plan.fits_source(seq.source.num_tokens):
            plan.sources_closed = True
            return False
        return self._media.fit_all(seq, plan)

    def start(self, seq: Sequence, plan: StepPlan) -> None:
        """Compute the source of a sequence that starts, into its "cross" table (`fit` made sure)."""
        if seq.source is None:
            return
        seq.source_step = plan.step
        self._media.hold(seq, seq.media, plan)
        plan.sources.append(seq)
        plan.source_left -= seq.source.num_tokens
        self._stats.computed_sources += 1

    def finish(self, batch: ScheduledBatch, result: StepResult) -> None:
        """Publish what a step computed, but for sequences that failed in it."""
        for seq in batch.sources:
            if seq.status is not Status.RUNNING or seq.source_step != batch.step:
                continue  # it ended or was preempted meanwhile
            sampled = result.sampled.get(seq.seq_id)
            if seq.seq_id not in result.failed and (sampled is None or sampled.finite):
                seq.source_step = 0
                self._reuse.publish_source(seq)
