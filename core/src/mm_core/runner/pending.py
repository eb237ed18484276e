"""Tokens on their way to the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mm_core.errors import MMError
from mm_core.runner.logprobs import LogprobPart
from mm_core.runner.processors import Processing
from mm_core.types import Logprob

DEPTH = 4  # launches whose tokens may be on their way: an overlapped loop has two


@dataclass(frozen=True)
class SampledTokens:
    """What a step drew, on the host, a row at a time.

    logprobs: for each row that asked, the chosen token first, then the best ones in order; None for
    rows that did not ask or whose logits are broken. finite: False where the logits hold NaN or
    +inf or are all -inf: the row's token is then in range but means nothing, and its request has to
    fail. faults: rows whose logits processors failed; their tokens mean nothing either.
    """

    token_ids: list[int]
    logprobs: list[dict[int, Logprob] | None]
    finite: list[bool]
    faults: Mapping[int, MMError] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """What a launch brings beside tokens, in this order: log-probabilities, and the best scores of the rows that
    processors changed. faults: rows that failed already."""

    logprobs: Sequence[LogprobPart] = ()
    processing: Processing | None = None
    faults: Mapping[int, MMError] = field(default_factory=dict)


class PendingSample:
    """Tokens of one launch."""

    def __init__(self, out: Tensor, tables: Tensor | None, asked: Asked, event: torch.cuda.Event | None) -> None:
        """out: int64 [2, R] on the host, ids and flags. tables: what was asked for, one after another, int64
        on the host. Both are there when the event has happened."""
        self._out = out
        self._tables = tables
        self._asked = asked
        self._event = event
        self._collected: SampledTokens | None = None

    @property
    def failed(self) -> bool:
        """Whether some rows are known to have failed, before anything has arrived."""
        return bool(self._asked.faults)

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
        faults = dict(self._asked.faults)
        tables = np.empty(0, np.int64) if self._tables is None else self._tables.numpy()
        at = 0
        for part in self._asked.logprobs:
            found = part.read(tables[at : at + part.size])
            for row, table in zip(part.rows, found, strict=True):
                logprobs[row] = table if flags[row] else None
            at += part.size
        processing = self._asked.processing
        if processing is not None:
            usable = np.isfinite(tables[at : at + len(processing.rows)].view(np.float64)).tolist()
            for place, row in enumerate(processing.rows):
                if flags[row] and not usable[place]:  # else the fault is the model's own
                    faults.setdefault(row, processing.unusable(place))
        return SampledTokens(token_ids, logprobs, [flag != 0 for flag in flags], faults)


class Outbox:
    """Host memory that kernels read noise keys from and write tokens to, for a few launches in turn.

    On a GPU it is pinned: a launch then needs no copy in either direction.
    """

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._trays = [Tray(max_rows, self._on_gpu) for _ in range(DEPTH)]
        self._turn = 0

    def next(self, rows: int) -> Tray:
        """The tray of the next launch. Its last tokens are collected first if nobody did, so that nothing
        on the device writes to it any more."""
        self._turn = (self._turn + 1) % DEPTH
        tray = self._trays[self._turn]
        if tray.pending is not None:
            tray.pending.collect()
            tray.pending = None
        tray.use(rows)
        return tray


class Tray:
    """Memory of one launch. keys: int64 [R]; out: int64 [2, R]."""

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

    def send(self, tables: Tensor | None, asked: Asked) -> PendingSample:
        """All work of a launch is enqueued: its tokens will be here, and the tables too."""
        if tables is not None and tables.is_cuda:
            there = torch.empty(tables.shape, dtype=tables.dtype, pin_memory=True)
            tables = there.copy_(tables, non_blocking=True)
        if self._event is not None:
            self._event.record()
        self.pending = PendingSample(self.out, tables, asked, self._event)
        return self.pending
