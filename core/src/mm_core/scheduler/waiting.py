"""WaitingQueue: sequences that do not run, in order of arrival, and in the order the policy likes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import islice

from mm_core.scheduler.policy import Candidate, WaitingPolicy
from mm_core.scheduler.sequence import Sequence


class WaitingQueue:
    """Adding, removing and putting back cost the same however long it is.

    window: the policy is shown so many, which bounds the work on very long queues; ageing cannot
    starve what enters the window in order. measure: what sequences are to the policy in a step.
    """

    def __init__(
        self, policy: WaitingPolicy, window: int, measure: Callable[[list[Sequence], int], list[Candidate]]
    ) -> None:
        self.num_with_media = 0
        self._policy = policy
        self._window = window
        self._measure = measure
        self._queue: OrderedDict[int, Sequence] = OrderedDict()
        self._order: list[Sequence] | None = []  # as of the last look; None after somebody came

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._queue.values())

    def append(self, seq: Sequence) -> None:
        """Queue a sequence."""
        self._queue[seq.seq_id] = seq
        self._order = None
        self.num_with_media += bool(seq.media)

    def put_back(self, seq: Sequence) -> None:
        """Queue a preempted sequence before all others."""
        self.append(seq)
        self._queue.move_to_end(seq.seq_id, last=False)

    def remove(self, seq: Sequence) -> None:
        """Take a sequence out."""
        del self._queue[seq.seq_id]
        if not self._queue:
            self._order = []  # nothing is held of who left
        self.num_with_media -= bool(seq.media)

    def ordered(self, step: int) -> list[Sequence]:
        """The window in the policy's order."""
        window = list(islice(self._queue.values(), self._window))
        self._order = [window[i] for i in self._policy(self._measure(window, step))]
        return self._order

    def last_order(self, step: int) -> Iterator[Sequence]:
        """As `ordered`, but what was cached or aged since the last look counts only if somebody came."""
        order = self.ordered(step) if self._order is None else self._order
        return (s for s in order if s.seq_id in self._queue)
