"""The sampler with rows that follow a grammar, also in an overlapped loop."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.sampling import DEVICES, no_synchronisation, random_logits
from torch import Tensor

from mm_core import SamplingParams, StructuredOutput
from mm_core.errors import InvalidGrammarError
from mm_core.runner.guidance import Follower
from mm_core.runner.sampler import SampledTokens, Sampler, SamplingRow
from mm_core.structured.grammar import grammar_text
from mm_core.structured.library import Library, TokenTable
from mm_core.structured.matcher import Compiled, Matcher
from mm_core.types import LogitsRows

# Letters and digits by themselves, pairs of them, and two that are no text; an odd number, so that no word is full.
SINGLE = [c.encode() for c in "abcdefghij0123456789 "]
TOKENS = SINGLE + [x + y for x in SINGLE[:10] for y in SINGLE[:7]] + [b"", b""]
END = len(TOKENS) - 1
VOCAB = len(TOKENS)
TEXT = {"a": TOKENS.index(b"a"), "b": TOKENS.index(b"b"), "0": TOKENS.index(b"0")}
EXPRESSION = "[a-g]{2,12} [0-9]{3}"


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(TokenTable(TOKENS, [VOCAB - 2], [END]))


def make(library: Library, regex: str = EXPRESSION) -> Matcher:
    return Matcher(Compiled(library, grammar_text(StructuredOutput(regex=regex), False)))


class Answer:
    """A sequence as an engine keeps it."""

    def __init__(self, number: int, grammar: Matcher | None = None, **params: Any) -> None:
        self.number, self.grammar, self.params = number, grammar, SamplingParams(**params)
        self.epoch = self.in_flight = 0
        self.output: list[int] = []
        self.fault: Any = None

    def row(self, slot: int) -> SamplingRow:
        step, owner = len(self.output) + self.in_flight, (self.number, self.epoch)
        known = tuple(self.output)
        return SamplingRow(self.params, self.number, step, (1,), known, frozenset({END}), slot, owner, self.grammar)

    def take(self, token: int) -> bool:
        """As the scheduler takes a token in; whether the answer goes on."""
        self.output.append(token)
        if self.grammar is None:
            return True
        self.grammar.accept(len(self.output) - 1, token)
        assert self.grammar.error is None
        return not self.grammar.ended

    @property
    def text(self) -> str:
        return b"".join(TOKENS[i] for i in self.output).decode()


def alone(answer: Answer, logits: Tensor) -> list[int]:
    """Its tokens for logits [T, V], each drawn by a sampler of its own when all before it are known."""
    for step in logits:
        if not answer.take(Sampler(1, VOCAB, logits.device).launch(step[None], [answer.row(0)]).collect().token_ids[0]):
            break
    return answer.output


KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 2.0, "top_k": 30},
    {"top_p": 0.6, "min_p": 0.05},
    {"temperature": 0.0, "repetition_penalty": 1.4, "presence_penalty": 1.0},
    {"logit_bias": {TEXT["0"]: 100.0, END: 100.0}},
    {"min_tokens": 7, "logprobs": 2},
]


@pytest.mark.parametrize("device", DEVICES)
def test_overlapped_with_others_or_alone(library: Library, device: str) -> None:
    """A step is launched before the tokens of the one before it are known; rows join, leave and are preempted."""
    logits = random_logits(40 * 16, VOCAB, seed=1).view(40, 16, VOCAB).to(device)
    dice = random.Random(3)
    kinds = [kind for kind in KINDS for _ in range(2)]
    answers = [Answer(i, make(library) if i % 2 == 0 else None, **kind) for i, kind in enumerate(kinds)]
    wanted = []
    for i, kind in enumerate(kinds):
        one = Answer(i, make(library) if i % 2 == 0 else None, **kind)
        wanted.append(alone(one, torch.stack([logits[t, i] for t in range(40)])))
    drawer = Sampler(16, VOCAB, torch.device(device))
    live, flying = list(answers), []
    pending = None
    while live or flying:
        running = [a for a in live if dice.random() < 0.9 and len(a.output) + a.in_flight < 40]
        launched = None
        if running:
            given = torch.stack([logits[len(a.output) + a.in_flight, a.number] for a in running])
            drawer.keep([a.number for a in running])
            launched = drawer.launch(given, [a.row(a.number) for a in running])
        if pending is not None:
            drawn = pending.collect()
            for (answer, epoch), token in zip(flying, drawn.token_ids, strict=True):
                if answer in live and answer.epoch == epoch:
                    answer.in_flight -= 1
                    if not answer.take(token) or len(answer.output) == 40:
                        live.remove(answer)
        pending, flying = launched, [(a, a.epoch) for a in running] if running else []
        for answer in running:
            if answer in live:
                answer.in_flight += 1
        for answer in live:
            if dice.random() < 0.05:  # preempted: what is in flight counts for nothing
                answer.epoch += 1
                answer.in_flight = 0
    for answer, tokens in zip(answers, wanted, strict=True):
        assert answer.output == tokens
        if answer.grammar is not None:
            assert re.fullmatch(EXPRESSION, answer.text)
    assert sum(a.epoch for a in answers) > 5


@pytest.mark.parametrize("device", DEVICES)
def test_neighbours_to_the_last_bit(library: Library, device: str) -> None:
    """Rows beside those that follow a grammar, and log-probabilities of all rows, are as without any."""
    logits = random_logits(12, VOCAB, seed=2).to(device)
    kinds = [{**kind, "logprobs": 3} for kind in KINDS[:6]] * 2
    free = [SamplingRow(SamplingParams(**k), i, 0, (), (), frozenset(), i, (i, 0)) for i, k in enumerate(kinds)]
    guided = [row._replace(grammar=make(library) if i % 3 else None) for i, row in enumerate(free)]
    plain, found = (Sampler(12, VOCAB, torch.device(device)).launch(logits, rows).collect() for rows in (free, guided))
    for i in range(0, 12, 3):
        assert (plain.token_ids[i], plain.logprobs[i]) == (found.token_ids[i], found.logprobs[i])
    changed = 0
    for i in range(12):
        assert plain.finite[i]
        assert found.finite[i]
        best, others = plain.logprobs[i], found.logprobs[i]
        assert best is not None
        assert others is not None
        shared = set(best) & set(others)
        assert len(shared) >= 3
        assert all(best[token] == others[token] for token in shared)
        changed += plain.token_ids[i] != found.token_ids[i]
    assert changed >= 2


def test_the_best_of_what_is_allowed(library: Library) -> None:
    drawer, drawn = Sampler(1, VOCAB, torch.device("cpu")), 0
    parts = ["ab", *map("".join, itertools.product("cd", repeat=3))]
    texts = ["".join(x) + "e0" for count in range(5) for x in itertools.product(parts, repeat=count)]
    for seed in range(10):
        answer = Answer(seed, make(library, "(ab|[cd]{3})*e0"), temperature=0.0)
        for step in random_logits(30, VOCAB, seed):
            text = answer.text
            allowed = [i for i, t in enumerate(TOKENS) if t and any(x.startswith(text + t.decode()) for x in texts)]
            allowed += [END] if text in texts else []
            token = drawer.launch(step[None], [answer.row(0)]).collect().token_ids[0]
            assert token == max(allowed, key=lambda i: (float(step[i]), -i))
            drawn += 1
            if not answer.take(token) or len(answer.text) > 6:
                break
    assert drawn >= 30


def launch(rows: list[SamplingRow], logits: Tensor | None = None) -> SampledTokens:
    drawer = Sampler(len(rows), VOCAB, torch.device("cpu"))
    return drawer.launch(random_logits(len(rows), VOCAB) if logits is None else logits, rows).collect()


def test_min_tokens_keeps_an_end_away_if_there_is_another_way(library: Library) -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, END] = 50.0
    answer = Answer(0, make(library, "a{1,3}"), temperature=0.0, min_tokens=9)
    wanted = [TEXT["a"]] * 3
    for step in range(3):
        more = answer.take(launch([answer.row(0)], logits[:1]).token_ids[0])
        assert more == (step < 2)
    assert [b"".join(TOKENS[i] for i in answer.output)] == [b"aaa"]
    assert len(answer.output) <= len(wanted)
    early = Answer(0, make(library, "a{1,3}"), temperature=0.0, min_tokens=1)
    assert early.take(launch([early.row(0)], logits[:1]).token_ids[0])
    assert not early.take(launch([early.row(0)], logits[:1]).token_ids[0])
    assert early.output[-1] == END


class Leaves:
    """A logits processor that leaves one token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, logits: Tensor, rows: LogitsRows) -> Tensor:
        kept = torch.full_like(logits, -math.inf)
        kept[:, self.token] = 1.0
        return kept


def test_processors_come_first_and_do_not_win(library: Library) -> None:
    good, bad = SamplingParams(logits_processors=(Leaves(TEXT["b"]),)), SamplingParams(logits_processors=(Leaves(END),))
    rows = [
        SamplingRow(p, i, 0, (), (), frozenset(), i, (i, 0), make(library, "[ab]+")) for i, p in enumerate((good, bad))
    ]
    found = launch([*rows, SamplingRow(SamplingParams(), 2, 0, (), (), frozenset(), 2, (2, 0))])
    assert found.token_ids[0] == TEXT["b"]
    assert list(found.faults) == [1]
    assert "no token could be drawn" in str(found.faults[1])


def test_a_grammar_that_fails_is_one_rows_fault(library: Library) -> None:
    rows = [Answer(i, make(library)) for i in range(3)]
    assert rows[1].grammar is not None
    rows[1].grammar.fail("of a test")
    drawer = Sampler(3, VOCAB, torch.device("cpu"))
    pending = drawer.launch(random_logits(3, VOCAB), [a.row(i) for i, a in enumerate(rows)])
    assert pending.failed
    found = pending.collect()
    assert list(found.faults) == [1]
    assert isinstance(found.faults[1], InvalidGrammarError)
    others = [Answer(0, make(library)), Answer(1), Answer(2, make(library))]
    same = launch([a.row(i) for i, a in enumerate(others)], random_logits(3, VOCAB))
    assert (found.token_ids[0], found.token_ids[2]) == (same.token_ids[0], same.token_ids[2])


def test_tokens_that_nobody_knows_are_a_fault_of_one_row(library: Library) -> None:
    """It cannot happen; if it did, no answer would break its grammar unseen."""
    lost = Answer(0, make(library))
    lost.in_flight = 1
    found = launch([lost.row(0), Answer(1, make(library)).row(1)])
    assert list(found.faults) == [0]


def test_batches_without_grammars_do_nothing_for_them(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError

    for name in ("catch_up", "buffer"):
        monkeypatch.setattr(Follower, name, never)
    assert launch([Answer(0).row(0), Answer(1, temperature=0.0, min_tokens=3).row(1)]).faults == {}
    with pytest.raises(AssertionError):
        launch([Answer(0, make(library)).row(0)])


def test_the_wait_for_a_token_lets_others_go_first(library: Library) -> None:
    entered = []

    @contextmanager
    def waiting() -> Iterator[None]:
        entered.append(1)
        yield

    answer, drawer = Answer(0, make(library)), Sampler(1, VOCAB, torch.device("cpu"))
    drawer.follower.waiting = waiting
    drawer.launch(random_logits(1, VOCAB), [answer.row(0)])
    assert entered == []
    answer.in_flight = 1
    drawer.launch(random_logits(1, VOCAB, 1), [answer.row(0)])
    assert entered == [1]


@pytest.mark.gpu
def test_masks_go_to_a_gpu_without_waiting(library: Library) -> None:
    answers = [Answer(i, make(library), temperature=0.0) for i in range(4)]
    device = torch.device("cuda")
    drawer, logits = Sampler(4, VOCAB, device), random_logits(4, VOCAB).to(device)
    rows = [a.row(i) for i, a in enumerate(answers)]
    drawer.launch(logits, rows).collect()  # kernels are compiled
    with no_synchronisation(device):
        pending = drawer.launch(logits, rows)
    assert all(TOKENS[token] for token in pending.collect().token_ids)
