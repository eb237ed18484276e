"""StepPlan: what one call of `Scheduler.schedule` has put together so far."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from mm_core.scheduler.outlook import Future
from mm_core.scheduler.sequence import EncodeItem, ScheduledSequence, Sequence
from mm_core.scheduler.transfers import BlockCopy

# A copy takes a step a few launches, whatever a block's size, and computing a few tokens more costs a CPU much, a GPU
# nothing; tests/bench/partial_reuse.py measures both.
COPY_TOKENS = 4
GPU_COPY_TOKENS = 32


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of a step and of a sequence. encoder_budget is in the encoder's cost units. source_budget: rows of
    sources computed in a step; 0: as many as there are tokens, four times. copy_tokens: how many a block must have in
    common with a prompt's, behind the same beginning, for these to be copied; those that are the end of its media are
    however few they are. 0: nothing is."""

    max_num_seqs: int
    max_num_batched_tokens: int
    encoder_budget: int
    max_model_len: int
    enable_block_reuse: bool = True
    source_budget: int = 0
    copy_tokens: int = 0


class Outcome(enum.Enum):
    """Of an attempt to start a waiting sequence. AWAITS: another computes its source or next block. LATER: a
    coming step has encoder budget or room for it. FULL: there are too few blocks. RESTORES: what it needs next is
    copied back, or will be."""

    STARTED = enum.auto()
    AWAITS = enum.auto()
    LATER = enum.auto()
    FULL = enum.auto()
    RESTORES = enum.auto()


class StepPlan:
    """A step in the making.

    singles, chunks: sequences with one token, with more. encoded: how many items `encode` has beside those that are
    copied back. sources: sequences whose source is computed.
    prompts: blocks that running sequences still want for their prompts. future: what they will want for
    their answers. rows_closed: somebody
    waits for room in the encoder cache, budget_closed: for encoder budget, sources_closed: for the budget
    of sources' rows; those behind take no more of it, or its turn would never come. ahead: running
    sequences with media still before them. copies: of blocks within the device, before anything is written.
    """

    def __init__(self, step: int, tokens: int, encoder_budget: int, source_budget: int) -> None:
        self.step = step
        self.tokens_left = tokens
        self.encoder_left = encoder_budget
        self.source_left = source_budget
        self.singles: list[ScheduledSequence] = []
        self.chunks: list[ScheduledSequence] = []
        self.encode: list[EncodeItem] = []
        self.encoded = 0
        self.sources: list[Sequence] = []
        self.prompts = 0
        self.future = Future()
        self.rows_closed = False
        self.budget_closed = False
        self.sources_closed = False
        self.ahead: list[Sequence] = []
        self.copies: list[BlockCopy] = []

    @property
    def sequences(self) -> tuple[ScheduledSequence, ...]:
        """All that runs, one-token sequences first."""
        return (*self.singles, *self.chunks)

    def fits_budget(self, cost: int, planned: int) -> bool:
        """Whether an item may be encoded beside `planned` cost units of others. One over the whole budget
        runs alone."""
        return not (planned or self.encoded) or (not self.budget_closed and cost <= self.encoder_left - planned)

    def fits_source(self, rows: int) -> bool:
        """Whether a source of so many rows may be computed beside the others. One over the whole budget
        runs alone."""
        return not self.sources or (not self.sources_closed and rows <= self.source_left)

    def lacks_room(self, available: int, cached: int, steps: int, growth: int, total: int) -> bool:
        """Whether at some time more blocks will be wanted than are `available` now, were a sequence admitted that
        shares so many cached ones of these, takes `total` others now, and grows."""
        return available - cached < self.prompts + self.future.peak(steps, growth, total)
