"""Log-probabilities of the raw logits: tables on the device, dictionaries on the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mm_core.kernels.weights import WEIGHT_BITS, weights
from mm_core.runner.columns import Column
from mm_core.types import Logprob


class LogprobPart:
    """Rows of one launch that asked for log-probabilities: which, and for how many tokens each."""

    def __init__(self, rows: list[int], counts: list[int], index: Column, vocab_size: int) -> None:
        self.rows = rows
        self.counts = counts
        self.index = index
        self._width = 1 + min(max(counts), vocab_size)

    @property
    def size(self) -> int:
        """Numbers that `tables` gives."""
        return len(self.rows) * (2 * self._width + 1)

    def tables(self, logits: Tensor, token_ids: Tensor) -> Tensor:
        """Flat int64 [size]: token ids [n, width], the bits of their log-probabilities as float64
        [n, width], and the chosen tokens' ranks [n]. The chosen token comes first, then the best ones.
        logits: [R, V]; token_ids: int64 [R], those chosen."""
        scores = logits[self.index.tensor].to(torch.float32)
        peak = scores.amax(dim=-1, keepdim=True)
        total = weights(scores, peak).sum(dim=-1, keepdim=True)
        log_total = total.to(torch.float64).mul_(2.0**-WEIGHT_BITS).log_()
        chosen = token_ids[self.index.tensor]
        ids = chosen[:, None]
        if self._width > 1:
            ids = torch.cat([ids, best_tokens(scores, self._width - 1)], dim=1)
        values = scores.gather(1, ids)
        logprobs = values.to(torch.float64) - peak - log_total
        ranks = (scores > values[:, :1]).sum(dim=-1).add_(1)
        return torch.cat([ids.view(-1), logprobs.view(torch.int64).view(-1), ranks])

    def read(self, packed: np.ndarray) -> list[dict[int, Logprob]]:
        """A dictionary a row from what `tables` gave, as it arrived on the host."""
        cells = len(self.rows) * self._width
        shape = (len(self.rows), self._width)
        ids = packed[:cells].reshape(shape).tolist()
        logprobs = packed[cells : 2 * cells].view(np.float64).reshape(shape).tolist()
        ranks = packed[2 * cells :].tolist()
        return [_table(*row) for row in zip(self.counts, ids, logprobs, ranks, strict=True)]


def _table(count: int, tokens: Sequence[int], logs: Sequence[float], chosen_rank: int) -> dict[int, Logprob]:
    table = {tokens[0]: Logprob(logs[0], chosen_rank)}
    rank = 0
    for place in range(1, min(count, len(tokens) - 1) + 1):
        if place == 1 or logs[place] < logs[place - 1]:
            rank = place  # equal tokens share a rank, as for the chosen one
        table.setdefault(tokens[place], Logprob(logs[place], rank))
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
