"""What Whisper may say when: logits processors, as transformers 5 has them. None waits for the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from mm_core.types import LogitsRows


@cache
def _on_device(ids: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(ids, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class Suppress:
    """These tokens are never said; at_begin: not as the first one."""

    ids: tuple[int, ...]
    at_begin: bool = False

    def __call__(self, logits: Tensor, rows: LogitsRows) -> Tensor:
        """[R, vocab] → [R, vocab]."""
        places = _on_device(self.ids, logits.device)
        if not self.at_begin:
            return logits.index_fill_(1, places, -torch.inf)
        if all(rows.num_output_tokens):
            return logits
        later = (rows.lengths > 0)[:, None]
        kept = logits.index_select(1, places).masked_fill_(~later, -torch.inf)
        return logits.index_copy_(1, places, kept)


@dataclass(frozen=True)
class OneOf:
    """Only these tokens may be said: `OneOf(languages)` after `<|startoftranscript|>` tells the language."""

    ids: tuple[int, ...]

    def __call__(self, logits: Tensor, rows: LogitsRows) -> Tensor:  # noqa: ARG002
        """[R, vocab] → [R, vocab]."""
        places = _on_device(self.ids, logits.device)
        kept = logits.index_select(1, places)
        return logits.fill_(-torch.inf).index_copy_(1, places, kept)


@dataclass(frozen=True)
class TimestampRules:
    """Timestamps come in pairs, do not decrease, begin the answer (there no later than `latest_first`, where
    that is given), and are taken where all of them together are likelier than every other token.

    begin: id of `<|0.00|>`; end: `<|endoftext|>`; no_timestamps: the token that is forbidden. Source:
    `WhisperTimeStampLogitsProcessor` of transformers, `ApplyTimestampRules` of openai/whisper.
    """

    begin: int
    end: int
    no_timestamps: int
    latest_first: int | None = None

    def __call__(self, logits: Tensor, rows: LogitsRows) -> Tensor:
        """[R, vocab] → [R, vocab]."""
        begin = self.begin
        first = rows.lengths == 0
        after_pair, after_single, newest = self._last_stamps(rows)
        lowest = torch.where(after_single, newest, newest + 1).clamp_(min=begin)
        lowest = torch.where(after_pair, logits.shape[1], lowest)
        text_from = torch.where(first, begin, torch.where(after_single, self.end, 0))
        vocabulary = torch.arange(logits.shape[1], device=logits.device)
        # Text [text_from, begin) and timestamps [lowest, …) are allowed.
        allowed = vocabulary >= torch.where(vocabulary < begin, text_from[:, None], lowest[:, None])
        if self.latest_first is not None:
            allowed &= ~(first[:, None] & (vocabulary > begin + self.latest_first))
        logits.masked_fill_(~allowed, -torch.inf)
        logits[:, self.no_timestamps] = -torch.inf
        likelier = logits[:, begin:].logsumexp(1) > logits[:, :begin].amax(1)
        logits[:, :begin].masked_fill_(likelier[:, None], -torch.inf)
        return logits

    def _last_stamps(self, rows: LogitsRows) -> tuple[Tensor, Tensor, Tensor]:
        """[R] each: whether the last two tokens are timestamps (or the only one is), whether the last alone is,
        and the newest timestamp (begin - 1: none yet)."""
        said, lengths = rows.output_token_ids, rows.lengths
        if not said.shape[1]:
            none = torch.zeros_like(lengths, dtype=torch.bool)
            return none, none, torch.full_like(lengths, self.begin - 1)
        last, before = (said.gather(1, (lengths - n).clamp(min=0)[:, None])[:, 0] for n in (1, 2))
        is_stamp = (lengths > 0) & (last >= self.begin)
        paired = (lengths < 2) | (before >= self.begin)
        newest = said.amax(1).clamp(min=self.begin - 1)  # they never decrease
        return is_stamp & paired, is_stamp & ~paired, newest
