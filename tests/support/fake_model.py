"""A scheduler's world without tensors: KV slots hold what was written, tokens depend on all of it.

The next token is a hash of everything the sequence's block tables show. If a block is shared
wrongly, reused too early or written by somebody else, the tokens differ from `expected_tokens`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

from mm_core.cache import BlockPool, EncoderCache
from mm_core.config import SamplingParams
from mm_core.errors import MMError
from mm_core.hashing import get_hasher
from mm_core.scheduler import (
    SampledToken,
    ScheduledBatch,
    Scheduler,
    SchedulerConfig,
    Sequence,
    StepResult,
)
from mm_core.types import MediaFeature, PlaceholderRange, PreparedRequest

VOCAB = 50
IMAGE = 7


def feature(name: str, rows: int, cost: int | None = None) -> MediaFeature:
    return MediaFeature("image", rows, {}, {"cost": rows * 4 if cost is None else cost}, name.encode())


def make_request(
    request_id: str, parts: Iterable[int | MediaFeature], params: SamplingParams | None = None, **extra: object
) -> PreparedRequest:
    """parts: token ids and media, in prompt order."""
    ids: list[int] = []
    ranges: list[PlaceholderRange] = []
    for part in parts:
        if isinstance(part, MediaFeature):
            ranges.append(PlaceholderRange(len(ids), part.num_tokens, (True,) * part.num_tokens, part))
            ids += [IMAGE] * part.num_tokens
        else:
            ids.append(part)
    params = params or SamplingParams(max_tokens=4, temperature=0)
    return PreparedRequest(request_id, tuple(ids), params, tuple(ranges), **extra)  # type: ignore[arg-type]


def make_scheduler(
    num_blocks: int = 32,
    block_size: int = 4,
    max_num_seqs: int = 8,
    max_tokens: int = 16,
    encoder_budget: int = 64,
    encoder_rows: int = 64,
    reuse: bool = True,
) -> Scheduler:
    config = SchedulerConfig(max_num_seqs, max_tokens, encoder_budget, num_blocks * block_size, reuse)
    return Scheduler(
        config,
        BlockPool(num_blocks, block_size),
        EncoderCache(encoder_rows),
        get_hasher("xxh3_128"),
        lambda f: f.info["cost"],
    )


def _content(request: PreparedRequest, position: int, token: int) -> str:
    for r in request.ranges:
        if r.offset <= position < r.end:
            return f"{r.feature.key!r}:{position - r.offset}"
    return str(token)


def _next(contents: list[str]) -> int:
    return 8 + zlib.crc32("|".join(contents).encode()) % (VOCAB - 8)


def expected_tokens(request: PreparedRequest, limit: int) -> list[int]:
    contents = [_content(request, i, t) for i, t in enumerate(request.token_ids)]
    out: list[int] = []
    while len(out) < limit and len(contents) < 10_000:
        out.append(_next(contents))
        contents.append(str(out[-1]))
    return out


class FakeRunner:
    """Writes what it is told into slots; checks that encoder rows are there when they are read."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.slots: dict[int, str] = {}
        self.rows: set[bytes] = set()
        self.encoded: list[bytes] = []
        self.computed_tokens = 0

    def execute(self, batch: ScheduledBatch) -> StepResult:
        self.rows -= set(batch.evicted_media)
        for item in batch.encode:
            assert item.key not in self.rows, "encoded although present"
            self.rows.add(item.key)
            self.encoded.append(item.key)
        sampled: dict[int, SampledToken] = {}
        for s in batch.sequences:
            assert s.length > 0
            self.computed_tokens += s.length
            for position in range(s.start, s.start + s.length):
                self._write(s.seq, position)
        for s in batch.sequences:
            if s.samples:
                seen = [self.slots[self._slot(s.seq, p)] for p in range(s.start + s.length)]
                sampled[s.seq.seq_id] = SampledToken(_next(seen))
        return StepResult(sampled)

    def _slot(self, seq: Sequence, position: int) -> int:
        return seq.tables["self"][position // self.block_size] * self.block_size + position % self.block_size

    def _write(self, seq: Sequence, position: int) -> None:
        for r in seq.ranges:
            if r.offset <= position < r.end:
                assert r.feature.key in self.rows, "fused before it was encoded"
        self.slots[self._slot(seq, position)] = _content(seq.request, position, seq.token_ids[position])


class World:
    """Scheduler and fake runner, stepped together with the books checked every time."""

    def __init__(self, **settings: object) -> None:
        self.scheduler = make_scheduler(**settings)  # type: ignore[arg-type]
        self.runner = FakeRunner(self.scheduler.pool.block_size)
        self.sequences: list[Sequence] = []
        self.errors: dict[int, MMError] = {}

    def add(self, request: PreparedRequest) -> list[Sequence]:
        new = [Sequence(len(self.sequences) + i, request, i) for i in range(request.params.n)]
        self.sequences += new
        for seq in new:
            self.scheduler.add(seq)
        return new

    def step(self) -> bool:
        batch = self.scheduler.schedule()
        self.scheduler.check_integrity()
        if batch is None:
            return False
        assert batch.num_tokens <= self.scheduler.config.max_num_batched_tokens
        for event in self.scheduler.update(batch, self.runner.execute(batch)):
            if event.error is not None:
                self.errors[event.seq.seq_id] = event.error
        self.scheduler.check_integrity()
        return True

    def run(self, limit: int = 2000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_work:
                return
            assert self.step(), "work left but nothing was scheduled"
        raise AssertionError("the scheduler did not finish")
