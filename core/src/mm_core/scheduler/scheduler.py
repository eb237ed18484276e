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

from collections.abc import Callable, Iterable
from itertools import chain

from mm_core.cache.blocks import BlockPool
from mm_core.cache.encoder import EncoderCache
from mm_core.cache.host import HostTier
from mm_core.errors import EngineError, MMError
from mm_core.hashing import Hasher
from mm_core.scheduler.admission import Admission
from mm_core.scheduler.checks import check
from mm_core.scheduler.costs import CostModel
from mm_core.scheduler.media import MediaPlanner
from mm_core.scheduler.outlook import Outlook
from mm_core.scheduler.plan import SchedulerConfig, StepPlan
from mm_core.scheduler.policy import POLICIES, Candidate, SchedulingPolicy
from mm_core.scheduler.retention import retain_by
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
from mm_core.scheduler.tier_types import Disk, TierConfig
from mm_core.scheduler.tiers import TierPlanner
from mm_core.scheduler.transfers import NO_TRANSFERS, TransferDone, Transfers
from mm_core.scheduler.waiting import WaitingQueue
from mm_core.types import FinishReason, MediaFeature

__all__ = ["Scheduler", "SchedulerConfig"]


class Scheduler:
    """Owns the sequences and decides each step; `update` closes the loop."""

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        encoder_cache: EncoderCache,
        hasher: Hasher,
        encoder_cost: Callable[[MediaFeature], int],
        policy: SchedulingPolicy = POLICIES["reuse"],
    ) -> None:
        self.config = config
        self.policy = policy
        self.costs = CostModel()
        self.pool = pool
        self.reuse = BlockReuse(pool, hasher, enabled=config.enable_block_reuse, copy_tokens=config.copy_tokens)
        self.prefix = self.reuse.prefix
        self.encoder_cache = encoder_cache
        self.stats = SchedulerStats()
        self.media = MediaPlanner(encoder_cache, encoder_cost, self.stats, pool.block_size)
        self.sources = SourcePlanner(pool, self.reuse, self.media, self.stats)
        self.waiting = WaitingQueue(policy.order, 4 * config.max_num_seqs, self._measure)
        self.running: list[Sequence] = []
        self.begun: list[Sequence] = []  # first scheduled in the last step
        self.outlook = Outlook(pool.block_size)
        retain_by(policy, lambda: self.costs, pool, encoder_cache)
        self._encoder_cost = encoder_cost
        self._source_budget = config.source_budget or 4 * config.max_num_batched_tokens
        self.slots = list(reversed(range(config.max_num_seqs)))  # free rows of the runner's tables
        self.tiers: TierPlanner | None = None
        self.admission = Admission(self)

    def _measure(self, sequences: list[Sequence], step: int) -> list[Candidate]:
        candidates = self.reuse.measure(sequences, step)
        return candidates if self.tiers is None else self.tiers.measure(sequences, step, candidates)

    # -- requests in and out ---------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether any sequence is not finished."""
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence whose request passed `sources.check`."""
        seq.waiting_since = self.stats.steps
        seq.max_length = min(seq.max_length, self.config.max_model_len, self.sources.max_length(seq.request))
        seq.media_costs = {r.feature.key: self._encoder_cost(r.feature) for r in seq.media}
        self.waiting.append(seq)
        self.stats.prompt_tokens += seq.prompt_len
        self.admission.look_again = True

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
        if self.tiers is not None:
            self.tiers.gone(seq)
        seq.source_step = 0
        if seq.slot >= 0:
            self.slots.append(seq.slot)
            seq.slot = -1
        seq.num_in_flight = 0
        self.admission.look_again = True

    # -- a step ----------------------------------------------------------------------------

    def schedule(self) -> ScheduledBatch | None:
        """The next step's work, or None if nothing can run."""
        config = self.config
        plan = StepPlan(self.stats.steps + 1, config.max_num_batched_tokens, config.encoder_budget, self._source_budget)
        preemptions = self.stats.preemptions
        if self.begun:
            self.begun = []
        self._schedule_running(plan)
        if self.stats.preemptions == preemptions:  # or the preempted would take its blocks right back
            self.admission.admit_waiting(plan)
        if plan.ahead or self.waiting.num_with_media:
            self.media.encode_ahead(chain(plan.ahead, self.admission.about_to_start()), plan)
        self.stats.steps += 1
        self.stats.computed_tokens += config.max_num_batched_tokens - plan.tokens_left
        sequences, evicted = plan.sequences, tuple(self.encoder_cache.take_evicted())
        transfers = self._transfers(plan)
        if not (sequences or plan.encode or evicted or transfers):
            return None
        self.pool.begin_step(plan.step)
        self.encoder_cache.begin_step(plan.step)
        self.pool.free([copy.source for copy in plan.copies])  # pending, until the step has read them
        return ScheduledBatch(plan.step, sequences, tuple(plan.encode), evicted, tuple(plan.sources), transfers)

    def _transfers(self, plan: StepPlan) -> Transfers:
        if self.tiers is not None:
            return self.tiers.take_orders(plan.copies)
        return Transfers(copies=tuple(plan.copies)) if plan.copies else NO_TRANSFERS

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
            self.put(seq, length, plan)
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
            coming = self.pool.num_available + self.pool.num_pending
            if needed <= coming:
                return False
            if self.tiers is not None:
                if self.tiers.give_up():
                    continue
                if needed <= coming + self.tiers.restores.filling:  # they can be given up when they are filled
                    return False
            victim = self.running[-1]
            if victim.ends_in_flight:
                return False
            if len(self.running) == 1 and self.pool.surrender(needed - coming):
                continue  # it would be preempted for ever: what is pinned is not worth a request
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

    def put(self, seq: Sequence, length: int, plan: StepPlan) -> None:
        """Compute the next `length` tokens in this step."""
        start = seq.num_computed_tokens
        samples = start + length == seq.num_tokens
        self.media.take(seq, start, length, plan)
        part = plan.singles if length == 1 else plan.chunks
        part.append(ScheduledSequence(seq, start, length, samples, seq.tables, seq.epoch))
        plan.tokens_left -= length
        seq.num_computed_tokens += length
        seq.num_in_flight += samples
        self.stats.partial_prefills += not samples

    def start(self, seq: Sequence, shared: list[int], source: list[int], new_blocks: int) -> None:
        """Have a waiting sequence run, with the blocks it shares and new ones."""
        self.pool.share(shared, hit=self.prefix.branches(shared))
        self.pool.share(source, hit=True)
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
        if self.tiers is not None:
            self.tiers.started(seq, seq.num_cached_tokens is None)
        if seq.num_cached_tokens is None:
            self.begun.append(seq)
            seq.num_cached_tokens = seq.num_computed_tokens
            self.stats.queried_tokens += seq.prompt_len
            self.stats.cached_tokens += seq.num_computed_tokens
        self.waiting.remove(seq)
        self.running.append(seq)
        seq.status = Status.RUNNING
        seq.slot = self.slots.pop()

    # -- results ---------------------------------------------------------------------------

    def update(self, batch: ScheduledBatch, result: StepResult) -> list[TokenEvent]:
        """Take in a step's results: publish blocks, append tokens, end what is finished.

        Results for a sequence that ended or was preempted after the step was scheduled are dropped.
        """
        if self.tiers is not None:
            self.tiers.complete_step(batch.step, result.damaged_rows)
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
        if seq.grammar is not None:
            seq.grammar.accept(seq.num_output_tokens - 1, token)
            if seq.grammar.error is not None:
                return self._fail(seq, seq.grammar.error)
            if seq.grammar.ended and token not in seq.end_ids:
                self.finish(seq, FinishReason.STOP)
                return TokenEvent(seq, token, logprobs, FinishReason.STOP)
        if token in seq.end_ids or len(seq.token_ids) >= seq.max_length:
            reason, stop = self._finish_reason(seq, token)
            if reason is not None:
                self.finish(seq, reason)
                return TokenEvent(seq, token, logprobs, reason, stop)
        return TokenEvent(seq, token, logprobs)

    def _finish_reason(self, seq: Sequence, token: int) -> tuple[FinishReason | None, int | None]:
        params = seq.params
        guided = seq.grammar is not None  # by masks that know of min_tokens
        if guided or seq.num_output_tokens >= params.min_tokens:
            if token in params.stop_token_ids:
                return FinishReason.STOP, token
            if token in seq.request.stop_token_ids and (guided or not params.ignore_eos):
                return FinishReason.STOP, None
        return (FinishReason.LENGTH if len(seq.token_ids) >= seq.max_length else None), None

    # -- tiers behind the device -----------------------------------------------------------

    def add_tiers(self, host: HostTier, config: TierConfig, disk: Disk | None = None) -> None:
        """Keep what leaves the device, from now on."""
        self.tiers = self.media.tiers = TierPlanner(self, host, config, disk)

    def take_transfers(self, done: Iterable[TransferDone]) -> None:
        """Copies between the device and what is behind it have ended."""
        if self.tiers is not None and self.tiers.take(done):
            self.admission.look_again = True

    def give_up_restored(self) -> bool:
        """Let go of what was copied back for sequences that wait: nothing else can run. False if there is nothing."""
        self.admission.look_again = True
        return self.tiers is not None and self.tiers.give_up()

    def clear_cache(self) -> None:
        """Forget every block that nobody uses, and all that is stored behind the device."""
        if self.tiers is not None:
            self.tiers.clear()
        self.prefix.clear()
        self.admission.look_again = True

    # -- checks ----------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise RuntimeError where the books do not balance; called by tests after every step."""
        check(self)
