"""The sampler in an overlapped loop: a step is launched before the tokens of the one before it are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.processors import After, NoRepeat
from support.sampling import DEVICES, VOCAB, draw, in_slots, no_synchronisation, random_logits, row, sample
from torch import Tensor

from mm_core.config import SamplingParams
from mm_core.runner.sampler import Sampler, SamplingRow

PENALISED: dict[str, Any] = {"repetition_penalty": 1.3, "frequency_penalty": 0.8, "presence_penalty": 0.4}


class Answer:
    """A sequence as an engine keeps it: what it asked for and the tokens that the host knows."""

    def __init__(self, number: int, prompt: tuple[int, ...], **params: Any) -> None:
        self.number, self.prompt, self.params = number, prompt, SamplingParams(**params)
        self.stops = frozenset({number % 7, 11})
        self.epoch = self.in_flight = 0
        self.output: list[int] = []

    def row(self, slot: int) -> SamplingRow:
        step = len(self.output) + self.in_flight
        known = tuple(self.output)
        return SamplingRow(
            self.params, self.number, step, self.prompt, known, self.stops, slot, (self.number, self.epoch)
        )


def recurring_logits(steps: int, rows: int) -> Tensor:
    """[steps, rows, V]: without penalties, a row has the same few good tokens at every step."""
    noise = random_logits(steps * rows, seed=4).view(steps, rows, VOCAB)
    return random_logits(rows, seed=5) / 2 + noise / 6


def in_one_go(answer: Answer, logits: Tensor) -> list[int]:
    """Its tokens for logits [T, V], each drawn by a sampler of its own when all before it are known."""
    alone = Answer(answer.number, answer.prompt)
    alone.params = answer.params
    for t in range(len(logits)):
        alone.output += draw(logits[t : t + 1], [alone.row(0)])
    return alone.output


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_is_launched_before_the_last_one_is_collected(device: str) -> None:
    steps = recurring_logits(12, 6).to(device)
    greedy = {"temperature": 0.0}
    kinds: list[dict[str, Any]] = [PENALISED | greedy, greedy, {}, PENALISED, {"frequency_penalty": 2.0} | greedy, {}]
    answers = [Answer(i, (i, i, 40 + i), **kind) for i, kind in enumerate(kinds)]
    drawer = Sampler(9, VOCAB, torch.device(device))
    pending = None
    for t in range(12):
        with no_synchronisation(torch.device(device)):
            launched = drawer.launch(steps[t], [a.row(i + 2) for i, a in enumerate(answers)])
        if pending is not None:
            for answer, token in zip(answers, pending.collect().token_ids, strict=True):
                answer.output.append(token)
        pending = launched
        for answer in answers:
            answer.in_flight = 1
    assert pending is not None
    last = pending.collect().token_ids
    assert drawer.last_ids[2:8].tolist() == last
    for i, answer in enumerate(answers):
        assert [*answer.output, last[i]] == in_one_go(answer, steps[:, i])
    unpenalised = Answer(0, (), temperature=0.0)
    assert [*answers[0].output, last[0]] != in_one_go(unpenalised, steps[:, 0]), "the penalties change nothing here"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lazy", [False, True], ids=["all ids given", "only ids not known"])
def test_any_course_of_joining_leaving_and_preemption(device: str, lazy: bool) -> None:
    """Tokens equal those of a sequence alone, whoever had its slot before and whatever was discarded."""
    rng = np.random.default_rng(7)
    drawer = Sampler(12, VOCAB, torch.device(device))
    waiting = [Answer(i, tuple(rng.integers(0, VOCAB, 5)), **kind) for i, kind in enumerate(course_of(40))]
    table = recurring_logits(8, 40).transpose(0, 1).to(device)
    running: dict[int, Answer] = {}
    done: list[Answer] = []
    flying: list[tuple[Answer, int]] = []
    pending, preempted, grown = None, 0, 0
    while running or waiting or flying:
        while waiting and len(running) < 12:
            running[min(set(range(12)) - set(running))] = waiting.pop(0)
        wanted = {slot: a for slot, a in running.items() if len(a.output) + a.in_flight < 8 and rng.random() < 0.9}
        rows = [a.row(slot) for slot, a in wanted.items()]
        if lazy:
            rows = [
                r._replace(prompt_token_ids=(), output_token_ids=()) if drawer.knows(r.slot, r.owner, r.step) else r
                for r in rows
            ]
        at = [(a.number, len(a.output) + a.in_flight) for a in wanted.values()]
        logits = torch.stack([table[i, t] for i, t in at]) if at else table[:0, 0]
        launched = drawer.launch(logits, rows)
        grown = max(grown, drawer._history.capacity)
        now = [(a, a.epoch) for a in wanted.values()]
        for a in wanted.values():
            a.in_flight += 1
        if pending is not None:
            for (a, epoch), token in zip(flying, pending.collect().token_ids, strict=True):
                if a.epoch == epoch:
                    a.output.append(token)
                    a.in_flight -= 1
        pending, flying = launched, now
        for slot, a in list(running.items()):
            if len(a.output) == 8 or rng.random() < 0.05:
                drawer.release(slot)
                del running[slot]
                a.epoch, a.in_flight = a.epoch + 1, 0  # what is in flight is void
                preempted += len(a.output) < 8
                (done if len(a.output) == 8 else waiting).append(a)
    assert preempted > 5
    assert len(done) == 40
    for a in done:
        assert a.output == in_one_go(a, table[a.number])
    assert grown > 0
    assert drawer._history.capacity == drawer._outputs.capacity == 0, "the tables are given back when nobody needs them"


def course_of(count: int) -> list[dict[str, Any]]:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        PENALISED,
        {"temperature": 0.0, "min_tokens": 4},
        {"top_p": 0.8, "frequency_penalty": 1.0},
        {"temperature": 0.0, "repetition_penalty": 1.5, "min_tokens": 2, "logprobs": 2},
        {"top_k": 20, "min_tokens": 1, "logit_bias": {3: 2.0}},
        {"temperature": 0.0, "logits_processors": (NoRepeat(),)},
        {"logits_processors": (NoRepeat(), After(3)), "presence_penalty": 1.0},
    ]
    return [kinds[i % len(kinds)] for i in range(count)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_token_in_flight_is_counted_when_a_table_is_written(device: str) -> None:
    logits = torch.zeros(1, VOCAB, device=device)
    logits[0, 5] = 1.0
    drawer = Sampler(4, VOCAB, torch.device(device))
    drawer.launch(logits, [row(temperature=0.0, slot=3)])
    assert drawer.last_ids[3] == 5
    heavy = row(temperature=0.0, presence_penalty=2.0, slot=3, owner=(1, 0), output=(9,))._replace(step=2)
    assert drawer.launch(logits, [heavy]).collect().token_ids == [0]
    other = heavy._replace(owner=(2, 0), step=1)  # nothing in flight: 9 alone was there
    assert drawer.launch(logits, [other]).collect().token_ids == [5]


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_that_nobody_collects_in_time_are_kept(device: str) -> None:
    logits = random_logits(3).to(device)
    drawer = Sampler(5, VOCAB, torch.device(device))
    rows = [row(slot=1), row(temperature=0.0, logprobs=2, slot=0), row(seed=3, slot=4)]
    launched = [drawer.launch(logits, [r._replace(step=step) for r in rows]) for step in range(11)]
    for step in (10, 3, 0, 7, 5, 5):
        alone = sample(logits, [r._replace(step=step) for r in rows])
        assert launched[step].collect() == alone


def test_tables_grow_and_keep_what_they_hold() -> None:
    drawer = Sampler(40, VOCAB, torch.device("cpu"))
    logits = torch.zeros(1, VOCAB)
    logits[0, 5] = 1.0
    params = SamplingParams(temperature=0.0, presence_penalty=2.0)
    for slot in range(40):
        first = SamplingRow(params, 0, 0, (), (), frozenset(), slot, (slot, 0))
        assert not drawer.knows(slot, (slot, 0), 0)
        assert drawer.launch(logits, [first]).collect().token_ids == [5]
    assert drawer._history.capacity >= 40
    for slot in range(40):
        assert drawer.knows(slot, (slot, 0), 1)
        assert not drawer.knows(slot, (slot, 1), 1)
        second = SamplingRow(params, 0, 1, (), (), frozenset(), slot, (slot, 0))
        assert drawer.launch(logits, [second]).collect().token_ids == [0]
    for slot in range(40):
        drawer.release(slot)
    assert drawer._history.capacity == 0


def test_a_batch_that_stays_is_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawer = Sampler(36, VOCAB, torch.device("cpu"))
    plans = []
    make = drawer._make_plan
    monkeypatch.setattr(drawer, "_make_plan", lambda rows: plans.append(len(rows)) or make(rows))
    rows = in_slots([row(min_tokens=i % 3, temperature=float(i % 2), stops=frozenset({1})) for i in range(36)])
    for step in range(5):
        drawer.launch(random_logits(36), [r._replace(step=step) for r in rows])
    assert len(plans) == 3  # 2 tokens are masked, then 1, then none
    drawer.launch(random_logits(36), [r._replace(step=9, slot=35 - r.slot) for r in rows])
    drawer.launch(random_logits(35), [r._replace(step=10) for r in rows[1:]])
    assert len(plans) == 5
