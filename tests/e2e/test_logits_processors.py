"""Logits processors and named log-probabilities, asked for as users do, in every kind of loop."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.e2e import GREEDY, Canary, ask, check_message, settle
from support.pictures import picture
from support.processors import After, Fails, NoRepeat, Only

from mm_core import AsyncEngine, Engine, KvCacheConfig, RequestOutput, SamplingParams
from mm_core.errors import BatchError, InvalidParamsError

TEXT = "The quick brown fox jumps over the lazy"


def params(*processors: Any, **more: Any) -> SamplingParams:
    settings = {"max_tokens": 40, "temperature": 0, "ignore_eos": True} | more
    return SamplingParams(logits_processors=processors, **settings)


MIX = [
    (TEXT, params(NoRepeat())),
    (ask(picture(1)), params(NoRepeat(), After(5, first=40))),
    ("Another", params()),
    (ask(picture(2), "And this one?"), params(NoRepeat(), temperature=1.0, seed=4, presence_penalty=1.0)),
    ("A fourth " * 20, params(After(1), min_tokens=3, n=2)),
    ("Fifth", params(Only((50, 60, 61)), temperature=1.0, seed=9, logprobs=2)),
]


@pytest.fixture(scope="module")
def overlapped(tiny_path: Path) -> Iterator[Engine]:
    """Steps are launched ahead, and there is so little room that sequences are preempted."""
    kv = KvCacheConfig(num_blocks=24)
    with Engine.from_pretrained(
        tiny_path, kv_cache_config=kv, overlap=True, max_num_batched_tokens=48, show_progress=False
    ) as made:
        yield made


def answers(outputs: list[RequestOutput]) -> list[list[tuple[int, ...]]]:
    return [[one.token_ids for one in output.outputs] for output in outputs]


def test_tokens_are_the_same_in_every_loop(engine: Engine, overlapped: Engine) -> None:
    prompts, settings = [p for p, _ in MIX], [s for _, s in MIX]
    alone = [engine.generate(p, s)[0] for p, s in MIX]
    assert answers(engine.generate(prompts, settings)) == answers(alone)
    before = overlapped.stats()["preemptions"]
    overlapped._frontend._core.scheduler.outlook.wants = lambda _: (1, 1)  # else nobody is admitted to be preempted
    together = overlapped.generate(prompts, settings)
    assert answers(together) == answers(alone)
    assert overlapped.stats()["preemptions"] > before, "nothing was preempted"
    assert [list(overlapped.stream(p, s))[-1].token_ids for p, s in MIX[:2]] == [o.token_ids for o in alone[:2]]
    for at in (0, 1, 3):
        assert len(set(alone[at].token_ids)) == 40
    assert len(set(engine.generate(TEXT, params())[0].token_ids)) < 40, "the model repeats nothing by itself"
    assert alone[1].token_ids[:3] == (40, 45, 50)
    assert alone[4].outputs[0].token_ids == alone[4].outputs[1].token_ids == tuple(range(5, 45))
    assert set(alone[5].token_ids) == {50, 60, 61}
    for each in (engine, overlapped):
        settle(each)


@pytest.mark.parametrize("how", ["raise", "shape", "masks"])
def test_a_fault_ends_one_request(engine: Engine, overlapped: Engine, how: str) -> None:
    wanted = engine.generate(TEXT, params(NoRepeat()))[0].token_ids
    for each in (engine, overlapped):
        canary = Canary(each)
        with pytest.raises(BatchError) as caught:
            each.generate([TEXT, "x", TEXT], [params(NoRepeat()), params(Fails(how), n=2), params(NoRepeat())])
        assert list(caught.value.errors) == [1]
        error = caught.value.errors[1]
        assert isinstance(error, InvalidParamsError)
        assert "Fails" in str(error)
        check_message(error)
        outputs = caught.value.outputs
        assert outputs[0].token_ids == outputs[2].token_ids == wanted
        canary.check()


def test_only_the_answers_own_tokens_are_seen(engine: Engine) -> None:
    """Also where several share a prompt, and where a slot had another sequence before."""
    seeds = [engine.generate(TEXT, params(NoRepeat(), temperature=1.0, seed=s))[0].token_ids for s in range(3)]
    many = engine.generate(TEXT, params(NoRepeat(), temperature=1.0, seed=1, n=4))[0]
    assert many.token_ids == seeds[1]
    assert len({one.token_ids for one in many.outputs}) == 4
    assert all(len(set(one.token_ids)) == 40 for one in many.outputs)


def test_awaited(engine: Engine) -> None:
    async def main() -> tuple[int, ...]:
        return (await AsyncEngine(engine._frontend).generate("x", params(After(2), max_tokens=4))).token_ids

    assert asyncio.run(main()) == (5, 7, 9, 11)


def test_named_tokens_have_their_logprobs(engine: Engine) -> None:
    named = GREEDY.model_copy(update={"logprob_token_ids": (300, 7)})
    plain = engine.generate(TEXT, GREEDY)[0]
    output = engine.generate(TEXT, named)[0]
    everything = engine.generate(TEXT, GREEDY.model_copy(update={"logprobs": 64}))[0]
    assert plain.logprobs is None
    assert output.token_ids == plain.token_ids
    assert output.text == plain.text
    assert output.logprobs is not None
    assert everything.logprobs is not None
    for token, found, best in zip(output.token_ids, output.logprobs, everything.logprobs, strict=True):
        assert list(found) == list(dict.fromkeys([token, 300, 7]))
        assert found[token] == best[token]
        assert all(found[i] == best[i] for i in (300, 7) if i in best)
        assert all(math.isfinite(entry.logprob) and entry.decoded_token for entry in found.values())
    (streamed,) = list(engine.stream(TEXT, named))[-1:]
    assert streamed.logprobs == output.logprobs
    with pytest.raises(InvalidParamsError, match="logprob_token_ids holds token id"):
        engine.generate(TEXT, SamplingParams(logprob_token_ids=(10**6,)))
