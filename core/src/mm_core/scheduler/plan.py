"""StepPlan: what one call of `Scheduler.schedule` has put together so far."""

from __future__ import annotations

from mm_core.scheduler.sequence import EncodeItem, ScheduledSequence, Sequence


class StepPlan:
    """A step in the making.

    singles, chunks: sequences with one token, with more. promised: blocks that running sequences still
    want for their prompts, and one more each: who is admitted without regard to them is admitted only
    to preempt or be preempted. rows_closed: somebody waits for room in the encoder cache, budget_closed:
    for encoder budget; those behind take no more of it, or its turn would never come. ahead: running
    sequences with media still before them.
    """

    def __init__(self, step: int, tokens: int, encoder_budget: int) -> None:
        self.step = step
        self.tokens_left = tokens
        self.encoder_left = encoder_budget
        self.singles: list[ScheduledSequence] = []
        self.chunks: list[ScheduledSequence] = []
        self.encode: list[EncodeItem] = []
        self.promised = 0
        self.rows_closed = False
        self.budget_closed = False
        self.ahead: list[Sequence] = []

    @property
    def sequences(self) -> tuple[ScheduledSequence, ...]:
        """All that runs, one-token sequences first."""
        return (*self.singles, *self.chunks)

    def fits_budget(self, cost: int, planned: int) -> bool:
        """Whether an item may be encoded beside `planned` cost units of others. One over the whole budget
        runs alone."""
        return not (planned or self.encode) or (not self.budget_closed and cost <= self.encoder_left - planned)
