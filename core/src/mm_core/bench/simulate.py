"""Replays a trace against the real scheduler and caches, with a virtual clock and a `SimCosts` in a device's place.

Nothing here loads torch. What is simulated is time alone: who is admitted when, what is found, evicted, stored and
restored is decided by the same code as in the engine, by the same keys. Preprocessing takes no time here, and the
loop's own Python none either.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from mm_core.bench.sim_costs import DEFAULT_COSTS, PRESETS, SimCosts
from mm_core.bench.sim_device import NoFile, VirtualDevice
from mm_core.bench.sim_requests import RequestMaker
from mm_core.bench.traces import Trace, TraceRequest
from mm_core.cache.blocks import BlockPool
from mm_core.cache.disk import DiskTier
from mm_core.cache.encoder import EncoderCache
from mm_core.cache.host import HostTier
from mm_core.errors import ConfigError, ContextLengthError, MMError
from mm_core.hashing import get_hasher
from mm_core.scheduler.plan import COPY_TOKENS, SchedulerConfig
from mm_core.scheduler.policy import POLICIES
from mm_core.scheduler.scheduler import Scheduler
from mm_core.scheduler.sequence import SampledToken, ScheduledBatch, Sequence, StepResult, TokenEvent
from mm_core.scheduler.tier_types import TierConfig
from mm_core.types import MediaFeature

Progress = Callable[[int], object]  # told of requests that have ended


@dataclass(frozen=True)
class SimSetup:
    """The engine that is simulated; fields as in EngineConfig, sizes in tokens' KV. policy: scheduling_policy.
    host_tokens, disk_tokens: what the tiers hold; 0: no such tier. staging_slots: blocks that may be on their way to
    the host; None: as many as on a GPU. check: verify the books after every step."""

    kv_tokens: int
    host_tokens: int = 0
    disk_tokens: int = 0
    policy: str = "reuse"
    costs: SimCosts = PRESETS[DEFAULT_COSTS]
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    encoder_budget: int = 32768
    encoder_cache_tokens: int = 32768
    enable_block_reuse: bool = True
    overlap: bool = True
    staging_slots: int | None = None
    check: bool = False


@dataclass
class Replayed:
    """One request's fate; times in seconds of the virtual clock."""

    request: TraceRequest
    arrival: float
    first: float = -1.0
    end: float = -1.0
    cached_tokens: int = 0
    encoded_rows: int = 0
    token_ids: list[int] = field(default_factory=list)
    error: MMError | None = None


@dataclass(frozen=True)
class Replay:
    """What a trace came to under one setup."""

    setup: SimSetup
    requests: list[Replayed]
    seconds: float
    counters: dict[str, Any]
    device: VirtualDevice


def _quietly(_ended: int) -> None:
    """No progress is shown."""


def replay(trace: Trace, setup: SimSetup, progress: Progress = _quietly) -> Replay:
    """Run a trace to its end."""
    return _Simulation(trace, setup, progress).run()


def make_scheduler(setup: SimSetup) -> Scheduler:
    """The engine's own scheduler and caches. Raises ConfigError for sizes it cannot have."""
    if setup.policy not in POLICIES:
        raise ConfigError(f"Policy {setup.policy!r} is unknown. There are: {', '.join(POLICIES)}.")
    blocks = setup.kv_tokens // setup.block_size
    if blocks < 2:
        raise ConfigError(f"A KV cache of {setup.kv_tokens} tokens has no two blocks of {setup.block_size}. Raise it.")
    config = SchedulerConfig(
        max_num_seqs=setup.max_num_seqs,
        max_num_batched_tokens=setup.max_num_batched_tokens,
        encoder_budget=setup.encoder_budget,
        max_model_len=blocks * setup.block_size,
        enable_block_reuse=setup.enable_block_reuse,
        copy_tokens=COPY_TOKENS,
    )
    pool, rows = BlockPool(blocks, setup.block_size), EncoderCache(setup.encoder_cache_tokens)
    hasher, policy = get_hasher("xxh3_128"), POLICIES[setup.policy]
    scheduler = Scheduler(config, pool, rows, hasher, _encoder_cost, policy)
    slots, places = setup.host_tokens // setup.block_size, setup.disk_tokens // setup.block_size
    if slots:
        costs = setup.costs
        tiers = TierConfig(costs.kv_bytes * setup.block_size, costs.row_bytes)
        scheduler.add_tiers(HostTier(slots), tiers, DiskTier(NoFile(places)) if places else None)
    elif places:
        raise ConfigError("A disk tier needs a host tier to go through.")
    return scheduler


def _staging_slots(setup: SimSetup) -> int:
    """Room for blocks on their way to the host, as the engine takes it."""
    if setup.staging_slots is not None:
        return setup.staging_slots
    step = -(-setup.max_num_batched_tokens // setup.block_size)
    most = setup.costs.staging_bytes // (setup.costs.kv_bytes * setup.block_size)
    return max(min(step + step // 2, most, setup.kv_tokens // setup.block_size // 16), 1)


def _encoder_cost(feature: MediaFeature) -> int:
    cost: int = feature.info["cost"]
    return cost


class _Simulation:
    """One run. now: seconds of the virtual clock."""

    def __init__(self, trace: Trace, setup: SimSetup, progress: Progress) -> None:
        self.setup = setup
        self.scheduler = make_scheduler(setup)
        self.device = VirtualDevice(setup.costs, setup.block_size, _staging_slots(setup))
        self.maker = RequestMaker(get_hasher("xxh3_128"), setup.block_size)
        self.now = 0.0
        self.requests: list[Replayed] = []
        self._progress = progress
        self._in_flight: deque[tuple[ScheduledBatch, float, float]] = deque()
        self._stay = 1 if setup.overlap else 0
        self._numbers = itertools.count()
        self._arrivals: list[tuple[float, int, TraceRequest]] = []  # heap
        self._turns: dict[str, deque[TraceRequest]] = {}  # of conversations, those to come
        self._of: dict[int, Replayed] = {}  # by sequence
        for request in trace.requests:
            if request.conversation is None or request.turn == 0:
                self._expect(request, request.at)
            else:
                self._turns.setdefault(request.conversation, deque()).append(request)

    def _expect(self, request: TraceRequest, at: float) -> None:
        heapq.heappush(self._arrivals, (at, next(self._numbers), request))

    def run(self) -> Replay:
        while self._arrivals or self._in_flight or self.scheduler.has_work:
            self._step()
        while self.device.pending:
            self.scheduler.take_transfers(self.device.poll(self.device.next_end))
        self._verify()
        counters = asdict(self.scheduler.stats) | {"block_evictions": self.scheduler.pool.evictions}
        if self.scheduler.tiers is not None:
            counters |= asdict(self.scheduler.tiers.stats)
        counters |= {
            "encoder_hits": self.scheduler.encoder_cache.hits,
            "encoder_misses": self.scheduler.encoder_cache.misses,
        }
        seconds = max((r.end for r in self.requests), default=0.0)
        return Replay(self.setup, self.requests, seconds, counters, self.device)

    def _step(self) -> None:
        """As `EngineCore.step`: launch a step and take in what is due, or let time pass."""
        while self._arrivals and self._arrivals[0][0] <= self.now:
            self._submit(*heapq.heappop(self._arrivals))
        if self.device.pending and (done := self.device.poll(self.now)):
            self.scheduler.take_transfers(done)
            self._verify()
        preemptions = self.scheduler.stats.preemptions
        batch = self.scheduler.schedule()
        self._verify()
        if batch is not None:
            self._launch(batch)
        elif self._in_flight:
            self._take_in()
        elif self.scheduler.stats.preemptions == preemptions:
            self._wait()

    def _submit(self, at: float, number: int, request: TraceRequest) -> None:
        fate = Replayed(request, at)
        self.requests.append(fate)
        prepared = self.maker.make(request, str(number))
        try:
            if request.prompt_tokens >= self.scheduler.config.max_model_len:
                raise ContextLengthError(f"{request.prompt_tokens} prompt tokens do not fit the KV cache.")
            self.scheduler.sources.check(prepared)
        except MMError as error:
            self._end(fate, error)
            return
        seq = Sequence(number + 1, prepared)
        self._of[seq.seq_id] = fate
        self.scheduler.add(seq)

    def _launch(self, batch: ScheduledBatch) -> None:
        start = max(self.now, self.device.free_at)
        self._in_flight.append((batch, start, self.device.launch(batch, self.now)))
        while len(self._in_flight) > self._stay:
            self._take_in()

    def _take_in(self) -> None:
        """The oldest step in flight ends."""
        batch, start, end = self._in_flight.popleft()
        self.now = max(self.now, end)
        self._observe(batch, end - start)
        sampled = {s.seq.seq_id: self._sample(s.seq, s.start + s.length) for s in batch.sequences if s.samples}
        for event in self.scheduler.update(batch, StepResult(sampled)):
            self._note(event)
        self._verify()

    def _sample(self, seq: Sequence, place: int) -> SampledToken:
        answer = self.maker.text(self._of[seq.seq_id].request.answer)
        return SampledToken(answer[min(place - seq.prompt_len, len(answer) - 1)])

    def _note(self, event: TokenEvent) -> None:
        fate = self._of[event.seq.seq_id]
        if fate.first < 0 and event.token_id is not None:
            fate.first = self.now
        if event.finish_reason is not None:
            del self._of[event.seq.seq_id]
            fate.cached_tokens, fate.encoded_rows = event.seq.num_cached_tokens or 0, event.seq.encoded_rows
            fate.token_ids = event.seq.output_token_ids
            self._end(fate, event.error)

    def _end(self, fate: Replayed, error: MMError | None) -> None:
        fate.end, fate.error = self.now, error
        self._progress(1)
        following = self._turns.get(fate.request.conversation or "")
        if following:
            request = following.popleft()
            self._expect(request, max(request.at, self.now + request.think))

    def _wait(self) -> None:
        """Nothing runs: go to the next arrival, or the end of a copy."""
        times = [self._arrivals[0][0]] if self._arrivals else []
        times += [self.device.next_end] if self.device.pending else []
        if self.scheduler.has_work and not self.device.pending and self.scheduler.give_up_restored():
            return
        if not times:
            raise ConfigError(
                "A request of the trace can never run: the KV cache or the encoder cache is too small. Raise "
                "--kv-tokens or --encoder-cache-tokens."
            )
        self.now = max(self.now, min(times))

    def _observe(self, batch: ScheduledBatch, seconds: float) -> None:
        """What `EngineCore` makes of a step's time."""
        scheduler, sequences = self.scheduler, batch.sequences
        if not sequences or batch.sources or (sequences[-1].length == 1 and not batch.encode and not scheduler.tiers):
            return
        made = [item for item in batch.encode if not item.stored]
        if made and not {item.key for item in made} <= set().union(*(s.seq.held_media for s in sequences)):
            return  # what is encoded ahead is waited for by another step
        decodes = batch.num_decodes
        tokens, cost = sum(s.length for s in sequences[decodes:]), sum(_encoder_cost(item.feature) for item in made)
        scheduler.costs = scheduler.costs.observe_step(tokens, cost, seconds, decodes)

    def _verify(self) -> None:
        if self.setup.check:
            self.scheduler.check_integrity()
