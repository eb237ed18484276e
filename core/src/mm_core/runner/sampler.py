"""From logits to tokens, for all rows of a step at once, without waiting for the device.

A row's tokens depend on nothing but its own logits, parameters, seed and step, to the last bit.
Hence no floating-point sum over the vocabulary: how a device orders such a sum may change with
the number of rows or with a row's alignment in memory. Sums are taken over integers instead
(`weights`), which no order can change.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mm_core.errors import MMError
from mm_core.kernels import sample
from mm_core.kernels.random import stream_keys
from mm_core.runner.columns import Column, Columns
from mm_core.runner.draw import DrawPart, Rules, edits, filters, temperature
from mm_core.runner.guidance import Follower, Guidance
from mm_core.runner.history import OutputTable, TokenHistory
from mm_core.runner.logprobs import LogprobPart
from mm_core.runner.pending import Asked, Outbox, PendingSample, SampledTokens, Tray
from mm_core.runner.processors import Processing

if TYPE_CHECKING:
    from mm_core.config import SamplingParams
    from mm_core.structured.matcher import Matcher

__all__ = ["PendingSample", "SampledTokens", "Sampler", "SamplingRow"]


class SamplingRow(NamedTuple):
    """One row of a step: which token is drawn, and by what rules.

    step: 0-based index of the output token to be drawn; it counts those in flight. prompt_token_ids,
    output_token_ids: what came before it, as far as the host knows, which is all but one token at
    most; read only where `params.reads_tokens` and the sampler does not know them (`Sampler.knows`), and
    may be empty elsewhere; but logits processors are told the prompt at every step. stop_token_ids: eos
    and stop ids, masked while the output is shorter than `min_tokens`. Token ids outside the vocabulary of
    the logits have no effect.
    slot: its place in the runner's tables, another for each row of a launch. owner: names a sequence
    between two preemptions, so that what is kept under the slot is nobody else's. grammar: what the row's answer
    follows; it is told of tokens that are on their way, and masks the stop tokens itself.
    """

    params: SamplingParams
    seed: int
    step: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    stop_token_ids: frozenset[int]
    slot: int
    owner: tuple[int, int]
    grammar: Matcher | None = None

    @property
    def masks_stops(self) -> bool:
        """Whether stop tokens may not be drawn yet."""
        return self.step < self.params.min_tokens and bool(self.stop_token_ids) and self.grammar is None


@dataclass(frozen=True)
class _Plan:
    """How a batch is sampled: the same at every step until its members or their masks change.

    temperatures: float32 [R], those of `parts` too; first_temperatures: with 0 for those, whose tokens
    are chosen later. random: the rows with noise.
    """

    params: list[SamplingParams]
    slots: list[int]
    masked: Mapping[int, frozenset[int]]
    every: Column
    slot_index: Column
    temperature_column: Column
    first_temperature_column: Column
    first_random: bool
    parts: list[DrawPart]
    asked: list[LogprobPart]
    processing: Processing | None
    guidance: Guidance | None
    random: list[int]
    penalised: list[int]
    penalised_slots: Column
    penalised_places: Column

    def fits(self, rows: Sequence[SamplingRow]) -> bool:
        same = len(rows) == len(self.params) and all(map(operator.is_, self.params, (row.params for row in rows)))
        return same and self.slots == [row.slot for row in rows] and self.masked == _masked(rows)

    @cached_property
    def temperatures(self) -> Tensor:
        return self.temperature_column.tensor.to(torch.float32)

    @cached_property
    def first_temperatures(self) -> Tensor:
        return self.first_temperature_column.tensor.to(torch.float32)


class Sampler:
    """Draws one token a row.

    Order: log-probabilities of the raw logits; logit bias; logits processors; min_tokens mask;
    repetition, frequency and presence penalties; the mask of a grammar; temperature; top-k; top-p; min-p; draw.
    Ties go to the lowest token id.
    last_ids: int64 [max_num_seqs] on the device, the newest token drawn for each slot.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self.last_ids = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._vocab = vocab_size
        self._history = TokenHistory(vocab_size, device)
        self._outputs = OutputTable(device)
        self._outbox = Outbox(max_num_seqs, device)
        self.follower = Follower(device)
        self._state = sample.new_state(max_num_seqs, device)
        self._chunk_rows = max(1, sample.MAX_CHUNK_ELEMENTS // vocab_size)
        # The kernels need fewer bytes an element than torch's operations do.
        self._part_rows = self._chunk_rows * 4 if device.type == "cuda" else self._chunk_rows
        self._plan: _Plan | None = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # launches may be on another stream than this one

    @torch.no_grad()
    def launch(self, logits: Tensor, rows: Sequence[SamplingRow]) -> PendingSample:
        """Start drawing from `logits` [R, V], of any floating dtype, which stay as they are. Where rows follow a
        grammar, this waits for their tokens of the launch before; what is in flight then goes on."""
        assert logits.shape == (len(rows), self._vocab), "one SamplingRow a row of logits"
        plan = self._plan
        if plan is None or not plan.fits(rows):
            plan = self._plan = self._make_plan(rows)
        tray = self._outbox.next(len(rows))
        if plan.random:
            seeds, steps = [rows[i].seed for i in plan.random], [rows[i].step for i in plan.random]
            tray.keys.numpy()[plan.random] = stream_keys(seeds, steps)
        if plan.penalised:
            self._history.refresh([rows[i] for i in plan.penalised], self.last_ids)
        if plan.processing is not None:
            plan.processing.begin(rows, self.last_ids)
        if plan.guidance is not None:
            plan.guidance.begin(rows)
        peaks = self._choose(logits, plan, rows, tray)
        if plan.penalised:
            self._history.add(plan.penalised_places.tensor, self.last_ids[plan.penalised_slots.tensor])
        if plan.processing is not None:
            plan.processing.end(self.last_ids)
        tables = peaks
        if plan.asked:
            token_ids = self.last_ids[plan.slot_index.tensor]
            tables = [part.tables(logits, token_ids) for part in plan.asked] + peaks
        faults: dict[int, MMError] = {} if plan.processing is None else {**plan.processing.faults}
        if plan.guidance is not None:
            faults |= plan.guidance.faults
        table = torch.cat(tables) if len(tables) > 1 else tables[0] if tables else None
        pending = tray.send(table, Asked(plan.asked, plan.processing, faults))
        self.follower.note(plan.guidance, rows, pending)
        return pending

    def knows(self, slot: int, owner: tuple[int, int], step: int) -> bool:
        """Whether a row with these needs no output token ids: the tables that its parameters need are up to date."""
        tables = [table for table in (self._history, self._outputs) if table.has(slot)]
        return bool(tables) and all(table.knows(slot, owner, step) for table in tables)

    def release(self, slot: int) -> None:
        """Forget what is kept for the sequence that leaves the slot."""
        if any([self._history.release(slot), self._outputs.release(slot)]):
            self._plan = None  # it may name rows of the tables

    def keep(self, slots: Sequence[int]) -> None:
        """Forget what is kept for all others; a sequence that misses a step has it written anew."""
        if any([self._history.keep(slots), self._outputs.keep(slots)]):
            self._plan = None

    def _choose(self, logits: Tensor, plan: _Plan, rows: Sequence[SamplingRow], tray: Tray) -> list[Tensor]:
        """First a token for every row, with which it is known whether its logits are usable; then again for
        rows that need more. The best scores that processors left, if there are any."""
        launch = sample.Launch(plan.slot_index.tensor, tray.keys, tray.out, self.last_ids, self._state)
        every, first = plan.every.tensor, plan.first_temperatures
        sample.choose_tokens(logits, every, first, launch, random=plan.first_random)
        peaks = []
        for part in plan.parts:
            scores = part.scores(logits, rows)
            if part.processing is not None:
                peaks.append(part.processing.peaks(scores))
            sample.choose_tokens(
                scores,
                part.index.tensor,
                plan.temperatures,
                launch,
                part.filters,
                edited=part.edited,
                random=part.random,
            )
        return peaks

    def _make_plan(self, rows: Sequence[SamplingRow]) -> _Plan:
        columns = Columns()
        processed = [i for i, row in enumerate(rows) if row.params.logits_processors]
        edited = [i for i, row in enumerate(rows) if edits(row) and not row.params.logits_processors]
        later = {*processed, *edited}
        filtered = [i for i, row in enumerate(rows) if i not in later and filters(row, self._vocab)]
        asked = [i for i, row in enumerate(rows) if row.params.best_logprobs is not None]
        penalised = [i for i, row in enumerate(rows) if row.params.penalised]
        temperatures = [temperature(row.params) for row in rows]
        later |= {*filtered}
        first = [0.0 if i in later else t for i, t in enumerate(temperatures)]
        guided = [i for i, row in enumerate(rows) if row.grammar is not None]
        guidance = Guidance(guided, self.follower) if guided else None
        # Those of processors in one piece, however many they are: each is called once a step.
        processing = Processing(processed, rows, self._outputs, columns) if processed else None
        kept = (self._vocab, self._history, columns)
        parts = [DrawPart(processed, rows, *kept, Rules(processing, guidance))] if processed else []
        parts += [
            DrawPart(part, rows, *kept, Rules(guidance=guidance))
            for kind in (edited, filtered)
            for part in _chunks(kind, self._part_rows)
        ]
        plan = _Plan(
            params=[row.params for row in rows],
            slots=[row.slot for row in rows],
            masked=_masked(rows),
            every=columns.ints(range(len(rows))),
            slot_index=columns.ints([row.slot for row in rows]),
            temperature_column=columns.floats(temperatures),
            first_temperature_column=columns.floats(first),
            first_random=any(first),
            parts=parts,
            asked=[
                LogprobPart(part, [rows[i].params for i in part], self._vocab, columns)
                for part in _chunks(asked, self._chunk_rows)
            ],
            processing=processing,
            guidance=guidance,
            random=[i for i, t in enumerate(temperatures) if t],
            penalised=penalised,
            penalised_slots=columns.ints([rows[i].slot for i in penalised]),
            penalised_places=columns.ints([self._history.place(rows[i].slot) for i in penalised]),
        )
        columns.send(self.last_ids.device)
        return plan


def _masked(rows: Sequence[SamplingRow]) -> dict[int, frozenset[int]]:
    return {i: row.stop_token_ids for i, row in enumerate(rows) if row.params.min_tokens and row.masks_stops}


def _chunks(indices: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
