"""Outlook: how many blocks the running sequences will want at most, from how long answers have been so far.

Who is admitted without regard to that is admitted to preempt or be preempted: its prompt is computed twice.
Where answers end at different times, the peak is far below the sum of what each will want (Gong et al. 2025,
"Past-Future Scheduler").
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable

from mm_core.scheduler.sequence import Sequence

FIRST_GUESS = 128.0  # output tokens, before any answer has ended
_WEIGHT = 1 / 32  # of the latest answer in the mean


class Outlook:
    """A running mean of answers' lengths, and the future it makes likely."""

    def __init__(self, block_size: int) -> None:
        self.expected = FIRST_GUESS
        self._block_size = block_size

    def learn(self, seq: Sequence) -> None:
        """An answer has ended."""
        self.expected += (seq.num_output_tokens - self.expected) * _WEIGHT

    def future(self, running: Iterable[Sequence]) -> Future:
        """What lies before these."""
        found = Future()
        for seq in running:
            held = len(seq.tables["self"]) - (seq.num_cached_tokens or 0) // self._block_size
            found.add(*self.wants(seq), held)
        return found

    def wants(self, seq: Sequence) -> tuple[int, int]:
        """Steps until the sequence is likely to end, and blocks it wants beyond those of its known tokens, one
        at least."""
        known = len(seq.token_ids)  # the block of a token in flight may be yet to come
        final = seq.max_length
        if not seq.params.ignore_eos:
            final = min(final, seq.prompt_len + int(self.expected))
        growth = -(-final // self._block_size) - -(-known // self._block_size)
        return max(final - known, 1), max(growth, 1)


class Future:
    """Sequences in the order of their ends: steps until then, blocks wanted until then, blocks held now that
    come back."""

    def __init__(self) -> None:
        self._ends: list[tuple[int, int, int]] = []

    def add(self, steps: int, growth: int, held: int) -> None:
        """One more sequence."""
        insort(self._ends, (steps, growth, held))

    def peak(self, steps: int = 0, growth: int = 0, held: int = 0) -> int:
        """The most blocks wanted at a time beyond those in use now; with one more sequence, if given, that
        takes `held` now.

        At the moment a sequence ends, all that live on have grown by as much as it has, or, of several blocks,
        one more; those that ended before have given back what they held, unless their last step may still be in
        flight.
        """
        ends = self._ends
        if growth:
            ends = [*ends]
            insort(ends, (steps, growth, held))
        peak, back, over = 0, 0, 0
        for index, (end, grown, _) in enumerate(ends):
            while ends[over][0] < end - 1:
                back += ends[over][2]
                over += 1
            alive = len(ends) - index
            peak = max(peak, alive * grown + (alive - 1) * (grown > 1) - back)
        return peak + held if growth else peak
