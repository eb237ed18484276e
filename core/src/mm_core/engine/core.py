"""EngineCore: scheduler and runner behind messages."""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from mm_core.config import SamplingParams
from mm_core.engine.grammars import GrammarDesk
from mm_core.engine.lifecycle import CacheKeeper
from mm_core.engine.messages import (
    Abort,
    CacheNews,
    CacheQuery,
    CacheReply,
    ClearCache,
    Message,
    Notice,
    Submit,
    TokenOutput,
)
from mm_core.engine.precedence import Precedence
from mm_core.errors import EngineError, MMError
from mm_core.runner.memory import is_lost
from mm_core.runner.step import LaunchedStep
from mm_core.scheduler.scheduler import Scheduler
from mm_core.scheduler.sequence import ScheduledBatch, ScheduledSequence, Status, StepResult, TokenEvent
from mm_core.scheduler.sequence import Sequence as SequenceState
from mm_core.scheduler.transfers import Transfers
from mm_core.tracing import SpanRecorder
from mm_core.types import FinishReason, PreparedRequest

if TYPE_CHECKING:
    from mm_core.runner.runner import ModelRunner

logger = logging.getLogger(__name__)


class EngineCore:
    """Turns messages into steps and steps into outputs. Single-threaded by design.

    overlap: a step is scheduled and launched before the one before it is taken in, so that the device
    never waits for Python. Answers that end are then noticed one step late, and what was computed
    behind their end is dropped. clock: seconds, for what steps cost.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        seed: int,
        overlap: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self._stay = 1 if overlap else 0  # steps left in flight behind a launch
        self._in_flight: deque[tuple[ScheduledBatch, LaunchedStep, float]] = deque()  # and when it was launched
        self._clock = clock
        self._last_end = 0.0
        self.precedence = Precedence()
        self._random = random.Random(seed)
        self._next_id = 0
        self._requests: dict[str, list[SequenceState]] = {}
        self.recorder: SpanRecorder | None = None  # gets what this thread does in a step
        self.keeper = CacheKeeper(scheduler)
        self.grammars = GrammarDesk()
        self.notify: Callable[[Notice], None] = _to_nobody
        self.before_release: Callable[[], object] = _do_nothing

    def _span(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self.recorder is None else self.recorder.span("engine", name)

    def handle(self, message: Message) -> list[TokenOutput]:
        """Take one message; returns what it ended at once."""
        match message:
            case Submit(request):
                return self._submit(request)
            case Abort(request_id, index, stopped):
                return self._abort(request_id, index, FinishReason.STOP if stopped else FinishReason.ABORT)
            case ClearCache():
                self.scheduler.clear_cache()
                return []
            case CacheQuery():
                self._take_copies()
                self.tell_news()  # whoever begins to listen now is told of what there is
                try:
                    reply = self.keeper.answer(message)
                except BaseException:  # whoever waits for the answer gets one before the loop ends
                    self.notify(CacheReply(message.query_id, error=EngineError("The caches' books are wrong.")))
                    raise
                self.tell_news()
                self.notify(reply)
                return []

    def tell_news(self) -> None:
        """Tell listeners, if there are any, what came and went in the caches; called after messages and steps."""
        if self.keeper.doomed:
            self.keeper.sweep()
        if self.keeper.log.on and (events := self.keeper.log.take()):
            self.notify(CacheNews(events))

    def _submit(self, request: PreparedRequest) -> list[TokenOutput]:
        params: SamplingParams = request.params
        try:
            self.scheduler.sources.check(request)
            if not self.grammars.ready(request):
                return []
        except MMError as error:
            return [TokenOutput(request.request_id, 0, None, finish_reason=FinishReason.ERROR.value, error=error)]
        self.keeper.note(request)
        seed = params.seed if params.seed is not None else self._random.getrandbits(63)
        sequences = [SequenceState(self._take_id(), request, index, seed) for index in range(params.n)]
        self._requests[request.request_id] = sequences
        for seq, grammar in zip(sequences, self.grammars.matchers(request), strict=True):
            seq.grammar = grammar
            self.scheduler.add(seq)
        return []

    def _take_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def _abort(self, request_id: str, index: int | None, reason: FinishReason) -> list[TokenOutput]:
        ended = [s for s in self._requests.get(request_id, []) if index is None or s.index == index]
        outputs = self.grammars.abort(request_id, reason)
        for seq in ended:
            self.scheduler.finish(seq, reason)
            outputs += self._report([TokenEvent(seq, None, finish_reason=reason)])
        return outputs

    def _forget(self, seq: SequenceState) -> None:
        request_id = seq.request.request_id
        left = [s for s in self._requests.get(request_id, []) if s is not seq]
        if left:
            self._requests[request_id] = left
        else:
            self._requests.pop(request_id, None)

    @property
    def request_ids(self) -> list[str]:
        """Requests that have not ended."""
        return [*self._requests, *self.grammars.held]

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._in_flight) or self.scheduler.has_work

    def step(self) -> list[TokenOutput]:
        """Launch a step and take in what is due: with overlap the one before it, else itself."""
        scheduler = self.scheduler
        preemptions = scheduler.stats.preemptions
        self._take_copies()
        with self._span("schedule"):
            batch = scheduler.schedule()
        if scheduler.begun:
            self._stamp_begun()
        if batch is not None:
            return self._launch(batch)
        if self._in_flight:
            return self._take_in()
        if scheduler.stats.preemptions != preemptions:
            return []
        if scheduler.tiers is not None and scheduler.tiers.restores.filling:
            self._take_copies(wait=True)
            return []
        return [] if scheduler.give_up_restored() else self._stuck()

    def _stamp_begun(self) -> None:
        """When requests were first scheduled, for their metrics."""
        now = self._clock()
        for seq in self.scheduler.begun:
            seq.started = now
        self.scheduler.begun = []  # else their media would be held as long as nothing comes

    def drain(self) -> list[TokenOutput]:
        """Take in all that is in flight: steps, and copies behind the device."""
        outputs = self._take_in_all()
        while self.scheduler.tiers is not None and self.scheduler.tiers.in_flight:
            self._take_copies(wait=True)
        return outputs

    def _take_in_all(self) -> list[TokenOutput]:
        outputs: list[TokenOutput] = []
        while self._in_flight:
            outputs += self._take_in()
        return outputs

    def _take_copies(self, wait: bool = False) -> None:
        """Take in copies behind the device that have ended; wait: for one at least."""
        tiers = self.scheduler.tiers
        if tiers is None or not tiers.in_flight:
            return
        if wait:
            with self._span("wait for copies"), self.precedence.waiting():
                done = self.runner.transfers.poll(wait=True)
            if not done and not self.runner.transfers.pending:
                raise EngineError("Copies between the device and the host's memory were lost.")
        else:
            done = self.runner.transfers.poll()
        if done:
            self.scheduler.take_transfers(done)

    def _launch(self, batch: ScheduledBatch) -> list[TokenOutput]:
        begun = self._clock()
        try:
            with self._span("launch"):
                launched = self.runner.launch(batch)
        except BaseException as error:  # a plugin's sys.exit, too: nobody else would ever hear
            _raise_if_lost(error)
            logger.exception("step %d failed", batch.step)
            outputs = self._take_in_all()  # in order; some of the batch's sequences may end here
            return outputs + self._update(batch, self._retry(batch, error))
        self._in_flight.append((batch, launched, begun))
        outputs = []
        while len(self._in_flight) > (0 if launched.failed else self._stay):
            outputs += self._take_in()
        return outputs

    def _take_in(self) -> list[TokenOutput]:
        """Wait for the oldest step in flight; what it brought."""
        batch, launched, begun = self._in_flight.popleft()
        try:
            with self._span("wait"), self.precedence.waiting():
                result = launched.wait()
            begun, self._last_end = max(begun, self._last_end), self._clock()
            self._measure(batch, self._last_end - begun)
        except BaseException as error:
            _raise_if_lost(error)
            logger.exception("step %d failed on the device", batch.step)
            result = _failed(batch.sequences, error, (item.key for item in batch.encode))
        return self._update(batch, result)

    def _measure(self, batch: ScheduledBatch, seconds: float) -> None:
        """What a step tells of costs. Steps of decodes alone matter only to what comes back between them."""
        scheduler, sequences = self.scheduler, batch.sequences
        if not sequences or batch.sources or (sequences[-1].length == 1 and not batch.encode and not scheduler.tiers):
            return
        made = [item for item in batch.encode if not item.stored]
        if made and not {item.key for item in made} <= set().union(*(s.seq.held_media for s in sequences)):
            return  # what is encoded ahead is waited for by another step
        decodes = batch.num_decodes
        tokens = sum(s.length for s in sequences[decodes:])
        cost = sum(scheduler.media.cost(item.feature) for item in made)
        scheduler.costs = scheduler.costs.observe_step(tokens, cost, seconds, decodes)

    def _update(self, batch: ScheduledBatch, result: StepResult) -> list[TokenOutput]:
        with self._span("update"):
            return self._report(self.scheduler.update(batch, result))

    def _retry(self, batch: ScheduledBatch, error: BaseException) -> StepResult:
        """Run the sequences of a step that could not be launched one by one, so that only those at fault end.

        Running one again is safe: it writes the same KV to the same slots. Copies within the device are made again,
        others were launched before all else. What was to be encoded ahead is left for the steps that need it.
        """
        held = set().union(*(s.seq.held_media for s in batch.sequences))
        alone = len(batch.sequences) == 1 and all(item.key in held for item in batch.encode)
        live = [s for s in batch.sequences if s.seq.status is Status.RUNNING and s.seq.epoch == s.epoch]
        parts = [_failed(live, error)] if alone else [self._run_alone(batch, s) for s in live]
        return StepResult(
            {k: v for p in parts for k, v in p.sampled.items()},
            {k: v for p in parts for k, v in p.failed.items()},
            frozenset(i.key for i in batch.encode if i.key not in self.runner.rows).union(
                *(p.failed_media for p in parts)
            ),
        )

    def _run_alone(self, batch: ScheduledBatch, scheduled: ScheduledSequence) -> StepResult:
        held = scheduled.seq.held_media
        encode = tuple(i for i in batch.encode if i.key in held and i.key not in self.runner.rows)
        try:
            sources = tuple(seq for seq in batch.sources if seq is scheduled.seq)
            copies = tuple(c for c in batch.transfers.copies if c.target in scheduled.tables["self"])
            part = replace(
                batch,
                sequences=(scheduled,),
                encode=encode,
                evicted_media=(),
                sources=sources,
                transfers=Transfers(copies=copies),
            )
            return self.runner.launch(part).wait()
        except BaseException as error:
            _raise_if_lost(error)
            logger.exception("step %d failed for one request", batch.step)
            return _failed((scheduled,), error, (i.key for i in encode if i.key not in self.runner.rows))

    def _stuck(self) -> list[TokenOutput]:
        """Nothing could be scheduled though there is work: a request that can never run. End it."""
        seq = next(iter(self.scheduler.running or self.scheduler.waiting))
        self.scheduler.finish(seq, FinishReason.ERROR)
        error = EngineError(
            f"A request of {seq.num_tokens} tokens cannot be scheduled: the KV cache or the encoder cache is too "
            "small for it. Raise KvCacheConfig(num_blocks / cpu_cache_size / free_gpu_memory_fraction) or "
            "encoder_cache_tokens."
        )
        return self._report([TokenEvent(seq, None, finish_reason=FinishReason.ERROR, error=error)])

    def _report(self, events: Iterable[TokenEvent]) -> list[TokenOutput]:
        outputs: list[TokenOutput] = []
        for seq, token_id, logprobs, reason, stop, error in events:
            if reason is not None:
                self._forget(seq)
            outputs.append(
                TokenOutput(
                    seq.request.request_id,
                    seq.index,
                    token_id,
                    logprobs,
                    None if reason is None else reason.value,
                    stop,
                    seq.num_cached_tokens or 0,
                    seq.encoded_rows,
                    error,
                    seq.started,
                )
            )
        return outputs

    def release(self) -> None:
        """Give the device's memory back: modules, KV tensors, encoder rows. The books stay readable."""
        self.grammars.close()
        try:
            self.before_release()
        finally:
            self.runner.release()

    def stats(self) -> dict[str, Any]:
        """Counters of scheduler, blocks and encoder."""
        self._take_copies()
        scheduler = self.scheduler
        return {
            **asdict(scheduler.stats),
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "steps_in_flight": len(self._in_flight),
            "blocks": scheduler.pool.counts(),
            "block_size": scheduler.pool.block_size,
            "block_evictions": scheduler.pool.evictions,
            "encoder_calls": self.runner.rows.calls,
            "encoder_seconds": self.runner.rows.clock.seconds(),
            "encoder_cache": {
                "rows": scheduler.encoder_cache.used,
                "capacity": scheduler.encoder_cache.capacity,
                "items": len(scheduler.encoder_cache),
                "hits": scheduler.encoder_cache.hits,
                "misses": scheduler.encoder_cache.misses,
            },
            "kv_cache_bytes": self.runner.kv.bytes,
            "prompt_hits": self._prompt_hits(),
            **({} if scheduler.tiers is None else scheduler.tiers.counters()),
        }

    def _prompt_hits(self) -> dict[str, int]:
        """Where the tokens of the prompts that began came from: `queried` is the sum of the others."""
        stats, tiers = self.scheduler.stats, self.scheduler.tiers
        host, disk = (0, 0) if tiers is None else (tiers.stats.host_hits, tiers.stats.disk_hits)
        levels = {"device": stats.cached_tokens - host - disk, "host": host, "disk": disk}
        return {"queried": stats.queried_tokens, **levels, "computed": stats.queried_tokens - stats.cached_tokens}


def _failed(scheduled: Iterable[ScheduledSequence], error: BaseException, media: Iterable[bytes] = ()) -> StepResult:
    """The result of a step that brought nothing but an error."""
    fault = error if isinstance(error, MMError) else EngineError(
        f"The step failed with {type(error).__name__}. The log has the details; the engine serves other requests."
    )  # fmt: skip
    if fault is not error:
        fault.__cause__ = error
    return StepResult({}, {s.seq.seq_id: fault for s in scheduled}, frozenset(media))


def _do_nothing() -> None:
    """There is nothing to keep."""


def _to_nobody(notice: Notice) -> None:
    """Nobody asked."""


def _raise_if_lost(error: BaseException) -> None:
    """Raise an error after which the device is of no use to anybody, as after an illegal access.

    Such errors come up in any later call; running requests one by one would blame them all.
    """
    if is_lost(error):
        raise error
