"""Masks of the rows whose answers follow a grammar, made while the forward pass runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mm_core.errors import MMError
from mm_core.kernels.grammar_mask import mask_
from mm_core.runner.pending import DEPTH, PendingSample
from mm_core.structured.matcher import Matcher, clear_tokens, fill_masks

if TYPE_CHECKING:
    from mm_core.runner.sampler import SamplingRow

Owner = tuple[int, int]


class _Drawn(NamedTuple):
    """The newest launch with rows that follow a grammar: where these stand in it."""

    rows: dict[Owner, int]
    pending: PendingSample


class Follower:
    """What outlives a batch: host memory for masks, and the tokens that matchers have yet to be told.

    On a GPU that memory is pinned; a piece is used again when the launch that copied from it was collected.
    waiting: entered around the wait for tokens on their way to the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.waiting: Callable[[], AbstractContextManager[None]] = nullcontext
        self._buffers = [torch.empty(0, 0, dtype=torch.int32)] * (DEPTH + 1)
        self._turn = 0
        self._drawn: _Drawn | None = None

    def buffer(self, rows: int, words: int) -> Tensor:
        """int32 [rows, words] on the host."""
        self._turn = (self._turn + 1) % len(self._buffers)
        held = self._buffers[self._turn]
        if held.shape[0] < rows or held.shape[1] != words:
            size = 1 << (rows - 1).bit_length()
            held = torch.empty(size, words, dtype=torch.int32, pin_memory=self.device.type == "cuda")
            self._buffers[self._turn] = held
        return held[:rows]

    def rehearse(self, vocab_size: int) -> None:
        """Run what a launch would, so that it is compiled."""
        index = torch.zeros(1, dtype=torch.int64, device=self.device)
        masks = torch.zeros(1, -(-vocab_size // 32), dtype=torch.int32, device=self.device)
        mask_(torch.zeros(1, vocab_size, device=self.device), index, masks, index)

    def note(self, guidance: Guidance | None, launch: Sequence[SamplingRow], pending: PendingSample) -> None:
        """A launch was sent."""
        self._drawn = None if guidance is None else _Drawn({launch[i].owner: i for i in guidance.rows}, pending)

    def catch_up(self, rows: Sequence[SamplingRow]) -> None:
        """Bring matchers to where their next token is drawn. Those of a sequence that was preempted go back; for a
        token that is on its way from the launch before, this waits."""
        late = []
        for row in rows:
            matcher = _matcher_of(row)
            if matcher.length > row.step:
                matcher.rewind(row.step)
            if matcher.length < row.step and matcher.open:
                late.append(row)
        if not late:
            return
        drawn = self._drawn
        tokens: Sequence[int] = ()
        if drawn is not None:
            with self.waiting():
                tokens = drawn.pending.collect().token_ids
        for row in late:
            matcher = _matcher_of(row)
            at = None if drawn is None else drawn.rows.get(row.owner)
            if at is None or matcher.length + 1 != row.step:
                matcher.fail("its tokens were lost, which is a bug")
            else:
                matcher.accept(matcher.length, tokens[at])


class Guidance:
    """The rows of a launch that follow a grammar, for as long as the batch stays the same.

    rows: their places in the launch, ascending. `faults`: by place in the launch, whose grammar cannot be followed.
    """

    def __init__(self, rows: list[int], follower: Follower) -> None:
        self.rows = rows
        self.faults: dict[int, MMError] = {}
        self._places = {row: place for place, row in enumerate(rows)}
        self._follower = follower
        self._masks = torch.empty(0)

    def begin(self, launch: Sequence[SamplingRow]) -> None:
        """Make the masks of the tokens that are drawn now, and start their copy."""
        mine = [launch[i] for i in self.rows]
        follower = self._follower
        follower.catch_up(mine)
        matchers = [_matcher_of(row) for row in mine]
        host = follower.buffer(len(mine), matchers[0].compiled.library.mask_words)
        masks = host.numpy()
        fill_masks(matchers, masks)
        for row, matcher, mask in zip(mine, matchers, masks, strict=True):
            if row.step < row.params.min_tokens and matcher.open:
                clear_tokens(mask, row.stop_token_ids)
        self.faults = {i: m.error for i, m in zip(self.rows, matchers, strict=True) if m.error is not None}
        self._masks = host.to(follower.device, non_blocking=True)

    def places(self, rows: Sequence[int]) -> list[int]:
        """Which of the masks are those of some places in the launch."""
        return [self._places[row] for row in rows]

    def apply(self, scores: Tensor, rows: Tensor, places: Tensor) -> None:
        """Mask some rows of scores, float32 [n, V]. places: int64, which of the masks."""
        mask_(scores, rows, self._masks, places)


def _matcher_of(row: SamplingRow) -> Matcher:
    assert row.grammar is not None
    return row.grammar
