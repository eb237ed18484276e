"""The scheduler: each step gives every running sequence some of its missing tokens.

There are no phases. A sequence lacks `num_tokens - num_computed_tokens` tokens: one while it
decodes, many while its prompt is new. Budgets of tokens and of encoder cost bound a step; prefill
chunks, decodes and encoder work share it. Pure Python: no torch, no clock, no randomness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mm_core.cache.blocks import BlockPool
from mm_core.cache.encoder import EncoderCache
from mm_core.cache.prefix import PrefixCache
from mm_core.errors import EngineError, MMError
from mm_core.hashing import Hasher
from mm_core.scheduler.policy import Candidate, WaitingPolicy, longest_prefix_first
from mm_core.scheduler.sequence import (
    EncodeItem,
    SampledToken,
    ScheduledBatch,
    ScheduledSequence,
    SchedulerStats,
    Sequence,
    Status,
    StepResult,
    TokenEvent,
)
from mm_core.types import FinishReason, MediaFeature, PlaceholderRange


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of a step and of a sequence. encoder_budget is in the encoder's cost units."""

    max_num_seqs: int
    max_num_batched_tokens: int
    encoder_budget: int
    max_model_len: int
    enable_block_reuse: bool = True


class _Step:
    """What one call of `schedule` has put together so far."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.tokens_left = config.max_num_batched_tokens
        self.encoder_left = config.encoder_budget
        self.sequences: list[ScheduledSequence] = []
        self.encode: list[EncodeItem] = []


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
        self.prefix = PrefixCache(pool)
        self.encoder_cache = encoder_cache
        self.stats = SchedulerStats()
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._hasher = hasher
        self._encoder_cost = encoder_cost
        self._policy = policy
        self._computing: dict[bytes, Sequence] = {}  # block key → the sequence about to compute it

    # -- requests in and out ---------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether any sequence is not finished."""
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence."""
        seq.waiting_since = self.stats.steps
        self.waiting.append(seq)
        self.stats.prompt_tokens += seq.prompt_len

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """End a sequence now, whatever its state, and free all it holds. Idempotent."""
        if seq.status is Status.FINISHED:
            return
        (self.running if seq.status is Status.RUNNING else self.waiting).remove(seq)
        self._release(seq)
        seq.status = Status.FINISHED
        self.stats.finished[reason.value] = self.stats.finished.get(reason.value, 0) + 1

    def _release(self, seq: Sequence) -> None:
        """Give back blocks, media and claims on blocks being computed."""
        for name, table in seq.tables.items():
            self.pool.free(table)
            seq.tables[name] = []
        for key in seq.held_media:
            self.encoder_cache.release(key, seq.seq_id)
        seq.held_media.clear()
        for content in seq.contents:
            self._drop_claim(content.key, seq)

    def _drop_claim(self, key: bytes, seq: Sequence) -> None:
        """The sequence does not compute this block any more, or is done with it."""
        if self._computing.get(key) is seq:
            del self._computing[key]

    # -- a step ----------------------------------------------------------------------------

    def schedule(self) -> ScheduledBatch | None:
        """The next step's work, or None if nothing can run."""
        step = _Step(self.config)
        preemptions = self.stats.preemptions
        self._schedule_running(step)
        if self.stats.preemptions == preemptions:  # or the preempted would take its blocks right back
            self._admit_waiting(step)
        self.stats.steps += 1
        evicted = tuple(self.encoder_cache.take_evicted())
        if not step.sequences:
            if evicted:
                return ScheduledBatch(self.stats.steps, (), (), evicted)
            return None
        self.pool.begin_step(self.stats.steps)
        return ScheduledBatch(self.stats.steps, tuple(step.sequences), tuple(step.encode), evicted)

    def _schedule_running(self, step: _Step) -> None:
        decodes_left = sum(1 for seq in self.running if seq.num_tokens - seq.num_computed_tokens == 1)
        for seq in list(self.running):
            if seq.status is not Status.RUNNING:  # preempted for one before it
                continue
            missing = seq.num_tokens - seq.num_computed_tokens
            if missing == 1:
                decodes_left -= 1
            # A long prompt leaves room for every decode behind it: their next token is late otherwise.
            length = min(missing, step.tokens_left - decodes_left)
            length = self._fit_encoder(seq, length, step)
            if length > 0 and self._grow(seq, seq.num_computed_tokens + length):
                self._put(seq, length, step)

    def _grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Blocks for the first `num_tokens` tokens, preempting from the back; False if `seq` itself went."""
        table = seq.tables["self"]
        needed = self.pool.blocks_for(num_tokens) - len(table)
        while needed > 0:
            blocks = self.pool.allocate(needed)
            if blocks is not None:
                table.extend(blocks)
                break
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Send a sequence back to wait; its tokens stay, their KV is computed again (or found)."""
        self.running.remove(seq)
        self._release(seq)
        seq.status = Status.WAITING
        seq.num_computed_tokens = 0
        seq.num_published_blocks = 0
        seq.seen_version = -1
        seq.waiting_since = self.stats.steps
        self.stats.preemptions += 1
        self.waiting.insert(0, seq)

    def _put(self, seq: Sequence, length: int, step: _Step) -> None:
        start = seq.num_computed_tokens
        samples = start + length == seq.num_tokens
        self._take_media(seq, start, length, step)
        step.sequences.append(ScheduledSequence(seq, start, length, samples, seq.tables))
        step.tokens_left -= length
        seq.num_computed_tokens += length
        self.stats.computed_tokens += length
        self.stats.partial_prefills += not samples

    # -- media -----------------------------------------------------------------------------

    def _needed(self, seq: Sequence, start: int, length: int) -> Iterable[PlaceholderRange]:
        return (r for r in seq.ranges if r.offset < start + length and r.end > start)

    def _fit_encoder(self, seq: Sequence, length: int, step: _Step) -> int:
        """The part of a chunk whose media are there or can be encoded in this step."""
        start = seq.num_computed_tokens
        left, planned, rows = step.encoder_left, bool(step.encode), 0
        keys: set[bytes] = set()
        for r in self._needed(seq, start, length):
            if r.feature.key in keys:
                continue
            keys.add(r.feature.key)
            present = r.feature.key in self.encoder_cache
            cost = 0 if present else self._encoder_cost(r.feature)
            rows += 0 if present else r.feature.num_tokens
            over_budget = planned and cost > left  # an item over the whole budget runs alone
            if over_budget or not self.encoder_cache.has_room(rows, keys):
                return max(r.offset - start, 0)
            left -= cost
            planned = planned or not present
        return length

    def _take_media(self, seq: Sequence, start: int, length: int, step: _Step) -> None:
        """Hold the chunk's media, scheduling those that are missing (`_fit_encoder` made sure)."""
        needed = {r.feature.key: r.feature for r in self._needed(seq, start, length)}
        for key in needed.keys() - seq.held_media:
            if key in self.encoder_cache:  # before making room for others, which could evict it
                self.encoder_cache.acquire(key, seq.seq_id)
                seq.held_media.add(key)
        for key, feature in needed.items():
            if key in seq.held_media:
                continue
            cost, rows = self._encoder_cost(feature), feature.num_tokens
            if not self.encoder_cache.allocate(key, rows, cost, seq.seq_id):
                raise EngineError("encoder cache room vanished within a step")
            seq.held_media.add(key)
            step.encode.append(EncodeItem(key, feature))
            step.encoder_left -= cost
            seq.encoded_rows += rows
            self.stats.encoded_items += 1
            self.stats.encoded_rows += rows

    # -- admission -------------------------------------------------------------------------

    def _admit_waiting(self, step: _Step) -> None:
        if not self.waiting or len(self.running) >= self.config.max_num_seqs or step.tokens_left <= 0:
            return
        # A window bounds the work on very long queues; ageing cannot starve what enters it in order.
        window = self.waiting[: 4 * self.config.max_num_seqs]
        candidates = [
            Candidate(s.seq_id, self._look_up(s) * self.pool.block_size, self.stats.steps - s.waiting_since)
            for s in window
        ]
        for index in self._policy(candidates):
            if len(self.running) >= self.config.max_num_seqs or step.tokens_left <= 0:
                return
            if not self._admit(window[index], step):
                return

    def _usable_blocks(self, seq: Sequence) -> int:
        """Full blocks that may be reused: the last token is always computed, it gives the logits."""
        return (seq.num_tokens - 1) // self.pool.block_size

    def _look_up(self, seq: Sequence) -> int:
        """How many leading blocks are published, remembered until something new is published."""
        if not self.config.enable_block_reuse:
            return 0
        stamp = self.prefix.version + self.pool.evictions
        if seq.seen_version != stamp:
            contents = seq.fill_contents(self._usable_blocks(seq), self.pool.block_size, self._hasher)
            seq.seen_hits = len(self.prefix.lookup(contents))
            seq.seen_version = stamp
        return seq.seen_hits

    def _admit(self, seq: Sequence, step: _Step) -> bool:
        """Start a waiting sequence if it can run. False stops admission: the pool is full."""
        hits = self._look_up(seq)
        usable = self._usable_blocks(seq)
        if self.config.enable_block_reuse and hits < usable:
            owner = self._computing.get(seq.contents[hits].key)
            if owner is not None and owner is not seq:
                self.stats.deferred += 1  # another computes this very block: wait for it, then share
                return True
        shared = self.prefix.lookup(seq.contents[:hits]) if hits else []
        self.pool.share(shared)
        seq.num_computed_tokens = len(shared) * self.pool.block_size
        length = min(seq.num_tokens - seq.num_computed_tokens, step.tokens_left)
        length = self._fit_encoder(seq, length, step)
        total = self.pool.blocks_for(seq.num_tokens) - len(shared)
        now = self.pool.blocks_for(seq.num_computed_tokens + length) - len(shared)
        fits = self.pool.num_available >= (total + self._promised_blocks() if self.running else now)
        if length <= 0 or not fits:
            self.pool.free(shared)
            seq.num_computed_tokens = 0
            return length <= 0
        self._start(seq, shared, now)
        self._put(seq, length, step)
        return True

    def _promised_blocks(self) -> int:
        """Blocks that running sequences still want for their prompts, and one more each: who is admitted
        without regard to them is admitted only to preempt or be preempted."""
        return sum(max(self.pool.blocks_for(s.num_tokens) - len(s.tables["self"]), 0) + 1 for s in self.running)

    def _start(self, seq: Sequence, shared: list[int], new_blocks: int) -> None:
        seq.tables = {"self": [*shared, *(self.pool.allocate(new_blocks) or [])]}
        seq.num_published_blocks = len(shared)
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens = seq.num_computed_tokens
            self.stats.cached_tokens += seq.num_computed_tokens
        self.waiting.remove(seq)
        self.running.append(seq)
        seq.status = Status.RUNNING
        if self.config.enable_block_reuse:
            for content in seq.contents[len(shared) : self._usable_blocks(seq)]:
                self._computing.setdefault(content.key, seq)

    # -- results ---------------------------------------------------------------------------

    def update(self, batch: ScheduledBatch, result: StepResult) -> list[TokenEvent]:
        """Take in a step's results: publish blocks, append tokens, end what is finished."""
        events: list[TokenEvent] = []
        for key in result.failed_media:
            if key in self.encoder_cache:
                self.encoder_cache.discard(key)
            for seq in self.running:  # who else held it has it encoded anew
                seq.held_media.discard(key)
        for scheduled in batch.sequences:
            seq = scheduled.seq
            if seq.status is not Status.RUNNING:  # aborted while the step ran
                continue
            error = result.failed.get(seq.seq_id)
            if error is not None:
                events.append(self._fail(seq, error))
                continue
            self._release_passed_media(seq)
            if not scheduled.samples:
                self._publish(seq, scheduled.start + scheduled.length)
            else:
                events.append(self._append(seq, result.sampled[seq.seq_id]))
        if batch.sequences:
            self.pool.complete_step(batch.step)
        return events

    def _fail(self, seq: Sequence, error: MMError) -> TokenEvent:
        self.finish(seq, FinishReason.ERROR)
        return TokenEvent(seq, None, finish_reason=FinishReason.ERROR, error=error)

    def _append(self, seq: Sequence, sampled: SampledToken) -> TokenEvent:
        if not sampled.finite:
            return self._fail(
                seq, EngineError("The model gave NaN logits for this request. Check its weights and dtype.")
            )
        computed = seq.num_tokens
        seq.token_ids.append(sampled.token_id)
        self.stats.generated_tokens += 1
        self._publish(seq, computed)
        reason, stop = self._finish_reason(seq, sampled.token_id)
        if reason is not None:
            self.finish(seq, reason)
        return TokenEvent(seq, sampled.token_id, sampled.logprobs, reason, stop)

    def _finish_reason(self, seq: Sequence, token: int) -> tuple[FinishReason | None, int | None]:
        params = seq.params
        if seq.num_output_tokens >= params.min_tokens:
            if token in params.stop_token_ids:
                return FinishReason.STOP, token
            if token in seq.request.stop_token_ids and not params.ignore_eos:
                return FinishReason.STOP, None
        full = params.max_tokens is not None and seq.num_output_tokens >= params.max_tokens
        if full or seq.num_tokens >= self.config.max_model_len:
            return FinishReason.LENGTH, None
        return None, None

    def _publish(self, seq: Sequence, num_tokens: int) -> None:
        """Blocks filled by the first `num_tokens` tokens become findable: their ids are final now."""
        if not self.config.enable_block_reuse:
            return
        full = num_tokens // self.pool.block_size
        if full <= seq.num_published_blocks:
            return
        contents = seq.fill_contents(full, self.pool.block_size, self._hasher)
        for index in range(seq.num_published_blocks, full):
            self.prefix.publish(seq.tables["self"][index], contents[index])
            self._drop_claim(contents[index].key, seq)
        seq.num_published_blocks = full

    def _release_passed_media(self, seq: Sequence) -> None:
        if not seq.held_media:
            return
        # Only what a chunk broke off in is kept: holding more for later could block a cache for good.
        done = seq.num_computed_tokens
        partly = {r.feature.key for r in seq.ranges if r.offset < done < r.end}
        for key in seq.held_media - partly:
            seq.held_media.discard(key)
            self.encoder_cache.release(key, seq.seq_id)

    # -- checks ----------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise RuntimeError where the books do not balance; called by tests after every step."""
        live = [*self.waiting, *self.running]
        self.pool.check_integrity(table for s in live for table in s.tables.values())
        self.encoder_cache.check_integrity({s.seq_id for s in live})
        if any(owner.status is not Status.RUNNING for owner in self._computing.values()):
            raise RuntimeError("a block is awaited from a sequence that does not run")
        for seq in self.running:
            if seq.num_computed_tokens > len(seq.tables["self"]) * self.pool.block_size:
                raise RuntimeError(f"sequence {seq.seq_id} has computed more tokens than it has slots")
