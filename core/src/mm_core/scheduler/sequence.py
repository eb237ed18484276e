"""Sequence: the mutable scheduling state of one answer to one request."""

from __future__ import annotations

import enum
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from mm_core.cache.layout import Layout, PlacedItem
from mm_core.cache.prefix import BlockContent, MediaTag
from mm_core.config import SamplingParams
from mm_core.errors import MMError
from mm_core.hashing import ROOT, Hasher, block_key, encode_fields, source_key
from mm_core.scheduler.transfers import NO_TRANSFERS, Transfers
from mm_core.types import FinishReason, Logprob, MediaFeature, PlaceholderRange, PreparedRequest

if TYPE_CHECKING:
    from mm_core.structured.matcher import Matcher


class Status(enum.Enum):
    """Where a sequence is. A preempted one waits again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """One answer in the making.

    token_ids: prompt and output as far as known; tokens sampled by steps in flight come after them.
    [0, num_completed_tokens) have their KV, [0, num_computed_tokens) will when the steps in flight
    complete. tables: block tables by name, append-only while it runs; num_slots: what "self" holds;
    "cross" is there where the request has a source, and full from the start. source_step: the step in
    flight that computes its source, 0 if none does.
    held_media: items that must stay in the encoder cache for it. kept_media: items it will need, which
    leave only where somebody needs their room now. grammar: what the answer follows, set before it is added.
    """

    def __init__(self, seq_id: int, request: PreparedRequest, index: int = 0, seed: int = 0) -> None:
        self.seq_id = seq_id  # also its number in order of arrival
        self.seed = seed
        self.request = request
        self.index = index
        self.params: SamplingParams = request.params
        self.masked_stop_ids = request.stop_token_ids.union(self.params.stop_token_ids)  # until min_tokens
        self.prompt_len = len(request.token_ids)
        self.token_ids = list(request.token_ids)
        self.status = Status.WAITING
        self.slot = -1  # its row in the runner's tables while it runs
        self.epoch = 0  # grows with each preemption: results of steps before it are void
        self.num_in_flight = 0  # output tokens sampled by steps whose results are not known yet
        self.num_computed_tokens = 0
        self.num_completed_tokens = 0
        self.num_slots = 0
        self.max_length = self.prompt_len + (self.params.max_tokens or 2**31)  # it ends with so many tokens
        goes_on = self.params.ignore_eos and self.params.structured is None  # a grammar has an end of its own
        self.end_ids = self.params.stop_token_ids if goes_on else self.masked_stop_ids
        self.grammar: Matcher | None = None
        self.num_published_blocks = 0
        self.num_cached_tokens: int | None = None  # of the prompt, at first admission
        self.encoded_rows = 0
        self.started: float | None = None  # when it was first scheduled, by the engine's clock
        self.waiting_since = 0
        self.source = request.source
        self.source_step = 0
        self.hidden = False  # nothing more of it is published: what it holds was evicted
        self.media_end = max((r.end for r in request.ranges), default=0)
        self.held_media: set[bytes] = set()
        self.kept_media: set[bytes] = set()
        self.media_ahead = bool(request.media)  # whether items may be encoded before they are needed
        self.tables: dict[str, list[int]] = {"self": []} if request.source is None else {"self": [], "cross": []}
        self.contents: list[BlockContent] = []  # of the full blocks, as far as they were needed
        self.source_contents: list[BlockContent] = []  # of its source's blocks, as far as they were needed
        self.seen_version = (-1, -1)  # of the prefix cache, at the last lookup
        self.seen_hits = 0
        self.seen_source_version = (-1, -1)  # as `seen_version`, of the source's blocks
        self.seen_source: list[int] = []
        self.media_costs: Mapping[bytes, float] = {}  # what encoding each item costs, as far as anybody asks
        self.seen_behind = (-1, 0)  # step of the last look behind the device, and tokens seen there
        self._layout: Layout | None = None
        self._tags: tuple[MediaTag, ...] = ()  # of the items as far as blocks were filled
        self._first_range = 0  # that reaches into the last block filled

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens, those in flight included."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def ends_in_flight(self) -> bool:
        """Whether the token in flight is its last by length: nothing more is to be computed."""
        return self.num_in_flight > 0 and self.num_tokens >= self.max_length

    @property
    def num_output_tokens(self) -> int:
        """Output tokens known."""
        return len(self.token_ids) - self.prompt_len

    @property
    def output_token_ids(self) -> list[int]:
        """Output tokens so far."""
        return self.token_ids[self.prompt_len :]

    @property
    def ranges(self) -> tuple[PlaceholderRange, ...]:
        """Where media lie in the decoder's prompt."""
        return self.request.ranges

    @property
    def media(self) -> tuple[PlaceholderRange, ...]:
        """All items it needs, those of its source included."""
        return self.request.media

    @property
    def layout(self) -> Layout:
        """What its tokens are beside their ids."""
        if self._layout is None:
            request = self.request
            context = encode_fields((request.cache_salt, request.kv_context))
            items = tuple(PlacedItem(r.feature.key, r.offset, r.end) for r in self.ranges)
            self._layout = Layout(context, items, request.positions, self.prompt_len, request.decode_delta)
        return self._layout

    def fill_source(self, count: int, hasher: Hasher) -> list[BlockContent]:
        """Keys of the first `count` of its source's blocks at least, computed once each. The last block may
        be partly filled: the source's key says how far."""
        if self.source is not None and len(self.source_contents) < count:
            tags = tuple(MediaTag(r.feature.key, r.feature.uuid) for r in self.source.ranges)
            cost = sum(self.media_costs.values()) / count
            for index in range(len(self.source_contents), count):
                key = source_key(hasher, self.source.key, index)
                parent = self.source_contents[-1].key if index else self.source.key
                salt = self.request.cache_salt
                self.source_contents.append(BlockContent(key, (), parent, tags, len(tags), salt, cost, index))
        return self.source_contents

    def fill_contents(self, count: int, block_size: int, hasher: Hasher) -> list[BlockContent]:
        """Keys and tokens of the first `count` full blocks at least, computed once each."""
        contents = self.contents
        if len(contents) >= count:
            return contents
        request, layout = self.request, self.layout
        given = request.block_keys if request.block_size == block_size else ()
        parent = contents[-1].key if contents else ROOT
        for block in range(len(contents), count):
            start, end = block * block_size, (block + 1) * block_size
            ids = tuple(self.token_ids[start:end])
            touched = self._touched(start, end) if start < self.media_end else []
            if block < len(given):
                key = given[block]  # what was computed with the prompt is taken over
            else:
                media = [(r.feature.key, max(start - r.offset, 0)) for r in touched]
                key = block_key(hasher, parent, ids, media, layout.context, layout.positions_in(start, end))
            cost = self._encoder_cost(touched, start, end) if touched else 0.0
            salt = request.cache_salt
            contents.append(BlockContent(key, ids, parent, self._tags, len(touched), salt, cost, block, layout))
            parent = key
        return contents

    def _touched(self, start: int, end: int) -> list[PlaceholderRange]:
        """Items with tokens in [start, end), asked for from the front on; `_tags` has those that begin before `end`."""
        ranges = self.ranges
        while ranges[self._first_range].end <= start:
            self._first_range += 1
        last = self._first_range
        while last < len(ranges) and ranges[last].offset < end:
            last += 1
        if last != len(self._tags):
            self._tags = tuple(MediaTag(r.feature.key, r.feature.uuid) for r in ranges[:last])
        return [r for r in ranges[self._first_range : last] if r.end > start]

    def _encoder_cost(self, touched: Iterable[PlaceholderRange], start: int, end: int) -> float:
        costs = self.media_costs
        return sum(costs.get(r.feature.key, 0) * (min(end, r.end) - max(start, r.offset)) / r.length for r in touched)


@dataclass(frozen=True)
class EncodeItem:
    """One item whose rows a step makes: from the host's memory where `stored` names the slots that hold them, else
    by the encoder."""

    key: bytes
    feature: MediaFeature
    stored: tuple[int, ...] = ()


class ScheduledSequence(NamedTuple):  # one a sequence and step: half the cost of a dataclass
    """Tokens [start, start + length) of a sequence run in a step; `samples` if the last of them is
    the last of the sequence, so that its logits choose the next token. A token whose id is not in
    `seq.token_ids` yet was sampled by the step before: the runner has it on the device, under the
    sequence's slot. epoch: the sequence's when it was scheduled."""

    seq: Sequence
    start: int
    length: int
    samples: bool
    tables: Mapping[str, list[int]]
    epoch: int = 0


@dataclass(frozen=True)
class ScheduledBatch:
    """One step's work, in flattened order: sequences with one token first.

    encode: items to encode, those that `sequences` read before those that are encoded ahead. A batch
    may hold nothing but such items. sources: sequences whose source's keys and values are computed first,
    into their "cross" tables; they are among `sequences`, and their media are held. evicted_media: items
    whose rows nobody may read any more; they are dropped first, for one of them may be encoded anew in the
    same step. transfers: copies that come before all this.
    """

    step: int
    sequences: tuple[ScheduledSequence, ...]
    encode: tuple[EncodeItem, ...] = ()
    evicted_media: tuple[bytes, ...] = ()
    sources: tuple[Sequence, ...] = ()
    transfers: Transfers = NO_TRANSFERS

    @property
    def num_decodes(self) -> int:
        """Leading sequences with one token each."""
        return bisect_left(self.sequences, True, key=lambda s: s.length > 1)

    @property
    def num_tokens(self) -> int:
        """Rows of the flattened batch."""
        return sum(s.length for s in self.sequences)


@dataclass
class SchedulerStats:
    """Counters since start, in tokens and events. queried_tokens: of the prompts that began; cached_tokens of them
    were there."""

    steps: int = 0
    prompt_tokens: int = 0
    queried_tokens: int = 0
    cached_tokens: int = 0
    copied_tokens: int = 0
    generated_tokens: int = 0
    computed_tokens: int = 0
    partial_prefills: int = 0
    preemptions: int = 0
    encoded_items: int = 0
    encoded_rows: int = 0
    encoded_ahead: int = 0
    computed_sources: int = 0
    deferred: int = 0
    finished: dict[str, int] = field(default_factory=dict)


class SampledToken(NamedTuple):
    """One sequence's next token. finite: False where the model gave no usable logits."""

    token_id: int
    logprobs: Mapping[int, Logprob] | None = None
    finite: bool = True


@dataclass(frozen=True)
class StepResult:
    """What a step brought: tokens by seq_id, and the sequences and media that failed alone. damaged_rows: items
    whose stored rows were damaged, so that they were encoded."""

    sampled: Mapping[int, SampledToken]
    failed: Mapping[int, MMError] = field(default_factory=dict)
    failed_media: frozenset[bytes] = frozenset()
    damaged_rows: frozenset[bytes] = frozenset()


class TokenEvent(NamedTuple):
    """One token, or the end, of one sequence: what the engine core reports after a step."""

    seq: Sequence
    token_id: int | None
    logprobs: Mapping[int, Logprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: MMError | None = None
