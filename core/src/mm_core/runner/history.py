"""Tables on the device of the tokens that sequences have had: counted, for penalties; in order, for processors.

The newest token of a sequence may not have reached the host when its next step is launched. So the
host writes a sequence's tokens once, when it first sees it, and every launch adds what it draws.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mm_core.kernels.penalties import IN_PROMPT
from mm_core.runner.columns import Column, Columns

if TYPE_CHECKING:
    from mm_core.runner.sampler import SamplingRow

_FIRST_CAPACITY = 8
_FIRST_LENGTH = 64


@dataclass
class _Entry:
    """A slot's row of the table: whose tokens it holds, and how many output tokens they are."""

    place: int
    owner: tuple[int, int] | None = None
    step: int = 0


class SlotTable(ABC):
    """A row on the device for each slot that asks, from a pool that doubles as it needs to and is given back
    when nobody uses it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._entries: dict[int, _Entry] = {}
        self._free: list[int] = []

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Rows allocated."""

    @abstractmethod
    def _resize(self, capacity: int) -> None:
        """Allocate so many rows; those that are there keep what they hold."""

    @abstractmethod
    def _write(self, rows: Sequence[SamplingRow], given: _Given, last_ids: Tensor) -> None:
        """Write the tokens of rows anew."""

    def has(self, slot: int) -> bool:
        """Whether the slot has a row."""
        return slot in self._entries

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
            self._resize(0)
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
            self._write(new, _Given(self, new), last_ids)
        for row in rows:
            entry = self._entries[row.slot]
            entry.owner, entry.step = row.owner, row.step + 1

    def _grow(self) -> None:
        used = self.capacity
        self._resize(max(2 * used, _FIRST_CAPACITY))
        self._free = list(range(used, self.capacity))[::-1]


class _Given:
    """Columns of what the host knows of rows: their places in a table; and place and slot of those with a token
    in flight."""

    def __init__(self, table: SlotTable, rows: Sequence[SamplingRow]) -> None:
        assert all(0 <= row.step - len(row.output_token_ids) <= 1 for row in rows), "at most one token is in flight"
        self.in_flight = [row for row in rows if row.step > len(row.output_token_ids)]
        self.columns = Columns()
        self.places = self.columns.ints([table.place(row.slot) for row in rows])
        self.unknown_places = self.columns.ints([table.place(row.slot) for row in self.in_flight])
        self.unknown_slots = self.columns.ints([row.slot for row in self.in_flight])

    def unknown(self, last_ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """Places of rows with a token in flight, and these tokens; once the columns were sent."""
        if not len(self.unknown_slots):
            return None
        return self.unknown_places.tensor, last_ids[self.unknown_slots.tensor]


class TokenHistory(SlotTable):
    """Which tokens occur in a sequence's prompt, and how often in its output: int32 rows of the vocabulary's size."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        super().__init__(device)
        self._vocab = vocab_size
        self._table = torch.empty((0, vocab_size), dtype=torch.int32, device=device)

    @property
    def capacity(self) -> int:
        """Rows allocated."""
        return len(self._table)

    @property
    def counts(self) -> Tensor:
        """The table: int32 [capacity, V], as `mm_core.kernels.penalties` takes it."""
        return self._table

    def add(self, places: Tensor, token_ids: Tensor) -> None:
        """Count one more output token for each of some rows of the table."""
        at = places * self._vocab + token_ids
        self._table.view(-1).scatter_add_(0, at, torch.ones_like(at, dtype=torch.int32))

    def _resize(self, capacity: int) -> None:
        self._table = _larger(self._table, (capacity, self._vocab), 0)

    def _write(self, rows: Sequence[SamplingRow], given: _Given, last_ids: Tensor) -> None:
        prompt = given.columns.ints(self._flat(rows, [row.prompt_token_ids for row in rows]))
        output = given.columns.ints(self._flat(rows, [row.output_token_ids for row in rows]))
        given.columns.send(self._device)
        flat = self._table.view(-1)
        self._table.index_fill_(0, given.places.tensor, 0)
        flat.index_fill_(0, prompt.tensor, IN_PROMPT)
        flat.scatter_add_(0, output.tensor, torch.ones_like(output.tensor, dtype=torch.int32))
        unknown = given.unknown(last_ids)
        if unknown is not None:
            self.add(*unknown)

    def _flat(self, rows: Sequence[SamplingRow], token_ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Places in the flattened table, int64; ids outside the vocabulary are left out."""
        found = [np.empty(0, np.int64)]
        for row, given in zip(rows, token_ids, strict=True):
            ids = np.asarray(given, np.int64)
            inside = ids[(ids >= 0) & (ids < self._vocab)]
            found.append(inside + self._entries[row.slot].place * self._vocab)
        return np.concatenate(found)


class OutputTable(SlotTable):
    """Output tokens of sequences in order: int64 rows, -1 beyond their ends, as long as the longest needs."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._table = torch.empty((0, 0), dtype=torch.int64, device=device)

    @property
    def capacity(self) -> int:
        """Rows allocated."""
        return len(self._table)

    def rows(self, places: Tensor, longest: int) -> Tensor:
        """Output token ids [n, longest] of some rows of the table."""
        return self._table[:, :longest].index_select(0, places)

    def reserve(self, length: int) -> None:
        """Make room for so many tokens a row."""
        width = self._table.shape[1]
        if length > width:
            wide = max(length, 2 * width, _FIRST_LENGTH)
            self._table = _larger(self._table, (self.capacity, wide), -1)

    def add(self, places: Tensor, lengths: Tensor, token_ids: Tensor) -> None:
        """One more output token for each of some rows of the table, which have `lengths` so far, and room."""
        self._table.view(-1).scatter_(0, torch.add(lengths, places, alpha=self._table.shape[1]), token_ids)

    def _resize(self, capacity: int) -> None:
        width = self._table.shape[1] if capacity else 0
        self._table = _larger(self._table, (capacity, width), -1)

    def _write(self, rows: Sequence[SamplingRow], given: _Given, last_ids: Tensor) -> None:
        counts = [len(row.output_token_ids) for row in rows]
        places = [self._entries[row.slot].place for row in rows]
        flat: list[Column] = [
            given.columns.ints(np.repeat(np.asarray(places, np.int64), counts)),
            given.columns.ints(np.concatenate([np.arange(count) for count in counts])),
            given.columns.ints(np.concatenate([np.asarray(row.output_token_ids, np.int64) for row in rows])),
        ]
        lengths = given.columns.ints([len(row.output_token_ids) for row in given.in_flight])
        given.columns.send(self._device)
        self._table.index_fill_(0, given.places.tensor, -1)
        at, within, ids = (column.tensor for column in flat)
        self._table[at, within] = ids
        unknown = given.unknown(last_ids)
        if unknown is not None:
            self.add(unknown[0], lengths.tensor, unknown[1])


def _larger(table: Tensor, shape: tuple[int, ...], empty: int) -> Tensor:
    """A table of that shape with the old one's cells in its first corner, as many as fit."""
    new = table.new_full(shape, empty)
    corner = tuple(slice(0, min(a, b)) for a, b in zip(shape, table.shape, strict=True))
    new[corner] = table[corner]
    return new
