"""Nougat's repetition guard: pages that the model does not understand end in the same words for ever.

The original (Blecher et al. 2023) watches the logits' variance. This guard looks at the tokens themselves:
an answer whose end is one short pattern over and over is ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mm_core.types import LogitsRows


@dataclass(frozen=True)
class RepetitionGuard:
    """A `types.LogitsProcessor`: once the last `span` tokens repeat with a period of up to `longest`, only
    the end token is left."""

    eos_token_id: int
    span: int = 200
    longest: int = 64

    def __call__(self, logits: Tensor, rows: LogitsRows) -> Tensor:
        """[R, vocab] → [R, vocab]."""
        needed = self.span + self.longest
        if max(rows.num_output_tokens) < needed:
            return logits
        device = logits.device
        # The last tokens of each row, and for each period the same ones that much earlier.
        last = rows.lengths[:, None] + torch.arange(-needed, 0, device=device)
        tail = rows.output_token_ids.gather(1, last.clamp(min=0))
        end = tail[:, self.longest :]
        same = torch.stack([(tail[:, self.longest - p : needed - p] == end).all(1) for p in range(1, self.longest + 1)])
        repeats = same.any(0) & (rows.lengths >= needed)
        others = torch.ones(logits.shape[1], dtype=torch.bool, device=device)
        others[self.eos_token_id] = False
        return logits.masked_fill(repeats[:, None] & others, float("-inf"))

    def repeats(self, token_ids: Sequence[int]) -> bool:
        """Whether an answer, its end token aside, ends in such a pattern."""
        ids = list(token_ids)
        if ids and ids[-1] == self.eos_token_id:
            ids.pop()
        needed = self.span + self.longest
        if len(ids) < needed:
            return False
        end = ids[-self.span :]
        return any(ids[-self.span - p : -p] == end for p in range(1, self.longest + 1))


def cut_repetition(text: str, longest: int = 2048) -> str:
    """`text` with one copy left of the shortest pattern of up to `longest` characters that its end repeats
    at least twice; unchanged where there is none."""
    for period in range(1, min(longest, len(text) // 3) + 1):
        if text[-2 * period :] != text[-3 * period : -period]:
            continue
        start = len(text) - 3 * period
        while start > 0 and text[start - 1] == text[start - 1 + period]:
            start -= 1
        return text[: start + period]
    return text
