"""EngineCore: scheduler and runner behind messages, and the thread that drives them."""

from __future__ import annotations

import functools
import logging
import queue
import random
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from mm_core.config import SamplingParams
from mm_core.engine.messages import Abort, ClearCache, Message, Submit, TokenOutput
from mm_core.engine.precedence import Precedence
from mm_core.errors import EngineError, MMError
from mm_core.runner.memory import is_lost
from mm_core.runner.step import LaunchedStep
from mm_core.scheduler.scheduler import Scheduler
from mm_core.scheduler.sequence import ScheduledBatch, ScheduledSequence, Status, StepResult, TokenEvent
from mm_core.scheduler.sequence import Sequence as SequenceState
from mm_core.tracing import SpanRecorder
from mm_core.types import FinishReason, PreparedRequest

if TYPE_CHECKING:
    from mm_core.runner.runner import ModelRunner

logger = logging.getLogger(__name__)


class EngineCore:
    """Turns messages into steps and steps into outputs. Single-threaded by design.

    overlap: a step is scheduled and launched before the one before it is taken in, so that the device
    never waits for Python. Answers that end are then noticed one step late, and what was computed
    behind their end is dropped.
    """

    def __init__(self, scheduler: Scheduler, runner: ModelRunner, seed: int, overlap: bool = False) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self._stay = 1 if overlap else 0  # steps left in flight behind a launch
        self._in_flight: deque[tuple[ScheduledBatch, LaunchedStep]] = deque()
        self.precedence = Precedence()
        self._random = random.Random(seed)
        self._next_id = 0
        self._requests: dict[str, list[SequenceState]] = {}
        self.recorder: SpanRecorder | None = None  # gets what this thread does in a step

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
                self.scheduler.prefix.clear()
                return []

    def _submit(self, request: PreparedRequest) -> list[TokenOutput]:
        params: SamplingParams = request.params
        try:
            self.scheduler.sources.check(request)
        except MMError as error:
            return [TokenOutput(request.request_id, 0, None, finish_reason=FinishReason.ERROR.value, error=error)]
        seed = params.seed if params.seed is not None else self._random.getrandbits(63)
        sequences = [SequenceState(self._take_id(), request, index, seed) for index in range(params.n)]
        self._requests[request.request_id] = sequences
        for seq in sequences:
            self.scheduler.add(seq)
        return []

    def _take_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def _abort(self, request_id: str, index: int | None, reason: FinishReason) -> list[TokenOutput]:
        ended = [s for s in self._requests.get(request_id, []) if index is None or s.index == index]
        outputs = []
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
        return list(self._requests)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._in_flight) or self.scheduler.has_work

    def step(self) -> list[TokenOutput]:
        """Launch a step and take in what is due: with overlap the one before it, else itself."""
        preemptions = self.scheduler.stats.preemptions
        with self._span("schedule"):
            batch = self.scheduler.schedule()
        if batch is not None:
            return self._launch(batch)
        if self._in_flight:
            return self._take_in()
        return self._stuck() if self.scheduler.stats.preemptions == preemptions else []

    def drain(self) -> list[TokenOutput]:
        """Take in all that is in flight."""
        outputs: list[TokenOutput] = []
        while self._in_flight:
            outputs += self._take_in()
        return outputs

    def _launch(self, batch: ScheduledBatch) -> list[TokenOutput]:
        try:
            with self._span("launch"):
                launched = self.runner.launch(batch)
        except BaseException as error:  # a plugin's sys.exit, too: nobody else would ever hear
            _raise_if_lost(error)
            logger.exception("step %d failed", batch.step)
            outputs = self.drain()  # in order; some of the batch's sequences may end here
            return outputs + self._update(batch, self._retry(batch, error))
        self._in_flight.append((batch, launched))
        outputs = []
        while len(self._in_flight) > (0 if launched.failed else self._stay):
            outputs += self._take_in()
        return outputs

    def _take_in(self) -> list[TokenOutput]:
        """Wait for the oldest step in flight; what it brought."""
        batch, launched = self._in_flight.popleft()
        try:
            with self._span("wait"), self.precedence.waiting():
                result = launched.wait()
        except BaseException as error:
            _raise_if_lost(error)
            logger.exception("step %d failed on the device", batch.step)
            result = _failed(batch.sequences, error, (item.key for item in batch.encode))
        return self._update(batch, result)

    def _update(self, batch: ScheduledBatch, result: StepResult) -> list[TokenOutput]:
        with self._span("update"):
            return self._report(self.scheduler.update(batch, result))

    def _retry(self, batch: ScheduledBatch, error: BaseException) -> StepResult:
        """Run the sequences of a step that could not be launched one by one, so that only those at fault end.

        Running one again is safe: it writes the same KV to the same slots. What was to be encoded
        ahead is left for the steps that need it.
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
            part = replace(batch, sequences=(scheduled,), encode=encode, evicted_media=(), sources=sources)
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
                )
            )
        return outputs

    def release(self) -> None:
        """Give the device's memory back: modules, KV tensors, encoder rows. The books stay readable."""
        self.runner.release()

    def stats(self) -> dict[str, Any]:
        """Counters of scheduler, blocks and encoder."""
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
            "encoder_cache": {
                "rows": scheduler.encoder_cache.used,
                "capacity": scheduler.encoder_cache.capacity,
                "items": len(scheduler.encoder_cache),
                "hits": scheduler.encoder_cache.hits,
                "misses": scheduler.encoder_cache.misses,
            },
            "kv_cache_bytes": self.runner.kv.bytes,
        }


def _failed(scheduled: Iterable[ScheduledSequence], error: BaseException, media: Iterable[bytes] = ()) -> StepResult:
    """The result of a step that brought nothing but an error."""
    fault = error if isinstance(error, MMError) else EngineError(
        f"The step failed with {type(error).__name__}. The log has the details; the engine serves other requests."
    )  # fmt: skip
    if fault is not error:
        fault.__cause__ = error
    return StepResult({}, {s.seq.seq_id: fault for s in scheduled}, frozenset(media))


def _raise_if_lost(error: BaseException) -> None:
    """Raise an error after which the device is of no use to anybody, as after an illegal access.

    Such errors come up in any later call; running requests one by one would blame them all.
    """
    if is_lost(error):
        raise error


class CoreThread:
    """Runs an EngineCore in a thread of the caller's process.

    make builds the core, and so loads the model, in that same thread: each thread that calls torch
    on a CPU gets a team of workers of its own, and as soon as there are more workers than cores
    they sleep and wake around every call (measured: decode steps of 14 ms take 20 to 27). What it
    raises is raised here. listener gets the outputs of each step, in the core's thread; messages it
    sends while it runs are handled before the next step.
    """

    _core: EngineCore

    def __init__(self, make: Callable[[], EngineCore], listener: Callable[[Sequence[TokenOutput]], None]) -> None:
        self._listener = listener
        self._inbox: queue.SimpleQueue[Message | threading.Event | None] = queue.SimpleQueue()
        self._stats: dict[str, Any] = {}
        ready: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        target = functools.partial(self._main, make, ready)
        self._thread = threading.Thread(target=target, name="mm-core-engine", daemon=True)
        self._thread.start()
        error = ready.get()
        if error is not None:
            raise error

    def _main(self, make: Callable[[], EngineCore], ready: queue.SimpleQueue[BaseException | None]) -> None:
        try:
            self._core = make()
        except BaseException as error:
            ready.put(error)
            return
        self._stats = self._core.stats()
        ready.put(None)
        self._run()

    @property
    def alive(self) -> bool:
        """Whether the loop still runs."""
        return self._thread.is_alive()

    def send(self, message: Message) -> None:
        """Queue a message; returns at once."""
        self._inbox.put(message)

    def stats(self) -> dict[str, Any]:
        """The core's counters, taken between two steps."""
        ready = threading.Event()
        self._inbox.put(ready)
        while not ready.wait(0.05):
            if not self.alive:
                break
        return self._stats

    def close(self) -> None:
        """Stop after the step in flight; what is unfinished ends as aborted."""
        self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_messages():
                if self._core.has_work:
                    self._deliver(self._core.step())
        except BaseException as error:
            logger.exception("the engine's loop failed")
            self._refuse_all(error)
            return
        try:
            for request_id in self._core.request_ids:
                self._deliver(self._core.handle(Abort(request_id)))
            self._core.drain()  # the device must be done before its memory is given back
        except BaseException:  # close() waits for this thread
            logger.exception("the engine's last step failed")

    def _refuse_all(self, error: BaseException) -> None:
        """The books cannot be trusted any more: end every request, those to come too, until close()."""
        fault = EngineError(
            f"The engine's loop failed with {type(error).__name__}. This is a bug in mm-core: please report it with "
            "the log. Close this engine and make a new one."
        )
        fault.__cause__ = error
        ended = self._core.request_ids
        while True:
            self._deliver([TokenOutput(i, 0, None, finish_reason=FinishReason.ERROR.value, error=fault) for i in ended])
            message = self._inbox.get()
            if message is None:
                return
            if isinstance(message, threading.Event):
                message.set()
            ended = [message.request.request_id] if isinstance(message, Submit) else []

    def _take_messages(self) -> bool:
        """Handle all that waits, or wait while there is no work. False: close."""
        block = not self._core.has_work
        while block or not self._inbox.empty():
            message = self._receive()
            block = False
            if message is None:
                return False
            if isinstance(message, threading.Event):
                self._stats = self._core.stats()
                message.set()
            else:
                self._deliver(self._core.handle(message))
        return True

    def _receive(self) -> Message | threading.Event | None:
        if not self._inbox.empty():
            return self._inbox.get()
        with self._core.precedence.waiting():
            return self._inbox.get()

    def _deliver(self, outputs: Sequence[TokenOutput]) -> None:
        if not outputs:
            return
        try:
            self._listener(outputs)
        except Exception:  # a listener's fault must not stop everybody's tokens
            logger.exception("an output listener failed")
