"""Rows of a launch and what becomes of them, for the sampler's tests."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mm_core.config import SamplingParams
from mm_core.runner.sampler import SampledTokens, Sampler, SamplingRow

VOCAB = 101  # odd, so that rows are not aligned alike
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def row(
    seed: int = 0,
    step: int = 0,
    prompt: tuple[int, ...] = (),
    output: tuple[int, ...] = (),
    stops: frozenset[int] = frozenset(),
    slot: int = 0,
    owner: tuple[int, int] = (0, 0),
    **params: Any,
) -> SamplingRow:
    """`step` is the number of output tokens where those are given."""
    return SamplingRow(SamplingParams(**params), seed, len(output) or step, prompt, output, stops, slot, owner)


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def sample(logits: Tensor, rows: list[SamplingRow]) -> SampledTokens:
    """A sampler and a launch of their own, a slot for each row."""
    drawer = Sampler(len(rows), logits.shape[1], logits.device)
    with no_synchronisation(logits.device):
        return drawer.launch(logits, in_slots(rows)).collect()


def in_slots(rows: list[SamplingRow]) -> list[SamplingRow]:
    return [r._replace(slot=i) for i, r in enumerate(rows)]


@contextlib.contextmanager
def no_synchronisation(device: torch.device) -> Iterator[None]:
    """Raises where the host waits for a GPU, other than for an event."""
    if device.type != "cuda":
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls itself a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def draw(logits: Tensor, rows: list[SamplingRow]) -> list[int]:
    return sample(logits, rows).token_ids
