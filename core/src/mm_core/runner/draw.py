"""What the parameters of rows do to their logits, beside temperature and noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mm_core.kernels.penalties import penalise_
from mm_core.kernels.sample import Filters
from mm_core.runner.columns import Column, Columns
from mm_core.runner.guidance import Guidance
from mm_core.runner.history import TokenHistory
from mm_core.runner.processors import Processing

if TYPE_CHECKING:
    from mm_core.config import SamplingParams
    from mm_core.runner.sampler import SamplingRow

MIN_TEMPERATURE = 1e-2


@dataclass(frozen=True)
class _Operation:
    """Something done in place to the scores [n, V] of a part, with columns of numbers."""

    run: Callable[..., None]
    columns: tuple[Column, ...]

    def apply(self, scores: Tensor) -> None:
        self.run(scores, *(column.tensor for column in self.columns))


@dataclass(frozen=True)
class Rules:
    """What some rows are subject to beside their parameters: what their logits processors do, and grammars that some
    of them follow."""

    processing: Processing | None = None
    guidance: Guidance | None = None


_NO_RULES = Rules()


class DrawPart:
    """Rows of a launch that the argmax of their logits, with or without noise, is not enough for.

    index: where they stand in the launch, on the device. Either all of them have their
    logits edited, or none.
    Made once for as long as the batch stays the same, used at every step.
    """

    def __init__(
        self,
        rows: list[int],
        launch: Sequence[SamplingRow],
        vocab: int,
        history: TokenHistory,
        columns: Columns,
        rules: Rules = _NO_RULES,
    ) -> None:
        mine = [launch[i] for i in rows]
        self.index = columns.ints(rows)
        self.random = any(not row.params.greedy for row in mine)
        self.processing = rules.processing
        self._before = _biases(mine, vocab, columns)
        self._after = [*_masks(mine, vocab, columns), *_penalties(mine, history, columns)]
        if rules.guidance is not None:  # last: nothing may undo it
            self._after += _grammars(rows, mine, rules.guidance, columns)
        self._filters = _FilterColumns([row.params for row in mine], vocab, columns)

    @property
    def edited(self) -> bool:
        """Whether the logits are not used as they are."""
        return bool(self._before or self._after) or self.processing is not None

    def scores(self, logits: Tensor, launch: Sequence[SamplingRow] = ()) -> Tensor:
        """The logits [R, V] of the launch if they are not edited, else float32 [n, V] of these rows. launch: the
        rows as they are in this step; only processors read them."""
        if not self.edited:
            return logits
        own = logits if len(self.index) == len(logits) else logits[self.index.tensor]
        scores = own.to(torch.float32, copy=own is logits)
        for operation in self._before:
            operation.apply(scores)
        if self.processing is not None:
            self.processing.apply(scores, launch)
        for operation in self._after:
            operation.apply(scores)
        return scores

    @cached_property
    def filters(self) -> Filters | None:
        """Once the columns were sent."""
        return self._filters.sent()


class _FilterColumns:
    """The numbers of `Filters` on their way to the device."""

    def __init__(self, params: Sequence[SamplingParams], vocab: int, columns: Columns) -> None:
        ks = [p.top_k if _limits(p, vocab) else vocab for p in params]
        self._largest_k = max((k for k in ks if k < vocab), default=0)
        self._top_k = columns.ints(ks)
        self._top_p = self._log_min_p = None
        if any(p.top_p < 1.0 for p in params if not p.greedy):
            self._top_p = columns.floats([1.0 if p.greedy else p.top_p for p in params])
        if any(p.min_p > 0.0 for p in params if not p.greedy):
            floored = [p.min_p > 0.0 and not p.greedy for p in params]
            logs = [math.log(p.min_p) if low else -math.inf for p, low in zip(params, floored, strict=True)]
            self._log_min_p = columns.floats(logs)

    def sent(self) -> Filters | None:
        if not self._largest_k and self._top_p is None and self._log_min_p is None:
            return None
        return Filters(
            self._top_k.tensor,
            self._largest_k,
            None if self._top_p is None else self._top_p.tensor,
            None if self._log_min_p is None else self._log_min_p.tensor.to(torch.float32),
        )


def _limits(params: SamplingParams, vocab: int) -> bool:
    return not params.greedy and 0 < params.top_k < vocab


def edits(row: SamplingRow) -> bool:
    """Whether a row's logits are changed before its temperature, by something else than a processor."""
    return bool(row.params.logit_bias) or row.masks_stops or row.params.penalised or row.grammar is not None


def filters(row: SamplingRow, vocab: int) -> bool:
    """Whether some tokens cannot be drawn."""
    p = row.params
    return not p.greedy and (_limits(p, vocab) or p.top_p < 1.0 or p.min_p > 0.0)


def temperature(params: SamplingParams) -> float:
    """What logits are divided by; 0 where the best token is taken."""
    return 0.0 if params.greedy else max(params.temperature, MIN_TEMPERATURE)


def _biases(rows: Sequence[SamplingRow], vocab: int, columns: Columns) -> list[_Operation]:
    """Logit bias."""
    biased = [
        (i, token, bias)
        for i, row in enumerate(rows)
        for token, bias in row.params.logit_bias.items()
        if 0 <= token < vocab
    ]
    if not biased:
        return []
    at, tokens, biases = zip(*biased, strict=True)
    return [_Operation(_add_bias, (columns.ints(at), columns.ints(tokens), columns.floats(biases)))]


def _masks(rows: Sequence[SamplingRow], vocab: int, columns: Columns) -> list[_Operation]:
    """The mask of stop tokens."""
    masked = [
        (i, token)
        for i, row in enumerate(rows)
        if row.masks_stops
        for token in row.stop_token_ids
        if 0 <= token < vocab
    ]
    if not masked:
        return []
    at, tokens = zip(*masked, strict=True)
    return [_Operation(_mask, (columns.ints(at), columns.ints(tokens)))]


def _penalties(rows: Sequence[SamplingRow], history: TokenHistory, columns: Columns) -> list[_Operation]:
    at = [i for i, row in enumerate(rows) if row.params.penalised]
    if not at:
        return []
    params = [rows[i].params for i in at]
    given = (
        columns.ints(at),
        columns.ints([history.place(rows[i].slot) for i in at]),
        columns.floats([p.repetition_penalty for p in params]),
        columns.floats([p.frequency_penalty for p in params]),
        columns.floats([p.presence_penalty for p in params]),
    )
    return [_Operation(partial(_penalise, history), given)]


def _grammars(
    rows: Sequence[int], mine: Sequence[SamplingRow], guidance: Guidance, columns: Columns
) -> list[_Operation]:
    at = [i for i, row in enumerate(mine) if row.grammar is not None]
    if not at:
        return []
    places = guidance.places([rows[i] for i in at])
    return [_Operation(guidance.apply, (columns.ints(at), columns.ints(places)))]


def _add_bias(scores: Tensor, at: Tensor, tokens: Tensor, biases: Tensor) -> None:
    scores[at, tokens] += biases.to(scores.dtype)


def _mask(scores: Tensor, at: Tensor, tokens: Tensor) -> None:
    # A tensor on the device: torch would copy the number there, and wait for it.
    scores[at, tokens] = scores.new_full((), -math.inf)


def _penalise(
    history: TokenHistory,
    scores: Tensor,
    rows: Tensor,
    places: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    penalise_(scores, rows, history.counts, places, repetition, frequency, presence)
