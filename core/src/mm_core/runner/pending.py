"""Tokens on their way to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mm_core.runner.logprobs import LogprobPart
from mm_core.types import Logprob

_DEPTH = 4  # launches whose tokens may be on their way: an overlapped loop has two


@dataclass(frozen=True)
class SampledTokens:
    """What a step drew, on the host, a row at a time.

    logprobs: for each row that asked, the chosen token first, then the best ones in order; None for
    rows that did not ask or whose logits are broken. finite: False where the logits hold NaN or
    +inf or are all -inf: the row's token is then in range but means nothing, and its request has to
    fail.
    """

    token_ids: list[int]
    logprobs: list[dict[int, Logprob] | None]
    finite: list[bool]


class PendingSample:
    """Tokens of one launch."""

    def __init__(
        self, out: Tensor, tables: Tensor | None, asked: Sequence[LogprobPart], event: torch.cuda.Event | None
    ) -> None:
        """out: int64 [2, R] on the host, ids and flags. tables: those of `asked`, one after another, int64
        on the host. Both are there when the event has happened."""
        self._out = out
        self._tables = tables
        self._asked = asked
        self._event = event
        self._collected: SampledTokens | None = None

    def collect(self) -> SampledTokens:
        """Waits until the tokens have arrived."""
        if self._collected is None:
            if self._event is not None:
                self._event.synchronize()
            self._collected = self._read()
        return self._collected

    def _read(self) -> SampledTokens:
        token_ids, flags = self._out.numpy().tolist()
        logprobs: list[dict[int, Logprob] | None] = [None] * len(token_ids)
        at = 0
        for part in self._asked:
            assert self._tables is not None
            found = part.read(self._tables[at : at + part.size].numpy())
            for row, table in zip(part.rows, found, strict=True):
                logprobs[row] = table if flags[row] else None
            at += part.size
        return SampledTokens(token_ids, logprobs, [flag != 0 for flag in flags])


class Outbox:
    """Host memory that kernels read noise keys from and write tokens to, for a few launches in turn.

    On a GPU it is pinned: a launch then needs no copy in either direction.
    """

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._trays = [_Tray(max_rows, self._on_gpu) for _ in range(_DEPTH)]
        self._turn = 0

    def next(self, rows: int) -> _Tray:
        """The tray of the next launch. Its last tokens are collected first if nobody did, so that nothing
        on the device writes to it any more."""
        self._turn = (self._turn + 1) % _DEPTH
        tray = self._trays[self._turn]
        if tray.pending is not None:
            tray.pending.collect()
            tray.pending = None
        tray.use(rows)
        return tray


class _Tray:
    """keys: int64 [R]; out: int64 [2, R]."""

    def __init__(self, max_rows: int, pinned: bool) -> None:
        self._all_keys = torch.zeros(max_rows, dtype=torch.int64, pin_memory=pinned)
        self._all_out = torch.zeros(2 * max_rows, dtype=torch.int64, pin_memory=pinned)
        self.keys = self._all_keys
        self.out = self._all_out.view(2, max_rows)
        self.pending: PendingSample | None = None
        self._event: torch.cuda.Event | None = None
        if pinned:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def use(self, rows: int) -> None:
        """Give it the size of a launch."""
        if rows != len(self.keys):
            self.keys = self._all_keys[:rows]
            self.out = self._all_out[: 2 * rows].view(2, rows)

    def send(self, tables: Tensor | None, asked: Sequence[LogprobPart]) -> PendingSample:
        """All work of a launch is enqueued: its tokens will be here, and the tables too."""
        if tables is not None and tables.is_cuda:
            there = torch.empty(tables.shape, dtype=tables.dtype, pin_memory=True)
            tables = there.copy_(tables, non_blocking=True)
        if self._event is not None:
            self._event.record()
        self.pending = PendingSample(self.out, tables, asked, self._event)
        return self.pending
