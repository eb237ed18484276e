"""Logits processors in the sampler: whom they are called for, with what, and what comes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from support.processors import After, Fails, NoRepeat, Only
from support.sampling import DEVICES, VOCAB, draw, in_slots, no_synchronisation, random_logits, row, sample
from torch import Tensor

from mm_core.config import SamplingParams
from mm_core.errors import InvalidParamsError
from mm_core.runner.processors import order_calls
from mm_core.runner.sampler import Sampler
from mm_core.types import LogitsRows

GREEDY: dict[str, Any] = {"temperature": 0.0}


class Recorder:
    """Changes nothing, and notes what it is given."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, list[tuple[int, ...]], Tensor, list[int], Tensor]] = []

    def __call__(self, logits: Tensor, rows: LogitsRows) -> Tensor:
        notes = (logits.clone(), list(rows.prompt_token_ids), rows.output_token_ids.clone())
        self.calls.append((*notes, list(rows.num_output_tokens), rows.lengths.clone()))
        return logits


# --- whom a processor is called for ---------------------------------------------------------------


def test_calls_keep_each_rows_order_and_are_few() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        names = "abcdef"[: rng.integers(1, 7)]
        consistent = bool(rng.integers(2))
        wanted = []
        for _ in range(rng.integers(1, 9)):
            chosen = rng.permutation(list(names))[: rng.integers(0, len(names) + 1)].tolist()
            wanted.append(tuple(sorted(chosen) if consistent else chosen))
        calls = order_calls(wanted)  # type: ignore[arg-type]
        for index, names_of_row in enumerate(wanted):
            assert tuple(name for name, rows in calls if index in rows) == names_of_row
        if consistent:
            assert len(calls) == len(set().union(*wanted)), "more than once a step"
    assert order_calls([("a", "a"), ("a",)]) == [("a", (0, 1)), ("a", (0,))]  # type: ignore[list-item]
    assert order_calls([]) == order_calls([()]) == []


@pytest.mark.parametrize("device", DEVICES)
def test_one_call_a_step_for_all_rows_with_an_equal_one(device: str) -> None:
    logits = random_logits(6).to(device)
    shared, alone = Recorder(), Recorder()
    kinds = [(shared,), (), (shared, NoRepeat()), (alone, shared), (NoRepeat(),), ()]
    outputs: list[tuple[int, ...]] = [(7, 8), (), (), (1,), (2,), ()]
    rows = [
        row(prompt=(i, i + 1), output=output, logits_processors=kind, owner=(i, 0), **GREEDY)
        for i, (kind, output) in enumerate(zip(kinds, outputs, strict=True))
    ]
    sample(logits, rows)
    (call,), (other,) = shared.calls, alone.calls
    assert torch.equal(call[0], logits[[0, 2, 3]])
    assert call[1] == [(0, 1), (2, 3), (3, 4)]
    assert call[2].tolist() == [[7, 8], [-1, -1], [1, -1]]
    assert call[3] == call[4].tolist() == [2, 0, 1]
    assert (call[0].dtype, call[2].dtype, call[4].dtype) == (torch.float32, torch.int64, torch.int64)
    assert call[0].device == call[2].device == call[4].device == logits.device
    assert other[2].tolist() == [[1]]
    assert other[1] == [(3, 4)]


def test_equal_processors_of_requests_are_one() -> None:
    calls: list[int] = []

    @dataclass(frozen=True)
    class Counting:
        bias: float

        def __call__(self, logits: Tensor, rows: LogitsRows) -> Tensor:
            calls.append(len(logits))
            return logits + self.bias

    rows = [row(logits_processors=[Counting(float(i % 2))], **GREEDY) for i in range(7)]
    sample(random_logits(7), rows)
    assert sorted(calls) == [3, 4]


def test_rows_without_output_are_told_so() -> None:
    seen = Recorder()
    sample(random_logits(1), [row(logits_processors=(seen,))])
    assert seen.calls[0][2].tolist() == [[-1]]
    assert seen.calls[0][4].tolist() == [0]


# --- what comes of it -----------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_the_course_of_a_row_is_what_its_processors_say(device: str) -> None:
    """Each step is launched before the token before it is known to the host."""
    drawer = Sampler(4, VOCAB, torch.device(device))
    rows = [
        row(logits_processors=(After(3),), owner=(0, 0), **GREEDY),
        row(logits_processors=(NoRepeat(),), owner=(1, 0), **GREEDY),
        row(logits_processors=(After(7, first=9), NoRepeat()), owner=(2, 0), seed=3),
        row(owner=(3, 0), **GREEDY),
    ]
    logits = random_logits(4, seed=3).to(device)
    launched = []
    for step in range(90):  # past the first length of the table
        given = [r._replace(slot=3 - i, step=step) for i, r in enumerate(rows)]
        assert drawer.knows(3, (0, 0), step) == (step > 0)
        with no_synchronisation(torch.device(device)):
            launched.append(drawer.launch(logits, given))
        if step >= 2:
            launched[step - 2].collect()
    results = [one.collect() for one in launched]
    tokens = np.asarray([result.token_ids for result in results])
    assert tokens[:, 0].tolist() == [(5 + 3 * step) % VOCAB for step in range(90)]
    assert tokens[:, 1].tolist() == torch.argsort(logits[1].cpu(), descending=True)[:90].tolist()
    assert tokens[:, 2].tolist() == [(9 + 7 * step) % VOCAB for step in range(90)]
    assert len(set(tokens[:, 3].tolist())) == 1
    assert all(not result.faults for result in results)


@pytest.mark.parametrize("device", DEVICES)
def test_no_token_twice(device: str) -> None:
    logits = random_logits(1).to(device)
    output: tuple[int, ...] = ()
    for _ in range(20):
        output += tuple(draw(logits, [row(output=output, logits_processors=(NoRepeat(),), **GREEDY)]))
    assert list(output) == torch.argsort(logits[0].cpu(), descending=True)[:20].tolist()


def test_bias_comes_before_and_the_rest_after() -> None:
    logits = torch.zeros(1, VOCAB)
    seen = Recorder()

    def double(logits: Tensor, rows: LogitsRows) -> Tensor:
        return logits * 2

    only = row(output=(4, 6), logit_bias={4: 3.0, 6: 4.0}, presence_penalty=2.0, logits_processors=(seen, double))
    only = only._replace(params=only.params.model_copy(update=GREEDY))
    assert draw(logits, [only]) == [6]
    assert seen.calls[0][0][0, [4, 6, 7]].tolist() == [3.0, 4.0, 0.0]
    flat = row(output=(6,), logit_bias={4: 3.0, 6: 4.0}, logits_processors=(double,), presence_penalty=2.0, **GREEDY)
    assert draw(logits, [flat]) == [4]  # 3 × 2 against 4 × 2 − 2, the first of equals
    stops = frozenset({8})
    forced = row(min_tokens=2, stops=stops, logits_processors=(After(1, first=8),), **GREEDY)
    assert draw(logits, [forced]) == [0]  # min_tokens holds against a processor
    raw = sample(logits, [row(logits_processors=(Only((3,)),), logprobs=0)])
    assert raw.token_ids == [3]
    assert raw.logprobs[0] is not None
    assert raw.logprobs[0][3].logprob == pytest.approx(-math.log(VOCAB)), "the model's own distribution"


@pytest.mark.parametrize("device", DEVICES)
def test_random_rows_draw_from_what_is_left(device: str) -> None:
    rows = [row(seed=i, logits_processors=(Only((2, 50, 77)),), top_p=0.99) for i in range(60)]
    drawn = draw(torch.zeros(60, VOCAB, device=device), rows)
    assert set(drawn) == {2, 50, 77}
    unprocessed = draw(torch.zeros(60, VOCAB, device=device), [row(seed=i) for i in range(60)])
    assert len(set(unprocessed)) > 20


def test_what_a_processor_keeps_is_not_written_to() -> None:
    class Keeps:
        def __init__(self) -> None:
            self.mine = torch.zeros(1, VOCAB)
            self.mine[0, 9] = 5.0

        def __call__(self, logits: Tensor, rows: LogitsRows) -> Tensor:
            return self.mine

    keeps = Keeps()
    penalised = row(output=(9,), presence_penalty=2.0, logits_processors=(keeps,), **GREEDY)
    assert draw(torch.zeros(1, VOCAB), [penalised]) == [9]
    assert keeps.mine[0, 9] == 5.0
    logits = random_logits(2)
    before = logits.clone()
    draw(logits, [row(logits_processors=(Fails("shape"),)), row()])
    assert torch.equal(logits, before)


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("raise", "Fails failed with ZeroDivisionError"), ("none", "Fails returned a NoneType"),
        ("shape", f"Fails returned .*, {VOCAB - 1}. float32"), ("dtype", "Fails returned .* float64"),
        ("masks", r"\(NoRepeat, Fails\) no token could be drawn"), ("nan", r"\(NoRepeat, Fails\) no token"),
    ],
)  # fmt: skip
def test_a_fault_fails_its_own_rows_alone(how: str, text: str, device: str) -> None:
    good: list[dict[str, Any]] = [GREEDY, {"logits_processors": (NoRepeat(),)}, {"top_k": 5, "logprobs": 2}]
    bad = {"logits_processors": (NoRepeat(), Fails(how)), "top_p": 0.5, "min_tokens": 3, "stops": frozenset({1})}
    rows = in_slots([row(seed=i, owner=(i, 0), **(bad if i % 4 == 3 else good[i % 4])) for i in range(16)])
    logits = random_logits(16).to(device)
    drawer = Sampler(16, VOCAB, torch.device(device))
    with no_synchronisation(torch.device(device)):
        pending = drawer.launch(logits, rows)
    assert pending.failed == (how not in ("masks", "nan"))
    result = pending.collect()
    assert sorted(result.faults) == [3, 7, 11, 15]
    for fault in result.faults.values():
        assert isinstance(fault, InvalidParamsError)
        assert fault.param == "logits_processors"
        with pytest.raises(InvalidParamsError, match=text):
            raise fault
        assert "secret" not in str(fault)
    assert all(result.finite)
    assert all(0 <= token < VOCAB for token in result.token_ids)
    wanted = sample(logits, [row(seed=i, **({} if i % 4 == 3 else good[i % 4])) for i in range(16)])
    for i in range(16):
        if i % 4 != 3:
            assert (result.token_ids[i], result.logprobs[i]) == (wanted.token_ids[i], wanted.logprobs[i])
    after = drawer.launch(logits[:3], [r._replace(step=1, output_token_ids=(0,)) for r in rows[:3]])
    assert after.collect().faults == {}


def test_broken_logits_are_the_models_fault() -> None:
    logits = random_logits(2)
    logits[0, 3] = math.nan
    result = sample(logits, [row(logits_processors=(NoRepeat(),)), row(logits_processors=(NoRepeat(),))])
    assert result.finite == [False, True]
    assert result.faults == {}


def test_a_lost_device_is_not_blamed_on_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(logits: Tensor, rows: LogitsRows) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="CUDA error"):
        sample(random_logits(1), [row(logits_processors=(lost,))])


# --- parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ((NoRepeat(),) * 17, "17 entries, the limit is 16"), ([3], "int; want callables"), ("abc", "tuple"),
        (NoRepeat(), "tuple"), ([type("Unhashable", (), {"__hash__": None, "__call__": print})()], "frozen=True"),
    ],
)  # fmt: skip
def test_processors_are_checked(given: Any, text: str) -> None:
    with pytest.raises(InvalidParamsError, match=text) as caught:
        SamplingParams(logits_processors=given)
    assert "logits_processors" in str(caught.value)


def test_lists_are_taken() -> None:
    def plain(logits: Tensor, rows: LogitsRows) -> Tensor:
        return logits

    params = SamplingParams(logits_processors=[plain, NoRepeat()])
    assert params.logits_processors == (plain, NoRepeat())
    assert params == SamplingParams(logits_processors=(plain, NoRepeat()))
    assert SamplingParams(logits_processors=None).logits_processors == ()
    assert not SamplingParams().reads_tokens
    assert params.reads_tokens


# --- log-probabilities of named tokens ------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_named_tokens_are_reported_beside_the_best(device: str) -> None:
    logits = random_logits(8).to(device)
    named: list[Sequence[int]] = [(), (7,), (7, 3, 100), (0,), (), (5, 5), tuple(range(64)), (1,)]
    counts = [None, None, 0, 2, 3, 1, None, VOCAB]
    counts = [c if c is None else min(c, 64) for c in counts]
    rows = [
        row(seed=i, logprobs=c, logprob_token_ids=list(ids), temperature=0.5)
        for i, (c, ids) in enumerate(zip(counts, named, strict=True))
    ]
    result = sample(logits, rows)
    scores = logits.cpu()
    wanted = torch.log_softmax(scores.double(), dim=-1)
    assert result.logprobs[0] is None
    for i, (found, count, ids) in enumerate(zip(result.logprobs, counts, named, strict=True)):
        if i == 0:
            continue
        assert found is not None
        best = torch.argsort(scores[i], descending=True, stable=True)[: count or 0].tolist()
        assert list(found) == list(dict.fromkeys([result.token_ids[i], *best, *ids]))
        for token, entry in found.items():
            assert entry.logprob == pytest.approx(wanted[i, token].item(), abs=1e-5)
            assert entry.rank == int((scores[i] > scores[i, token]).sum()) + 1
    alone = [sample(logits[i : i + 1], [rows[i]]).logprobs[0] for i in range(8)]
    assert alone == result.logprobs


def test_named_tokens_are_bounded() -> None:
    with pytest.raises(InvalidParamsError, match="65 ids, the limit is 64"):
        SamplingParams(logprob_token_ids=tuple(range(65)))
    assert SamplingParams(logprob_token_ids=[1]).best_logprobs == 0
    assert SamplingParams(logprob_token_ids=[1], logprobs=3).best_logprobs == 3
    assert SamplingParams().best_logprobs is None
