"""The scheduler: each step gives every running sequence some of its missing tokens.

There are no phases. A sequence lacks `num_tokens - num_computed_tokens` tokens: one while it
decodes, many while its prompt is new. Budgets of tokens and of encoder cost bound a step; prefill
chunks, decodes and encoder work share it. Pure Python: no torch, no clock, no randomness.

`schedule` may be called again before the step it gave has been taken in by `update`. Places of
tokens are known before their ids are, so a sequence goes on behind a token in flight; what turns
out to be superfluous (it had ended, or was preempted meanwhile) is dropped by `update`. Steps are
taken in in the order they were scheduled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

from mm_core.cache.blocks import BlockPool
from mm_core.cache.encoder import EncoderCache
from mm_core.errors import EngineError, MMError
from mm_core.hashing import Hasher
from mm_core.scheduler.media import MediaPlanner
from mm_core.scheduler.outlook import Outlook
from mm_core.scheduler.plan import Outcome, StepPlan
from mm_core.scheduler.policy import WaitingPolicy, longest_prefix_first
from mm_core.scheduler.reuse import BlockReuse
from mm_core.scheduler.sequence import (
    SampledToken,
    ScheduledBatch,
    ScheduledSequence,
    SchedulerStats,
    Sequence,
    Status,
    StepResult,
    TokenEvent,
)
from mm_core.scheduler.sources import SourcePlanner
from mm_core.scheduler.waiting import WaitingQueue
from mm_core.types import FinishReason, MediaFeature


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of a step and of a sequence. encoder_budget is in the encoder's cost units. source_budget: rows of
    sources computed in a step; 0: as many as there are tokens, four times."""

    max_num_seqs: int
    max_num_batched_tokens: int
    encoder_budget: int
    max_model_len: int
    enable_block_reuse: bool = True
    source_budget: int = 0


class Scheduler:
    """Owns the sequences and decides each step; `update` closes the loop."""

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        encoder_cache: EncoderCache,
        hasher: Hasher,
        encoder_cost: Callable[[MediaFeature], int],
        policy: WaitingPolicy = longest_prefix_first,
    ) -> None:
        self.config = config
        self.pool = pool
        self.reuse = BlockReuse(pool, hasher, enabled=config.enable_block_reuse)
        self.prefix = self.reuse.prefix
        self.encoder_cache = encoder_cache
        self.stats = SchedulerStats()
        self.media = MediaPlanner(encoder_cache, encoder_cost, self.stats, pool.block_size)
        self.sources = SourcePlanner(pool, self.reuse, self.media, self.stats)
        self.waiting = WaitingQueue(policy, 4 * config.max_num_seqs, self.reuse.cached_tokens)
        self.running: list[Sequence] = []
        self.outlook = Outlook(pool.block_size)
        self._source_budget = config.source_budget or 4 * config.max_num_batched_tokens
        self._slots = list(reversed(range(config.max_num_seqs)))
        # Admission that found nothing to start is not tried again until something has changed for it.
        self._look_again = True
        self._refused: tuple[int, int, int, int] | None = None  # what the first that found no room wants
        self._claims_seen = 0

    # -- requests in and out ---------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether any sequence is not finished."""
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence whose request passed `sources.check`."""
        seq.waiting_since = self.stats.steps
        seq.max_length = min(seq.max_length, self.config.max_model_len, self.sources.max_length(seq.request))
        self.waiting.append(seq)
        self.stats.prompt_tokens += seq.prompt_len
        self._look_again = True

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """End a sequence now, whatever its state, and free all it holds. Idempotent."""
        if seq.status is Status.FINISHED:
            return
        (self.running if seq.status is Status.RUNNING else self.waiting).remove(seq)
        self._release(seq)
        seq.status = Status.FINISHED
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.outlook.learn(seq)
        self.stats.finished[reason.value] = self.stats.finished.get(reason.value, 0) + 1

    def _release(self, seq: Sequence) -> None:
        """Give back blocks, media, the slot and claims on blocks being computed."""
        for name, table in seq.tables.items():
            self.pool.free(table)
            seq.tables[name] = []
        self.media.release_all(seq)
        self.reuse.drop_claims(seq)
        seq.source_step = 0
        if seq.slot >= 0:
            self._slots.append(seq.slot)
            seq.slot = -1
        seq.num_in_flight = 0
        self._look_again = True

    # -- a step ----------------------------------------------------------------------------

    def schedule(self) -> ScheduledBatch | None:
        """The next step's work, or None if nothing can run."""
        config = self.config
        plan = StepPlan(self.stats.steps + 1, config.max_num_batched_tokens, config.encoder_budget, self._source_budget)
        preemptions = self.stats.preemptions
        self._schedule_running(plan)
        if self.stats.preemptions == preemptions:  # or the preempted would take its blocks right back
            self._admit_waiting(plan)
        if plan.ahead or self.waiting.num_with_media:
            self.media.encode_ahead(chain(plan.ahead, self._about_to_start()), plan)
        self.stats.steps += 1
        self.stats.computed_tokens += config.max_num_batched_tokens - plan.tokens_left
        sequences, evicted = plan.sequences, tuple(self.encoder_cache.take_evicted())
        if not (sequences or plan.encode or evicted):
            return None
        self.pool.begin_step(plan.step)
        self.encoder_cache.begin_step(plan.step)
        return ScheduledBatch(plan.step, sequences, tuple(plan.encode), evicted, tuple(plan.sources))

    def _schedule_running(self, plan: StepPlan) -> None:
        put = plan.singles.append
        behind: int | None = None  # decodes behind the current sequence, counted where a chunk comes
        for place, seq in enumerate(self.running):  # preemption takes from the end
            start = seq.num_computed_tokens
            missing = len(seq.token_ids) + seq.num_in_flight - start
            if missing == 1:
                if behind is not None:
                    behind -= 1
                if seq.num_in_flight and start + 1 >= seq.max_length:
                    continue  # it ends with the token in flight
                if seq.media_end <= start < seq.num_slots and plan.tokens_left > 0:
                    put(ScheduledSequence(seq, start, 1, True, seq.tables, seq.epoch))
                    plan.tokens_left -= 1
                    seq.num_computed_tokens = start + 1
                    seq.num_in_flight += 1
                    continue
            elif behind is None:
                behind = sum(1 for s in self.running[place + 1 :] if s.num_tokens - s.num_computed_tokens == 1)
            # A long prompt leaves room for every decode behind it: their next token is late otherwise.
            reserved = behind or 0 if missing > 1 else 0
            self._schedule_chunk(seq, min(missing, plan.tokens_left - reserved), plan)

    def _schedule_chunk(self, seq: Sequence, length: int, plan: StepPlan) -> None:
        """As many of the next `length` tokens as media and blocks allow."""
        wanted = self.pool.blocks_for(seq.num_tokens)
        length = self.media.fit(seq, length, plan)
        if length > 0 and self._grow(seq, seq.num_computed_tokens + length):
            self._put(seq, length, plan)
        if seq.status is Status.RUNNING:
            plan.prompts += max(wanted - len(seq.tables["self"]), 0)
            if seq.num_computed_tokens < seq.media_end:
                plan.ahead.append(seq)

    def _grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Blocks for the first `num_tokens` tokens, preempting from the back.

        False: `seq` itself went, or has to wait for blocks that the steps in flight give back.
        """
        table = seq.tables["self"]
        needed = self.pool.blocks_for(num_tokens) - len(table)
        while needed > 0:
            blocks = self.pool.allocate(needed)
            if blocks is not None:
                table.extend(blocks)
                seq.num_slots = len(table) * self.pool.block_size
                break
            victim = self.running[-1]
            if needed <= self.pool.num_available + self.pool.num_pending or victim.ends_in_flight:
                return False
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Send a sequence back to wait; its known tokens stay, their KV is computed again (or found)."""
        self.running.remove(seq)
        self._release(seq)
        seq.status = Status.WAITING
        seq.epoch += 1
        seq.num_computed_tokens = seq.num_completed_tokens = 0
        seq.num_published_blocks = 0
        seq.seen_version = (-1, -1)
        seq.waiting_since = self.stats.steps
        self.stats.preemptions += 1
        self.waiting.put_back(seq)

    def _put(self, seq: Sequence, length: int, plan: StepPlan) -> None:
        start = seq.num_computed_tokens
        samples = start + length == seq.num_tokens
        self.media.take(seq, start, length, plan)
        part = plan.singles if length == 1 else plan.chunks
        part.append(ScheduledSequence(seq, start, length, samples, seq.tables, seq.epoch))
        plan.tokens_left -= length
        seq.num_computed_tokens += length
        seq.num_in_flight += samples
        self.stats.partial_prefills += not samples

    # -- admission -------------------------------------------------------------------------

    def _admit_waiting(self, plan: StepPlan) -> None:
        if not self.waiting or len(self.running) >= self.config.max_num_seqs or plan.tokens_left <= 0:
            return
        same = not self._look_again and self._claims_seen == self.reuse.dropped_claims
        refused = self._refused if same else None
        if same and refused is None:
            return
        plan.future = self.outlook.future(self.running)
        if refused is not None and plan.lacks_room(self.pool.num_available, *refused):
            return
        self._look_again, self._refused = False, None
        self._claims_seen = self.reuse.dropped_claims
        for seq in self.waiting.ordered(self.stats.steps):
            if len(self.running) >= self.config.max_num_seqs or plan.tokens_left <= 0:
                self._look_again = True
                return
            outcome = self._admit(seq, plan)
            if outcome is Outcome.FULL:
                self._look_again |= self._refused is None  # somebody before it may be able to start in the next step
                return
            if outcome is Outcome.AWAITS:
                self.stats.deferred += 1
            self._look_again |= outcome is Outcome.LATER

    def _about_to_start(self) -> Iterator[Sequence]:
        """Waiting sequences that will compute their next tokens themselves, in the policy's order."""
        return (
            s
            for s in self.waiting.last_order(self.stats.steps)
            if s.media_ahead and not self.reuse.awaits(s) and not self.reuse.find_source(s)
        )

    def _admit(self, seq: Sequence, plan: StepPlan) -> Outcome:
        """Start a waiting sequence if it can run."""
        if self.reuse.awaits(seq):
            return Outcome.AWAITS
        if self.media.must_wait(seq, plan):
            return Outcome.LATER
        shared, source = self.reuse.found(seq), self.reuse.find_source(seq)
        hits, new_source = len(shared), 0 if source else self.sources.blocks_of(seq.request)
        cached = self.pool.num_cached(chain(shared, source))
        total = self.pool.blocks_for(seq.num_tokens) - hits + new_source
        wants = self.outlook.wants(seq)
        if self.running and plan.lacks_room(self.pool.num_available, cached, *wants, total):
            self._refused = (cached, *wants, total)
            return Outcome.FULL
        start = seq.num_computed_tokens = hits * self.pool.block_size
        length = self.media.fit(seq, min(seq.num_tokens - start, plan.tokens_left), plan)
        now = self.pool.blocks_for(start + length) - hits + new_source
        fits = length > 0 and (not new_source or self.sources.fit(seq, plan))
        if not fits or self.pool.num_available - cached < now:
            seq.num_computed_tokens = 0
            return Outcome.FULL if fits else Outcome.LATER
        self._start(seq, shared, source, now)
        if new_source:
            self.sources.start(seq, plan)
        self.media.skip_cached(seq)
        self.reuse.claim(seq)
        self._put(seq, length, plan)
        plan.prompts += total - now
        plan.future.add(*wants, total)
        if seq.num_computed_tokens < seq.media_end:
            plan.ahead.append(seq)
        return Outcome.STARTED

    def _start(self, seq: Sequence, shared: list[int], source: list[int], new_blocks: int) -> None:
        self.pool.share(chain(shared, source))
        new = self.pool.allocate(new_blocks)
        if new is None:
            raise EngineError("KV blocks vanished within a step")
        seq.tables = {"self": [*shared, *new]}
        if seq.source is not None:
            count = 0 if source else self.sources.blocks_of(seq.request)
            seq.tables = {"self": [*shared, *new[count:]], "cross": [*source, *new[:count]]}
        seq.num_slots = len(seq.tables["self"]) * self.pool.block_size
        seq.num_published_blocks = len(shared)
        seq.num_completed_tokens = seq.num_computed_tokens
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens = seq.num_computed_tokens
            self.stats.cached_tokens += seq.num_computed_tokens
        self.waiting.remove(seq)
        self.running.append(seq)
        seq.status = Status.RUNNING
        seq.slot = self._slots.pop()

    # -- results ---------------------------------------------------------------------------

    def update(self, batch: ScheduledBatch, result: StepResult) -> list[TokenEvent]:
        """Take in a step's results: publish blocks, append tokens, end what is finished.

        Results for a sequence that ended or was preempted after the step was scheduled are dropped.
        """
        self.pool.complete_step(batch.step)
        self.encoder_cache.complete_step(batch.step)
        if batch.sources:
            self.sources.finish(batch, result)
        events: list[TokenEvent] = []
        failed, sampled = result.failed, result.sampled
        for seq, start, length, samples, _, epoch in batch.sequences:
            if seq.status is not Status.RUNNING or seq.epoch != epoch:
                continue
            if failed and seq.seq_id in failed:
                events.append(self._fail(seq, failed[seq.seq_id]))
                continue
            end = seq.num_completed_tokens = start + length
            if seq.held_media:
                self.media.release_passed(seq)
            if samples:
                events.append(self._append(seq, end, sampled[seq.seq_id]))
            else:
                self.reuse.publish(seq, end)
        for key in result.failed_media:
            for seq in self.media.discard_failed(key, chain(self.running, self.waiting)):
                self._preempt(seq)
                seq.media_ahead = False  # as of the others that held it
        return events

    def _fail(self, seq: Sequence, error: MMError) -> TokenEvent:
        self.finish(seq, FinishReason.ERROR)
        return TokenEvent(seq, None, finish_reason=FinishReason.ERROR, error=error)

    def _append(self, seq: Sequence, computed: int, sampled: SampledToken) -> TokenEvent:
        token, logprobs, finite = sampled
        if not finite:
            return self._fail(
                seq, EngineError("The model gave NaN logits for this request. Check its weights and dtype.")
            )
        seq.token_ids.append(token)
        seq.num_in_flight -= 1
        self.stats.generated_tokens += 1
        self.reuse.publish(seq, computed)
        if token in seq.end_ids or len(seq.token_ids) >= seq.max_length:
            reason, stop = self._finish_reason(seq, token)
            if reason is not None:
                self.finish(seq, reason)
                return TokenEvent(seq, token, logprobs, reason, stop)
        return TokenEvent(seq, token, logprobs)

    def _finish_reason(self, seq: Sequence, token: int) -> tuple[FinishReason | None, int | None]:
        params = seq.params
        if seq.num_output_tokens >= params.min_tokens:
            if token in params.stop_token_ids:
                return FinishReason.STOP, token
            if token in seq.request.stop_token_ids and not params.ignore_eos:
                return FinishReason.STOP, None
        return (FinishReason.LENGTH if len(seq.token_ids) >= seq.max_length else None), None

    # -- checks ----------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise RuntimeError where the books do not balance; called by tests after every step."""
        live = [*self.waiting, *self.running]
        self.pool.check_integrity(table for s in live for table in s.tables.values())
        self.encoder_cache.check_integrity({s.seq_id for s in live})
        if any(owner.status is not Status.RUNNING for owner in self.reuse.owners):
            raise RuntimeError("a block is awaited from a sequence that does not run")
        if sorted([*self._slots, *(s.slot for s in self.running)]) != list(range(self.config.max_num_seqs)):
            raise RuntimeError("a slot is lost, or has two sequences")
        for seq in self.running:
            if not seq.num_completed_tokens <= seq.num_computed_tokens <= seq.num_slots:
                raise RuntimeError(f"sequence {seq.seq_id} has computed more tokens than it has slots")
            if seq.num_published_blocks * self.pool.block_size > seq.num_completed_tokens:
                raise RuntimeError(f"sequence {seq.seq_id} has published what is not computed")
            if len(seq.tables.get("cross", ())) != self.sources.blocks_of(seq.request):
                raise RuntimeError(f"sequence {seq.seq_id} has no room for its source, or too much")
