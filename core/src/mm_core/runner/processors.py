"""Calling logits processors: each once a step, for all rows whose requests name an equal one."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mm_core.errors import InvalidParamsError
from mm_core.runner.columns import Column, Columns
from mm_core.runner.history import OutputTable
from mm_core.runner.memory import is_lost
from mm_core.types import LogitsProcessor, LogitsRows

if TYPE_CHECKING:
    from mm_core.runner.sampler import SamplingRow

logger = logging.getLogger(__name__)

Wanted = tuple[LogitsProcessor, ...]


def order_calls(wanted: Sequence[Wanted]) -> list[tuple[LogitsProcessor, tuple[int, ...]]]:
    """Calls that do what each row wants in its own order, one for each distinct processor where these orders
    allow it: the processor, and its rows.

    Next comes a processor that no row wants later than now; where there is none, any that a row wants now.
    """
    queues = [list(reversed(names)) for names in wanted]
    left = Counter(name for names in wanted for name in names)
    calls = []
    while left.total():
        heads: dict[LogitsProcessor, list[int]] = {}
        for row, names in enumerate(queues):
            if names:
                heads.setdefault(names[-1], []).append(row)
        chosen = next((name for name, rows in heads.items() if len(rows) == left[name]), next(iter(heads)))
        for row in heads[chosen]:
            queues[row].pop()
        left[chosen] -= len(heads[chosen])
        calls.append((chosen, tuple(heads[chosen])))
    return calls


@dataclass(frozen=True)
class _Group:
    """Rows that share calls: where they stand among the processed ones (None: they are all of them), and where
    their tokens are in the table."""

    rows: tuple[int, ...]
    index: Column | None
    places: Column


class Processing:
    """What the logits processors of some rows of a launch do, for as long as the batch stays the same.

    rows: those rows' places in the launch. `faults`: by place in the launch, what went wrong in the last `apply`.
    """

    def __init__(self, rows: list[int], launch: Sequence[SamplingRow], table: OutputTable, columns: Columns) -> None:
        self.rows = rows
        self.faults: dict[int, InvalidParamsError] = {}
        self._table = table
        mine = [launch[i] for i in rows]
        self.names = [", ".join(map(name_of, row.params.logits_processors)) for row in mine]
        self._places = columns.ints([table.place(row.slot) for row in mine])
        self._slots = columns.ints([row.slot for row in mine])
        self._steps = [row.step for row in mine]
        self._lengths = columns.ints(self._steps)
        self._groups: dict[tuple[int, ...], _Group] = {}
        self._calls = order_calls([row.params.logits_processors for row in mine])
        for _, group in self._calls:
            if group not in self._groups:
                index = None if len(group) == len(rows) else columns.ints(group)
                places = columns.ints([table.place(mine[i].slot) for i in group])
                self._groups[group] = _Group(group, index, places)

    def begin(self, launch: Sequence[SamplingRow], last_ids: Tensor) -> None:
        """Make the table hold what comes before the tokens that are drawn now."""
        mine = [launch[i] for i in self.rows]
        steps = [row.step for row in mine]
        if steps != self._steps:  # another sequence than the one before it has a slot
            columns = Columns()
            self._steps, self._lengths = steps, columns.ints(steps)
            columns.send(last_ids.device)
        self._table.reserve(max(steps) + 1)
        self._table.refresh(mine, last_ids)

    def end(self, last_ids: Tensor) -> None:
        """Add the tokens that were drawn."""
        self._table.add(self._places.tensor, self._lengths.tensor, last_ids[self._slots.tensor])
        self._steps = [step + 1 for step in self._steps]
        self._lengths.tensor = self._lengths.tensor + 1  # a new one: a processor may have kept the old one

    def apply(self, scores: Tensor, launch: Sequence[SamplingRow]) -> None:
        """Call the processors on float32 [n, V], changed in place."""
        self.faults = {}
        seen = {rows: self._logits_rows(group, launch) for rows, group in self._groups.items()}
        for processor, rows in self._calls:
            index = self._groups[rows].index
            given = scores if index is None else scores.index_select(0, index.tensor)
            try:
                changed = _checked(processor(given, seen[rows]), given)
            except Exception as error:
                if is_lost(error):
                    raise
                self._fail(processor, rows, error)
                continue
            if index is not None:
                scores.index_copy_(0, index.tensor, changed)
            elif changed is not given:  # a copy: what it returned may be its own, and is changed later
                scores.copy_(changed)

    def peaks(self, scores: Tensor) -> Tensor:
        """The bits of the rows' best scores as float64, int64 [n]: not finite where nothing can be drawn."""
        return scores.amax(dim=-1).to(torch.float64).view(torch.int64)

    def unusable(self, at: int) -> InvalidParamsError:
        """The error of the `at`-th row, which nothing can be drawn from."""
        return InvalidParamsError(
            f"After the logits processors ({self.names[at]}) no token could be drawn: all logits were -inf, or some "
            "were NaN or +inf. Let at least one token keep a finite logit.",
            param="logits_processors",
        )

    def _logits_rows(self, group: _Group, launch: Sequence[SamplingRow]) -> LogitsRows:
        rows = [launch[self.rows[i]] for i in group.rows]
        counts = [row.step for row in rows]
        ids = self._table.rows(group.places.tensor, max(1, *counts))
        lengths = self._lengths.tensor if group.index is None else self._lengths.tensor[group.index.tensor]
        return LogitsRows([tuple(row.prompt_token_ids) for row in rows], ids, counts, lengths)

    def _fail(self, processor: LogitsProcessor, rows: tuple[int, ...], error: Exception) -> None:
        name, refused = name_of(processor), isinstance(error, _RefusedError)
        if not refused:
            logger.warning("logits processor %s failed", name, exc_info=error)
        what = str(error) if refused else f"failed with {type(error).__name__}"
        for row in rows:
            fault = InvalidParamsError(
                f"Logits processor {name} {what}. Correct it, or leave it out of SamplingParams.logits_processors.",
                param="logits_processors",
            )
            fault.__cause__ = None if refused else error
            self.faults.setdefault(self.rows[row], fault)


class _RefusedError(Exception):
    """What a processor returned cannot be used; the text says why."""


def _checked(changed: object, given: Tensor) -> Tensor:
    if not isinstance(changed, Tensor):
        raise _RefusedError(f"returned a {type(changed).__name__} where a tensor is wanted")
    found = (list(changed.shape), changed.dtype, changed.device)
    wanted = (list(given.shape), given.dtype, given.device)
    if found != wanted:
        shown = [f"{shape} {str(dtype).removeprefix('torch.')} on {device}" for shape, dtype, device in (found, wanted)]
        raise _RefusedError(f"returned {shown[0]} for {shown[1]}")
    return changed


def name_of(processor: object) -> str:
    """A processor's name for people."""
    return str(getattr(processor, "__name__", None) or type(processor).__name__)[:80]
