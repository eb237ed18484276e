"""MediaPlanner: which items a step encodes, which rows stay for whom."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from mm_core.cache.encoder import EncoderCache
from mm_core.errors import EngineError
from mm_core.scheduler.plan import StepPlan
from mm_core.scheduler.sequence import EncodeItem, SchedulerStats, Sequence
from mm_core.types import MediaFeature, PlaceholderRange

if TYPE_CHECKING:
    from mm_core.scheduler.tiers import TierPlanner


class MediaPlanner:
    """The encoder's side of the scheduler.

    A sequence holds an item from the step that first reads it to the last; before that it may keep
    it, which ends where the room is wanted now. Only held items can make somebody wait, and whoever
    holds one can go on, or it is pinned and makes way, so nothing waits for ever.
    """

    def __init__(
        self, cache: EncoderCache, cost: Callable[[MediaFeature], int], stats: SchedulerStats, block_size: int
    ) -> None:
        self.cache = cache
        self._block_size = block_size
        self.tiers: TierPlanner | None = None
        self.cost = cost
        self._stats = stats

    def budget_cost(self, feature: MediaFeature) -> int:
        """Of an item that is not on the device: none where its rows are copied back."""
        cost = self.cost(feature)
        return 0 if self.tiers is not None and self.tiers.has_rows(feature, cost) else cost

    def fit(self, seq: Sequence, length: int, plan: StepPlan) -> int:
        """The part of a chunk whose media are there or can be encoded in this step."""
        start = seq.num_computed_tokens
        if length <= 0 or start >= seq.media_end:
            return length
        room, planned = self.cache.room, 0
        seen = set(seq.held_media)
        for r in seq.ranges:
            if r.offset >= start + length:
                break
            key = r.feature.key
            if r.end <= start or key in seen:
                continue
            seen.add(key)
            if not self.cache.is_held(key):
                room -= r.feature.num_tokens
            if room < 0 and r.offset <= start and not plan.rows_closed:
                self.cache.make_way({key: r.feature.num_tokens})
                room = self.cache.room - r.feature.num_tokens
            if plan.rows_closed or room < 0:
                plan.rows_closed = True
                return max(r.offset - start, 0)
            if key not in self.cache:
                cost = self.budget_cost(r.feature)
                if cost and not plan.fits_budget(cost, planned):
                    plan.budget_closed = True
                    return max(r.offset - start, 0)
                planned += cost
        return length

    def fit_all(self, seq: Sequence, plan: StepPlan) -> bool:
        """Whether all media of a sequence are there or can be encoded in this step, where its source needs
        them at once. Those that are over the whole budget together run alone."""
        features = {r.feature.key: r.feature for r in seq.media}
        cost = sum(self.budget_cost(feature) for key, feature in features.items() if key not in self.cache)
        if self._lacks(features.values()) and not plan.rows_closed:
            self.cache.make_way({key: feature.num_tokens for key, feature in features.items()})
        if features and (plan.rows_closed or self._lacks(features.values())):
            plan.rows_closed = True
            return False
        if cost and not plan.fits_budget(cost, 0):
            plan.budget_closed = True
            return False
        return True

    def _lacks(self, features: Iterable[MediaFeature]) -> bool:
        """Whether there is too little room to hold them all."""
        return self.cache.room < sum(f.num_tokens for f in features if not self.cache.is_held(f.key))

    def must_wait(self, seq: Sequence, plan: StepPlan) -> bool:
        """Whether a waiting sequence is behind one that waits for the encoder: were it to start with the
        tokens before its media, it would go before that one from then on."""
        if not (plan.rows_closed or plan.budget_closed):
            return False
        done = seq.seen_hits * self._block_size
        if done >= seq.media_end:
            return False
        return plan.rows_closed or next(r for r in seq.ranges if r.end > done).feature.key not in self.cache

    def take(self, seq: Sequence, start: int, length: int, plan: StepPlan) -> None:
        """Hold the chunk's media, scheduling those that are missing (`fit` made sure)."""
        if start < seq.media_end:
            self.hold(seq, [r for r in seq.ranges if r.offset < start + length and r.end > start], plan)

    def hold(self, seq: Sequence, ranges: Iterable[PlaceholderRange], plan: StepPlan) -> None:
        """Hold these items, scheduling those that are missing."""
        missing: dict[bytes, MediaFeature] = {}
        for r in ranges:
            key = r.feature.key
            if key in seq.held_media:
                continue
            seq.kept_media.discard(key)
            if key in self.cache:  # before making room for others, which could evict it
                self.cache.acquire(key, seq.seq_id)
                seq.held_media.add(key)
            else:
                missing[key] = r.feature
        for key, feature in missing.items():
            cost = self.cost(feature)
            if not self.cache.allocate(key, feature.num_tokens, cost, seq.seq_id, plan.step):
                raise EngineError("encoder cache room vanished within a step")
            seq.held_media.add(key)
            self._encode(seq, feature, plan)

    def _encode(self, seq: Sequence, feature: MediaFeature, plan: StepPlan) -> bool:
        """Have an item's rows made in this step; False if they are copied back."""
        cost = self.cost(feature)
        if self.tiers is not None and self.tiers.has_rows(feature, cost):
            plan.encode.append(EncodeItem(feature.key, feature, self.tiers.read_rows(feature.key, plan.step)))
            return False
        plan.encode.append(EncodeItem(feature.key, feature))
        plan.encoded += 1
        plan.encoder_left -= cost
        seq.encoded_rows += feature.num_placed
        self._stats.encoded_items += 1
        self._stats.encoded_rows += feature.num_tokens
        return True

    # -- ahead of need ---------------------------------------------------------------------

    def encode_ahead(self, sequences: Iterable[Sequence], plan: StepPlan) -> None:
        """Spend what is left of the step's encoder budget on media that will be needed, in the given order.

        It ends at the first item that does not fit, so that nothing overtakes that one.
        """
        if plan.rows_closed or plan.budget_closed:
            return
        for seq in sequences:
            if seq.media_ahead and not self._encode_for(seq, plan):
                return

    def _encode_for(self, seq: Sequence, plan: StepPlan) -> bool:
        # Places in a source say nothing of the decoder's prompt: all its media are needed.
        done = max(seq.num_computed_tokens, seq.seen_hits * self._block_size) if seq.source is None else -1
        for r in seq.media:
            key = r.feature.key
            if r.end <= done or key in seq.held_media or key in seq.kept_media:
                continue
            if key in self.cache:
                self.cache.keep(key, seq.seq_id)
            else:
                budget_cost = self.budget_cost(r.feature)
                if budget_cost and not plan.fits_budget(budget_cost, 0):
                    return False
                cost = self.cost(r.feature)
                if not self.cache.allocate_ahead(key, r.feature.num_tokens, cost, seq.seq_id, plan.step):
                    return False
                self._stats.encoded_ahead += self._encode(seq, r.feature, plan)
            seq.kept_media.add(key)
        seq.media_ahead = False  # all is there
        return True

    # -- letting go ------------------------------------------------------------------------

    def release_passed(self, seq: Sequence) -> None:
        """Let go of what neither the steps in flight read nor the next chunk begins in.

        A chunk that broke off within an item holds it; holding more for later could block a cache for good.
        A source's media are let go of with the step that computed it, the sequence's first.
        """
        done, planned = seq.num_completed_tokens, seq.num_computed_tokens
        read = {r.feature.key for r in seq.ranges if r.end > done and r.offset < planned}
        for key in seq.held_media - read:
            seq.held_media.discard(key)
            self.cache.release(key, seq.seq_id)

    def skip_cached(self, seq: Sequence) -> None:
        """A sequence starts behind its cached prefix, or with its source there: let go of what was kept for that."""
        if seq.kept_media:
            wanted = {r.feature.key for r in seq.ranges if r.end > seq.num_computed_tokens}
            for key in seq.kept_media - wanted:
                seq.kept_media.discard(key)
                self.cache.release(key, seq.seq_id)

    def release_all(self, seq: Sequence) -> None:
        """A sequence ends or is preempted, perhaps while a step in flight reads its media."""
        for key in seq.held_media | seq.kept_media:
            self.cache.abandon(key, seq.seq_id)
        seq.held_media.clear()
        seq.kept_media.clear()
        seq.media_ahead = bool(seq.media)

    def discard_failed(self, key: bytes, live: Iterable[Sequence]) -> list[Sequence]:
        """An item has no rows: who needs it has it encoded anew, in the step that needs it, which then tells
        that sequence what is wrong. Returns those that read it in a step in flight: that is void."""
        if key in self.cache:
            self.cache.discard(key)
        void = []
        for seq in live:
            if key not in seq.held_media and key not in seq.kept_media:
                continue
            done, planned = seq.num_completed_tokens, seq.num_computed_tokens
            reads = any(r.feature.key == key and r.end > done and r.offset < planned for r in seq.ranges)
            if seq.source_step or (reads and done < planned):
                void.append(seq)
            seq.held_media.discard(key)
            seq.kept_media.discard(key)
            seq.media_ahead = False  # not ahead of need again: it would fail again and again
        return void
