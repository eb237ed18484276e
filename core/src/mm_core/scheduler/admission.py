"""Admission: which waiting sequences start, and which must wait for what."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

from mm_core.scheduler.plan import Outcome, StepPlan
from mm_core.scheduler.sequence import Sequence
from mm_core.scheduler.transfers import BlockCopy

if TYPE_CHECKING:
    from mm_core.scheduler.scheduler import Scheduler

_FORESEEN = 64  # that wait for copies, before nobody behind them is looked at


class Admission:
    """Starts a scheduler's waiting sequences, in the policy's order.

    look_again: something has changed since it found nothing to start; until then it is not tried again.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.look_again = True
        self._scheduler = scheduler
        self._refused: tuple[int, int, int, int] | None = None  # what the first that found no room wants
        self._claims_seen = 0

    def admit_waiting(self, plan: StepPlan) -> None:
        """Start as many as the step and the caches have room for."""
        scheduler = self._scheduler
        if not scheduler.waiting or len(scheduler.running) >= scheduler.config.max_num_seqs or plan.tokens_left <= 0:
            return
        same = not self.look_again and self._claims_seen == scheduler.reuse.dropped_claims
        refused = self._refused if same else None
        if same and refused is None:
            return
        plan.future = scheduler.outlook.future(scheduler.running)
        if refused is not None and plan.lacks_room(scheduler.pool.num_available, *refused):
            return
        self.look_again, self._refused = False, None
        self._claims_seen = scheduler.reuse.dropped_claims
        restoring = 0
        for seq in scheduler.waiting.ordered(scheduler.stats.steps):
            if len(scheduler.running) >= scheduler.config.max_num_seqs or plan.tokens_left <= 0:
                self.look_again = True
                return
            outcome = self._admit(seq, plan)
            if outcome is Outcome.FULL:
                self.look_again |= self._refused is None  # somebody before it may be able to start in the next step
                return
            if outcome is Outcome.AWAITS:
                scheduler.stats.deferred += 1
            restoring += outcome is Outcome.RESTORES
            if restoring >= _FORESEEN:
                return  # until something has landed
            self.look_again |= outcome is Outcome.LATER

    def _unpin(self, lacking: int, spared: tuple[int, ...]) -> int:
        """Pinned blocks for a sequence that will share the `spared` ones: none while others may come."""
        scheduler = self._scheduler
        restored = scheduler.tiers is not None and any(scheduler.tiers.restores.tables)
        if scheduler.running or scheduler.pool.num_pending or restored:
            return 0
        return scheduler.pool.surrender(lacking, spared)

    def about_to_start(self) -> Iterator[Sequence]:
        """Waiting sequences that will compute their next tokens themselves, in the policy's order."""
        scheduler, foreseen = self._scheduler, 0
        for seq in scheduler.waiting.last_order(scheduler.stats.steps):
            if not seq.media_ahead or scheduler.reuse.awaits(seq) or scheduler.reuse.find_source(seq):
                continue
            if scheduler.tiers is not None and scheduler.tiers.foresees(seq):
                foreseen += 1
                if foreseen >= _FORESEEN:
                    return
                continue
            yield seq

    def _admit(self, seq: Sequence, plan: StepPlan) -> Outcome:
        """Start a waiting sequence if it can run."""
        scheduler = self._scheduler
        if scheduler.reuse.awaits(seq):
            return Outcome.AWAITS
        if scheduler.tiers is not None and scheduler.tiers.awaits(seq):
            return Outcome.RESTORES
        if scheduler.media.must_wait(seq, plan):
            return Outcome.LATER
        shared, source = scheduler.reuse.found(seq), scheduler.reuse.find_source(seq)
        hits, new_source = len(shared), 0 if source else scheduler.sources.blocks_of(seq.request)
        cached = scheduler.pool.num_cached(chain(shared, source))
        total = scheduler.pool.blocks_for(seq.num_tokens) - hits + new_source
        wants = scheduler.outlook.wants(seq)
        if scheduler.running and plan.lacks_room(scheduler.pool.num_available, cached, *wants, total):
            self._refused = (cached, *wants, total)
            return Outcome.FULL
        if scheduler.tiers is not None:
            outcome = scheduler.tiers.restore(seq, shared, source)
            if outcome is not None and not (outcome is Outcome.FULL and not scheduler.running):
                return outcome
        room = scheduler.pool.num_available - cached
        alike = scheduler.reuse.partly_found(seq, hits) if room > total else None  # one is held for the copy
        start = seq.num_computed_tokens = hits * scheduler.pool.block_size + (alike[1] if alike else 0)
        length = scheduler.media.fit(seq, min(seq.num_tokens - start, plan.tokens_left), plan)
        now = scheduler.pool.blocks_for(start + length) - hits + new_source
        fits = length > 0 and (not new_source or scheduler.sources.fit(seq, plan))
        if fits and room < now:
            room += self._unpin(now - room, (*shared, *source))
        if not fits or room < now:
            seq.num_computed_tokens = 0
            return Outcome.FULL if fits else Outcome.LATER
        if alike is not None:
            scheduler.pool.share(alike[:1])  # until the step has copied it
        scheduler.start(seq, shared, source, now)
        if alike is not None:
            plan.copies.append(BlockCopy(alike[0], seq.tables["self"][hits], alike[1]))
            scheduler.stats.copied_tokens += alike[1]
        if new_source:
            scheduler.sources.start(seq, plan)
        scheduler.media.skip_cached(seq)
        scheduler.reuse.claim(seq)
        scheduler.put(seq, length, plan)
        plan.prompts += total - now
        plan.future.add(*wants, total)
        if seq.num_computed_tokens < seq.media_end:
            plan.ahead.append(seq)
        return Outcome.STARTED
