"""Logits processors for tests. All but `Fails` read the output tokens on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mm_core.types import LogitsRows


@dataclass(frozen=True)
class NoRepeat:
    """No token twice in a row's output."""

    def __call__(self, logits: Tensor, rows: LogitsRows) -> Tensor:
        seen = rows.output_token_ids.clamp(min=0)
        gone = torch.where(rows.output_token_ids < 0, 0.0, -math.inf)
        return logits.scatter_add(1, seen, gone.to(logits.dtype))


@dataclass(frozen=True)
class After:
    """After each token, the one `step` above it is the best by far; the first one is `first`."""

    step: int
    first: int = 5

    def __call__(self, logits: Tensor, rows: LogitsRows) -> Tensor:
        last = (rows.lengths - 1).clamp(min=0)[:, None]
        newest = rows.output_token_ids.gather(1, last) + self.step
        token = torch.where(rows.lengths[:, None] > 0, newest, torch.full_like(newest, self.first))
        return logits.scatter_(1, token % logits.shape[1], 1000.0)


@dataclass(frozen=True)
class Only:
    """These tokens alone."""

    tokens: tuple[int, ...]

    def __call__(self, logits: Tensor, rows: LogitsRows) -> Tensor:
        kept = torch.full_like(logits, -math.inf)
        for token in self.tokens:
            kept[:, token] = logits[:, token]
        return kept


@dataclass(frozen=True)
class Fails:
    """Does something wrong."""

    how: str

    def __call__(self, logits: Tensor, rows: LogitsRows) -> Any:
        logits.fill_(3.0)
        if self.how == "raise":
            raise ZeroDivisionError("secret")
        return {
            "none": None,
            "shape": logits[:, 1:],
            "dtype": logits.double(),
            "masks": torch.full_like(logits, -math.inf),
            "nan": torch.full_like(logits, math.nan),
        }[self.how]
