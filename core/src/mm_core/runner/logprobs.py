"""Log-probabilities of the raw logits: tables on the device, dictionaries on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mm_core.kernels.weights import WEIGHT_BITS, weights
from mm_core.runner.columns import Columns
from mm_core.types import Logprob

if TYPE_CHECKING:
    from mm_core.config import SamplingParams


class LogprobPart:
    """Rows of one launch that asked for log-probabilities: of how many best tokens each, and of which others."""

    def __init__(self, rows: list[int], params: Sequence[SamplingParams], vocab_size: int, columns: Columns) -> None:
        self.rows = rows
        self._index = columns.ints(rows)
        self._counts = [min(p.best_logprobs or 0, vocab_size) for p in params]
        self._named = [p.logprob_token_ids for p in params]
        self._best, self._more = max(self._counts), max(map(len, self._named))
        # Rows that name fewer tokens have the first one of the vocabulary in their place, which nobody reads.
        padded = [[*ids, *[0] * (self._more - len(ids))] for ids in self._named]
        self._named_ids = columns.ints(np.asarray(padded, np.int64).reshape(-1))

    @property
    def size(self) -> int:
        """Numbers that `tables` gives."""
        return len(self.rows) * (2 * self._width + 1 + self._more)

    @property
    def _width(self) -> int:
        return 1 + self._best + self._more

    def tables(self, logits: Tensor, token_ids: Tensor) -> Tensor:
        """Flat int64 [size]: token ids [n, width], the bits of their log-probabilities as float64
        [n, width], and ranks of the chosen and the named ones [n, 1 + named]. The chosen token comes first,
        then the best ones, then those that were named. logits: [R, V]; token_ids: int64 [R], those chosen."""
        scores = logits[self._index.tensor].to(torch.float32)
        peak = scores.amax(dim=-1, keepdim=True)
        total = weights(scores, peak).sum(dim=-1, keepdim=True)
        log_total = total.to(torch.float64).mul_(2.0**-WEIGHT_BITS).log_()
        parts = [token_ids[self._index.tensor][:, None]]
        if self._best:
            parts.append(best_tokens(scores, self._best))
        if self._more:
            parts.append(self._named_ids.tensor.view(len(self.rows), self._more))
        ids = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        values = scores.gather(1, ids)
        logprobs = values.to(torch.float64) - peak - log_total
        ranked = [0, *range(1 + self._best, self._width)]
        ranks = [(scores > values[:, i : i + 1]).sum(dim=-1).add_(1) for i in ranked]
        return torch.cat([ids.view(-1), logprobs.view(torch.int64).view(-1), torch.stack(ranks, dim=1).view(-1)])

    def read(self, packed: np.ndarray) -> list[dict[int, Logprob]]:
        """A dictionary a row from what `tables` gave, as it arrived on the host."""
        cells = len(self.rows) * self._width
        shape = (len(self.rows), self._width)
        ids = packed[:cells].reshape(shape).tolist()
        logprobs = packed[cells : 2 * cells].view(np.float64).reshape(shape).tolist()
        ranks = packed[2 * cells :].reshape(len(self.rows), 1 + self._more).tolist()
        return [self._table(*row) for row in zip(self._counts, self._named, ids, logprobs, ranks, strict=True)]

    def _table(
        self, count: int, named: Sequence[int], tokens: Sequence[int], logs: Sequence[float], ranks: Sequence[int]
    ) -> dict[int, Logprob]:
        table = {tokens[0]: Logprob(logs[0], ranks[0])}
        rank = 0
        for place in range(1, count + 1):
            if place == 1 or logs[place] < logs[place - 1]:
                rank = place  # equal tokens share a rank, as for the chosen one
            table.setdefault(tokens[place], Logprob(logs[place], rank))
        first = 1 + self._best
        for place, token in enumerate(named):
            table.setdefault(token, Logprob(logs[first + place], ranks[1 + place]))
        return table


def best_tokens(scores: Tensor, count: int) -> Tensor:
    """Ids of the best tokens of each row, int64 [R, count]; lower ids first among equals.

    `topk` alone may return any of several equal tokens. So it sees unique integers: the float's
    bits, made monotone, above the complement of the token's id.
    """
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)  # + 0.0 turns -0.0 into 0.0
    monotone = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ids = torch.arange(scores.shape[1], device=scores.device)
    keys = monotone * 2**32 + (2**32 - 1 - ids)
    return 2**32 - 1 - (keys.topk(count, dim=-1).values & (2**32 - 1))
