"""The logits processors beside transformers' own, on random answers."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    WhisperTimeStampLogitsProcessor,
)

from mm_core.types import LogitsRows
from mm_plugin_whisper.rules import OneOf, Suppress, TimestampRules

VOCAB, END, NO_STAMPS = 160, 90, 99
BEGIN = NO_STAMPS + 1
PROMPT = (91, 92, 93)


def rows(answers: Sequence[Sequence[int]]) -> LogitsRows:
    """Answers as the engine tells them, with room behind the longest."""
    longest = max(map(len, answers)) + random.Random(0).randint(0, 2)
    said = torch.full((len(answers), longest), -1)
    for row, answer in enumerate(answers):
        said[row, : len(answer)] = torch.tensor(answer, dtype=torch.long)
    counts = [len(answer) for answer in answers]
    return LogitsRows([PROMPT] * len(answers), said, counts, torch.tensor(counts))


def random_answers(seed: int, count: int) -> list[list[int]]:
    """Text between timestamps that do not decrease, cut off anywhere."""
    rng = random.Random(seed)
    answers = []
    for _ in range(count):
        answer, stamp = [BEGIN + rng.randint(0, 5)], 5
        while len(answer) < 14:
            answer += [rng.randrange(END) for _ in range(rng.randint(1, 3))]
            stamp += rng.randint(1, 8)
            answer += [BEGIN + stamp] * rng.choice([1, 2, 2])
        answers.append(answer[: rng.randint(0, 14)])
    return [*answers, [], [BEGIN], [4], [BEGIN, 4], [4, BEGIN + 3], [BEGIN + 7, BEGIN + 7]]


def rules_of_transformers(latest: int | None) -> WhisperTimeStampLogitsProcessor:
    config = GenerationConfig(eos_token_id=END, no_timestamps_token_id=NO_STAMPS)
    config.max_initial_timestamp_index = latest
    return WhisperTimeStampLogitsProcessor(config, begin_index=len(PROMPT))


@pytest.mark.parametrize("latest", [None, 3])
@pytest.mark.parametrize("stamps_gain", [-3.0, 0.0, 3.0])
def test_timestamp_rules_equal_transformers(latest: int | None, stamps_gain: float) -> None:
    answers = random_answers(1, 60)
    logits = torch.randn((len(answers), VOCAB), generator=torch.Generator().manual_seed(2)) * 2
    logits[:, BEGIN:] += stamps_gain
    theirs = rules_of_transformers(latest)
    want = [theirs(torch.tensor([[*PROMPT, *a]]), logits[i : i + 1])[0] for i, a in enumerate(answers)]
    got = TimestampRules(BEGIN, END, NO_STAMPS, latest)(logits.clone(), rows(answers))
    assert torch.equal(got, torch.stack(want))
    allowed = got.isfinite()
    assert allowed[:, BEGIN:].any()
    assert stamps_gain > 0 or allowed[:, :BEGIN].any()


def test_before_anything_was_said_there_may_be_no_column() -> None:
    logits = torch.randn((2, VOCAB), generator=torch.Generator().manual_seed(3))
    empty = LogitsRows([PROMPT] * 2, torch.zeros((2, 0), dtype=torch.long), [0, 0], torch.zeros(2, dtype=torch.long))
    want = rules_of_transformers(5)(torch.tensor([PROMPT] * 2), logits)
    assert torch.equal(TimestampRules(BEGIN, END, NO_STAMPS, 5)(logits.clone(), empty), want)


def test_suppressions_equal_transformers() -> None:
    answers = [[], [5], [6, 7], []]
    logits = torch.randn((4, VOCAB), generator=torch.Generator().manual_seed(4))
    never = SuppressTokensLogitsProcessor([3, 8, END])
    first = SuppressTokensAtBeginLogitsProcessor([4, END], begin_index=len(PROMPT))
    for row, answer in enumerate(answers):
        ids = torch.tensor([[*PROMPT, *answer]])
        one = rows([answer])
        assert torch.equal(Suppress((3, 8, END))(logits[row : row + 1].clone(), one), never(ids, logits[row : row + 1]))
    got = Suppress((4, END), at_begin=True)(logits.clone(), rows(answers))
    want = [first(torch.tensor([[*PROMPT, *a]]), logits[i : i + 1])[0] for i, a in enumerate(answers)]
    assert torch.equal(got, torch.stack(want))


def test_one_of_leaves_nothing_else() -> None:
    logits = torch.randn((3, VOCAB), generator=torch.Generator().manual_seed(5))
    got = OneOf((7, 9))(logits.clone(), rows([[], [1], [2]]))
    assert got.isfinite().nonzero()[:, 1].tolist() == [7, 9] * 3
    assert torch.equal(got[:, [7, 9]], logits[:, [7, 9]])


def test_equal_rules_are_one_to_the_engine() -> None:
    assert len({TimestampRules(1, 2, 3), TimestampRules(1, 2, 3), Suppress((1,)), Suppress((1,))}) == 2
