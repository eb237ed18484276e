"""Tables on the device of the tokens that sequences have had, for penalties.

The newest token of a sequence may not have reached the host when its next step is launched. So the
host writes a sequence's tokens once, when it first sees it, and every launch counts what it draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mm_core.kernels.penalties import IN_PROMPT
from mm_core.runner.columns import Columns

if TYPE_CHECKING:
    from mm_core.runner.sampler import SamplingRow

_FIRST_CAPACITY = 8


@dataclass
class _Entry:
    """A slot's row of the table: whose tokens it holds, and how many output tokens they are."""

    place: int
    owner: tuple[int, int] | None = None
    step: int = 0


class TokenHistory:
    """Which tokens occur in a sequence's prompt, and how often in its output, by slot.

    One int32 row of the vocabulary's size for each slot that asks, from a pool that doubles as it
    needs to and is given back when nobody uses it.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab = vocab_size
        self._device = device
        self._table = torch.empty((0, vocab_size), dtype=torch.int32, device=device)
        self._entries: dict[int, _Entry] = {}
        self._free: list[int] = []

    @property
    def capacity(self) -> int:
        """Rows allocated."""
        return len(self._table)

    def knows(self, slot: int, owner: tuple[int, int], step: int) -> bool:
        """Whether the slot's row holds what `owner` had before output token `step`."""
        entry = self._entries.get(slot)
        return entry is not None and entry.owner == owner and entry.step == step

    def place(self, slot: int) -> int:
        """The slot's row in the table, which it keeps until it is released."""
        if slot not in self._entries:
            if not self._free:
                self._grow()
            self._entries[slot] = _Entry(self._free.pop())
        return self._entries[slot].place

    def release(self, slot: int) -> bool:
        """Give the slot's row back; whether it had one."""
        entry = self._entries.pop(slot, None)
        if entry is None:
            return False
        self._free.append(entry.place)
        if not self._entries:
            self._free = []
            self._table = self._table.new_empty((0, self._vocab))
        return True

    def keep(self, slots: Sequence[int]) -> bool:
        """Give back the rows of all other slots; whether there was one."""
        others = self._entries.keys() - set(slots) if self._entries else ()
        for slot in list(others):
            self.release(slot)
        return bool(others)

    def refresh(self, rows: Sequence[SamplingRow], last_ids: Tensor) -> None:
        """Make the rows hold what comes before the token that is drawn now, and expect that token.

        A row that its slot's entry does not continue is written anew; an output token that the host
        does not know yet is the slot's one of `last_ids`.
        """
        new = [row for row in rows if not self.knows(row.slot, row.owner, row.step)]
        if new:
            self._write(new, last_ids)
        for row in rows:
            entry = self._entries[row.slot]
            entry.owner, entry.step = row.owner, row.step + 1

    @property
    def counts(self) -> Tensor:
        """The table: int32 [capacity, V], as `mm_core.kernels.penalties` takes it."""
        return self._table

    def add(self, places: Tensor, token_ids: Tensor) -> None:
        """Count one more output token for each of some rows of the table."""
        at = places * self._vocab + token_ids
        self._table.view(-1).scatter_add_(0, at, torch.ones_like(at, dtype=torch.int32))

    def _grow(self) -> None:
        used = len(self._table)
        capacity = max(2 * used, _FIRST_CAPACITY)
        table = torch.zeros((capacity, self._vocab), dtype=torch.int32, device=self._device)
        table[:used] = self._table
        self._table = table
        self._free = list(range(used, capacity))[::-1]

    def _write(self, rows: Sequence[SamplingRow], last_ids: Tensor) -> None:
        columns = Columns()
        places = columns.ints([self._entries[row.slot].place for row in rows])
        prompt = columns.ints(self._flat(rows, [row.prompt_token_ids for row in rows]))
        output = columns.ints(self._flat(rows, [row.output_token_ids for row in rows]))
        assert all(0 <= row.step - len(row.output_token_ids) <= 1 for row in rows), "at most one token is in flight"
        unknown = [row for row in rows if row.step > len(row.output_token_ids)]
        slots = columns.ints([row.slot for row in unknown])
        theirs = columns.ints([self._entries[row.slot].place for row in unknown])
        columns.send(self._device)
        flat = self._table.view(-1)
        self._table.index_fill_(0, places.tensor, 0)
        flat.index_fill_(0, prompt.tensor, IN_PROMPT)
        flat.scatter_add_(0, output.tensor, torch.ones_like(output.tensor, dtype=torch.int32))
        if unknown:
            self.add(theirs.tensor, last_ids[slots.tensor])

    def _flat(self, rows: Sequence[SamplingRow], token_ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Places in the flattened table, int64; ids outside the vocabulary are left out."""
        found = [np.empty(0, np.int64)]
        for row, given in zip(rows, token_ids, strict=True):
            ids = np.asarray(given, np.int64)
            inside = ids[(ids >= 0) & (ids < self._vocab)]
            found.append(inside + self._entries[row.slot].place * self._vocab)
        return np.concatenate(found)
