"""Structured output, asked for as users do, in every kind of loop."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.e2e import Canary, ask, check_message, settle
from support.families import FAMILIES
from support.pictures import picture
from torch import Tensor

from mm_core import AsyncEngine, Engine, KvCacheConfig, RequestOutput, SamplingParams, StructuredOutput
from mm_core.errors import BatchError, InvalidGrammarError, MissingExtraError
from mm_core.structured import library as library_module
from mm_core.structured.library import Library
from mm_core.types import LogitsRows
from mm_core.zoo import default_model

TEXT = "The quick brown fox jumps over the lazy"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "blue"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
CHOICE = StructuredOutput(choice=("yes", "no", "perhaps not"))
WORDS = StructuredOutput(regex="[a-z]{3,9} [0-9]{1,3}")
SCHEMA = StructuredOutput(json_schema=PERSON)
OBJECT = StructuredOutput(json_object=True)
COUNT = StructuredOutput(grammar='start: item ("," item)*\nitem: /[0-9]{2}/ | "none"')


def params(structured: StructuredOutput | None = None, **more: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 40, "temperature": 0, "structured": structured} | more))


MIX = [
    (TEXT, params(CHOICE)),
    (TEXT, params(max_tokens=60, ignore_eos=True)),  # nothing is asked of it
    (ask(picture(1)), params(SCHEMA, max_tokens=80)),
    ("Another", params(WORDS, temperature=1.0, seed=3)),
    (ask(picture(2), "And this one?"), params(SCHEMA, temperature=1.0, seed=4, max_tokens=80)),
    ("A fourth " * 20, params(WORDS, n=3, temperature=1.0, seed=5)),
    ("Fifth", params(temperature=1.0, seed=9, logprobs=2, ignore_eos=True)),
    ("Sixth", params(OBJECT, temperature=1.0, seed=10, max_tokens=70)),
    (TEXT, params(COUNT, temperature=1.0, seed=11, top_k=40, max_tokens=60)),
    (TEXT, params(WORDS, presence_penalty=1.0, repetition_penalty=1.3, logit_bias={70: 5.0})),
    ("Eleven", params(WORDS, min_tokens=6, top_p=0.7, temperature=1.5, seed=12)),
    ("Twelve", params(CHOICE, temperature=1.0, seed=13, ignore_eos=True, min_p=0.01)),
    ("Thirteen", params(COUNT, min_tokens=50, max_tokens=64, logprobs=1)),
    ("Fourteen", params(SCHEMA, temperature=0.7, seed=14, stop=["blue"], max_tokens=80)),
    ("Fifteen", params(temperature=1.0, seed=15, max_tokens=30, ignore_eos=True)),
    ("Sixteen", params(StructuredOutput(regex="a{5}|b{7}c*"), max_tokens=20)),
]


@pytest.fixture(scope="module")
def overlapped(tiny_path: Path) -> Iterator[Engine]:
    """Steps are launched ahead, and there is so little room that sequences are preempted."""
    kv = KvCacheConfig(num_blocks=16)
    with Engine.from_pretrained(
        tiny_path, kv_cache_config=kv, overlap=True, max_num_batched_tokens=48, show_progress=False
    ) as made:
        yield made


@pytest.fixture(scope="module")
def zoo() -> Iterator[Engine]:
    with Engine.from_pretrained(default_model(), show_progress=False) as made:
        yield made


def answers(outputs: list[RequestOutput]) -> list[list[tuple[Any, ...]]]:
    return [[(one.token_ids, one.text, one.finish_reason) for one in output.outputs] for output in outputs]


def check_person(text: str) -> None:
    found = json.loads(text)
    assert list(found) == ["name", "age", "tags"]
    assert isinstance(found["name"], str)
    assert len(found["name"]) <= 8
    assert type(found["age"]) is int
    assert 0 <= found["age"] <= 120
    assert len(found["tags"]) <= 2
    assert set(found["tags"]) <= {"red", "blue"}


# -- answers are what was asked for --------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_answers_fit(zoo: Engine, temperature: float) -> None:
    specs = [CHOICE, WORDS, SCHEMA, OBJECT, COUNT]
    prompts: list[Any] = [ask(picture(7), "What is in the picture?"), "Tell me."]
    lengths = {OBJECT: 30, COUNT: 30}
    settings = [
        params(s, temperature=temperature, seed=seed, max_tokens=lengths.get(s, 120))
        for s in specs
        for seed in range(2)
    ]
    outputs = zoo.generate(prompts * 5, settings)
    ended = [output for output in outputs if output.finish_reason == "stop"]
    assert len(ended) >= 6
    for output, asked in zip(outputs, settings, strict=True):
        text, spec = output.text, asked.structured
        if output.finish_reason != "stop":
            assert spec in (OBJECT, COUNT)  # which have no end of their own
            assert len(output.token_ids) == 30
        elif spec is CHOICE:
            assert text in ("yes", "no", "perhaps not")
        elif spec is WORDS:
            assert re.fullmatch("[a-z]{3,9} [0-9]{1,3}", text)
        elif spec is SCHEMA:
            check_person(text)
        elif spec is OBJECT:
            assert isinstance(json.loads(text), dict)
        else:
            assert re.fullmatch("([0-9]{2}|none)(,([0-9]{2}|none))*", text)
    settle(zoo)


def test_every_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Families whose tokenizers differ in kind: byte-level, sentencepiece's with and without bytes."""
    for name in ("llava", "blip2-opt", "blip2-t5"):
        family = FAMILIES[name]
        path = family.make(tmp_path_factory.mktemp("family"))
        with Engine.from_pretrained(
            path, plugins=family.modules(), kv_cache_config=KvCacheConfig(num_blocks=256), show_progress=False
        ) as made:
            spec, wanted = StructuredOutput(choice=("the fox", "a dog", "1")), ("the fox", "a dog", "1")
            prompts = family.prompts(1)[:2]
            settings = [params(spec), params(spec, temperature=1.0, seed=1)]
            for output in made.generate(prompts, settings[: len(prompts)]):
                assert output.text in wanted, name
                assert output.finish_reason == "stop"
            (streamed,) = list(made.stream(prompts[0], settings[0]))[-1:]
            assert streamed.text in wanted


# -- against a search ----------------------------------------------------------------------


class Looks:
    """A logits processor that keeps what it sees."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, logits: Tensor, rows: LogitsRows) -> Tensor:
        self.seen.append(logits.clone())
        return logits


def search(engine: Engine, prompt: Any, texts: list[str], limit: int) -> tuple[list[int], str]:
    """The best token that leads to one of `texts`, again and again, by the model's own logits of what came before."""
    tokenizer = engine._frontend.model.processor.tokenizer
    special = set(tokenizer.all_special_ids)
    written = {i: tokenizer.decode([i]) for i in range(len(tokenizer)) if i not in special}
    ids, text = list(engine.generate(prompt, params(max_tokens=1))[0].prompt_token_ids), ""
    answer: list[int] = []
    while len(answer) < limit:
        looks = Looks()
        engine.generate({"prompt_token_ids": ids + answer}, params(max_tokens=1, logits_processors=(looks,)))
        more = {i for i, t in written.items() if t and any(x.startswith(text + t) for x in texts)}
        if not more:
            break
        choices = sorted(more | ({tokenizer.eos_token_id} if text in texts else set()))
        scores = looks.seen[0][0, torch.tensor(choices)]
        token = choices[int(scores.argmax())]
        answer.append(token)
        if token == tokenizer.eos_token_id:
            break
        text += written[token]
    return answer, text


@pytest.mark.parametrize(
    ("spec", "texts"),
    [
        (CHOICE, ["yes", "no", "perhaps not"]),
        (StructuredOutput(regex="(red|blue) [0-9]{1,3}"), [f"{c} {n:0{d}}" for c in ("red", "blue") for d in (1, 2, 3)
                                                           for n in range(10**d)]),
        (StructuredOutput(json_schema={"const": {"a": [1, "the"]}}), []),
    ],
    ids=["choice", "regex", "json"],
)  # fmt: skip
@pytest.mark.parametrize("prompt", [TEXT, "What colour is it?"])
def test_greedy_answers_are_those_of_a_search(
    engine: Engine, overlapped: Engine, spec: StructuredOutput, texts: list[str], prompt: str
) -> None:
    if not texts:
        blanks = ("", " ", "\n")
        texts = [f'{{{a}"a"{b}:{c}[1,{d}"the"]}}' for a in blanks for b in blanks for c in blanks for d in blanks]
    limit = 6 if "{" in texts[0] else 30  # behind that, blanks that the search knows nothing of
    wanted, text = search(engine, prompt, texts, limit)
    for each in (engine, overlapped):
        output = each.generate(prompt, params(spec, max_tokens=limit))[0]
        if "{" in texts[0]:
            kept = len(output.token_ids) if output.text.count(" ") + output.text.count("\n") < 4 else 2
            assert list(output.token_ids)[:kept] == wanted[:kept]
        else:
            assert list(output.token_ids) == wanted
            assert output.text == text


# -- the same tokens, whatever happens beside ----------------------------------------------


def test_tokens_are_the_same_in_every_loop(engine: Engine, overlapped: Engine) -> None:
    prompts, settings = [p for p, _ in MIX], [s for _, s in MIX]
    alone = [engine.generate(p, s)[0] for p, s in MIX]
    assert answers(engine.generate(prompts, settings)) == answers(alone)
    for _ in range(2):  # the second time, prompts are there already
        together = overlapped.generate(prompts, settings)
        assert answers(together) == answers(alone)
    for at in (0, 2, 3, 13):
        last = list(overlapped.stream(prompts[at], settings[at]))[-1]
        assert answers([last]) == answers([alone[at]])
    for each in (engine, overlapped):
        settle(each)
    assert re.fullmatch("[a-z]{3,9} [0-9]{1,3}", alone[9].text)
    assert len({one.text for one in alone[5].outputs}) == 3
    assert len(alone[10].token_ids) >= 6


def test_preempted(engine: Engine, overlapped: Engine) -> None:
    """Eight long answers where there is room for three: most have their grammar told again what they drew."""
    prompts = [f"{word} of eight" for word in ("One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight")]
    specs = [(COUNT, {"min_tokens": 60}), (StructuredOutput(regex="[a-z ]{60,90}"), {})] * 4
    settings = [params(spec, max_tokens=70, temperature=1.0, seed=i, **more) for i, (spec, more) in enumerate(specs)]
    alone = [engine.generate(p, s)[0] for p, s in zip(prompts, settings, strict=True)]
    before = overlapped.stats()["preemptions"]
    overlapped._frontend._core.scheduler.outlook.wants = lambda _: (1, 1)  # else nobody is admitted to be preempted
    together = overlapped.generate(prompts, settings)
    assert overlapped.stats()["preemptions"] > before, "nothing was preempted"
    assert answers(together) == answers(alone)
    settle(overlapped)


def test_neighbours_are_none_the_wiser(engine: Engine, overlapped: Engine) -> None:
    """A request that asks nothing has the same tokens beside those that do."""
    victims = [params(ignore_eos=True), params(temperature=1.0, seed=2, ignore_eos=True)]
    for each in (engine, overlapped):
        plain = [each.generate(TEXT, v)[0] for v in victims]
        specs = [CHOICE, WORDS, SCHEMA, OBJECT]
        asked = [*victims, *(params(s, temperature=1.0, seed=7) for s in specs)]
        beside = each.generate([TEXT] * 6, asked)[:2]
        for one, other in zip(plain, beside, strict=True):
            assert one.token_ids == other.token_ids


def test_logprobs_are_the_models_own(engine: Engine) -> None:
    """What a grammar forbids keeps its probability there."""
    output = engine.generate(TEXT, params(WORDS, logprobs=3))[0]
    free = engine.generate(TEXT, params(logprobs=3, max_tokens=1))[0]
    assert output.logprobs is not None
    assert free.logprobs is not None
    best = {t: p.logprob for t, p in free.logprobs[0].items()}
    assert best.items() <= {t: p.logprob for t, p in output.logprobs[0].items()}.items()
    assert output.token_ids[0] != free.token_ids[0], "the grammar made no difference"


# -- ends ----------------------------------------------------------------------------------


def test_ends(engine: Engine, overlapped: Engine) -> None:
    five = StructuredOutput(regex="a{5}|b{7}")
    for each in (engine, overlapped):
        whole = each.generate(TEXT, params(five))[0]
        count = len(whole.token_ids)
        assert whole.text in ("aaaaa", "bbbbbbb")
        assert whole.finish_reason == "stop"
        assert whole.usage.completion_tokens == count
        # Where the last token is the last that may be drawn, it is the grammar's end that counts.
        assert each.generate(TEXT, params(five, max_tokens=count))[0].finish_reason == "stop"
        cut = each.generate(TEXT, params(five, max_tokens=count - 1))[0]
        assert (cut.finish_reason, cut.token_ids) == ("length", whole.token_ids[:-1])
        # It ends, whatever else is said.
        for more in ({"ignore_eos": True}, {"min_tokens": 40}, {"ignore_eos": True, "min_tokens": 40}):
            assert each.generate(TEXT, params(five, **more))[0].token_ids == whole.token_ids
        long = params(COUNT, min_tokens=20, max_tokens=30, temperature=1.0, seed=1)
        output = each.generate(TEXT, long)[0]
        assert 20 <= len(output.token_ids) <= 30
        shown = each.generate(TEXT, params(COUNT, temperature=1.0, seed=1, include_stop_str_in_output=True))[0]
        assert shown.text
        stopped = each.generate(TEXT, params(COUNT, stop=[","], temperature=1.0, seed=3))[0]
        assert re.fullmatch("[0-9]{2}|none", stopped.text)
        settle(each)


def test_a_stop_token_that_is_text(engine: Engine) -> None:
    spec = StructuredOutput(regex="[ab]{6,9}")
    plain = engine.generate(TEXT, params(spec))[0]
    token = plain.token_ids[1]
    first = plain.token_ids.index(token)
    ended = engine.generate(TEXT, params(spec, stop_token_ids=(token,)))[0]
    assert (ended.finish_reason, ended.outputs[0].stop_reason) == ("stop", token)
    assert ended.token_ids == plain.token_ids[: first + 1]
    later = engine.generate(TEXT, params(spec, stop_token_ids=(token,), min_tokens=6))[0]
    assert token not in later.token_ids[:5]


def test_aborted_and_streamed(engine: Engine, overlapped: Engine) -> None:
    for each in (engine, overlapped):
        stream = each.stream(TEXT, params(OBJECT, max_tokens=200))
        texts = [next(stream).text for _ in range(5)]
        stream.close()
        assert all(b.startswith(a) for a, b in itertools.pairwise(texts))
        settle(each)


def test_awaited(engine: Engine) -> None:
    async def main() -> list[str]:
        made = AsyncEngine(engine._frontend)
        asked = [made.generate(TEXT, params(CHOICE, temperature=1.0, seed=i)) for i in range(6)]
        return [output.text for output in await asyncio.gather(*asked)]

    assert set(asyncio.run(main())) <= {"yes", "no", "perhaps not"}


# -- what cannot be used -------------------------------------------------------------------

BAD: dict[str, dict[str, Any]] = {
    "look-around": {"regex": "(?=a)b"},
    "cycle": {"json_schema": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}},
    "nothing fits": {"json_schema": {"type": "object", "properties": {"a": False}, "required": ["a"]}},
    "conjunction": {"grammar": "start: A\nA: " + " & ".join(f"/.*{c}.{{20}}/" for c in "abcd")},
    "no grammar": {"grammar": "yes or no"},
    "product": {"json_schema": {
        "allOf": [{"anyOf": [{"properties": {f"{i}{j}": {"type": "null"}}} for j in range(9)]} for i in range(9)],
    }},
}  # fmt: skip


@pytest.mark.parametrize("given", BAD.values(), ids=BAD)
def test_what_cannot_be_compiled_ends_one_request(engine: Engine, overlapped: Engine, given: dict[str, Any]) -> None:
    engine.generate(TEXT, params(CHOICE))  # the vocabulary is read by now
    for each in (engine, overlapped):
        canary = Canary(each)
        begun = time.monotonic()
        with pytest.raises(BatchError) as caught:
            each.generate([TEXT, TEXT], [params(StructuredOutput(**given)), params(CHOICE)])
        assert time.monotonic() - begun < 3  # of a second, and what the other answer and a busy machine take
        assert list(caught.value.errors) == [0]
        error = caught.value.errors[0]
        assert isinstance(error, InvalidGrammarError)
        assert error.param == "structured"
        check_message(error)
        assert caught.value.outputs[1].text in ("yes", "no", "perhaps not")
        canary.check()


def test_one_that_grows_too_large_on_its_way(
    engine: Engine, overlapped: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is compiled in no time, and cannot be followed far: that request ends, and says why."""
    monkeypatch.setattr(library_module, "_MAX_LEXER_STATES", 400)
    spec = StructuredOutput(regex="(.*a.{200}|.*b.{200})(.*c.{200}|.*d.{200}){9}")
    for each in (engine, overlapped):
        each.generate(TEXT, params(CHOICE))
        grammars = each._frontend.model.grammars
        monkeypatch.setitem(vars(grammars), "_library", Library(grammars._table))
        canary = Canary(each)
        asked = [params(spec, max_tokens=300, temperature=3.0, seed=1, ignore_eos=True), params(OBJECT, max_tokens=20)]
        with pytest.raises(BatchError) as caught:
            each.generate([TEXT, TEXT], asked)
        assert list(caught.value.errors) == [0]
        assert isinstance(caught.value.errors[0], InvalidGrammarError)
        assert "after" in str(caught.value.errors[0])
        check_message(caught.value.errors[0])
        assert caught.value.outputs[1].token_ids == each.generate(TEXT, asked[1])[0].token_ids
        canary.check()


class Forbids:
    """A logits processor that leaves the scores of nothing but one token."""

    def __call__(self, logits: Tensor, rows: LogitsRows) -> Tensor:
        kept = logits[:, 5].clone()
        logits.fill_(-torch.inf)
        logits[:, 5] = kept
        return logits


def test_processors_come_before_the_mask(engine: Engine, overlapped: Engine) -> None:
    for each in (engine, overlapped):
        canary = Canary(each)
        biased = each.generate(TEXT, params(WORDS, logit_bias=dict.fromkeys(range(200, 260), 100.0)))[0]
        assert re.fullmatch("[a-z]{3,9} [0-9]{1,3}", biased.text)
        with pytest.raises(Exception, match="no token could be drawn"):
            each.generate(TEXT, params(StructuredOutput(regex="[x-z]+"), logits_processors=(Forbids(),)))
        canary.check()


def test_without_the_library(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    kv = KvCacheConfig(num_blocks=64)
    with Engine.from_pretrained(tiny_path, kv_cache_config=kv, show_progress=False) as made:
        for _ in range(2):
            with pytest.raises(MissingExtraError, match="pip install"):
                made.generate(TEXT, params(CHOICE))
        assert made.generate(TEXT, params(max_tokens=3))[0].token_ids


def test_the_example_of_the_documentation(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    (code,) = re.findall(r"```python\n(.*?)```", (root / "docs/structured-output.md").read_text("utf-8"), re.DOTALL)
    exec(compile(code, "structured-output.md", "exec"), {"__name__": "example"})
    choice, found = capsys.readouterr().out.strip().splitlines()[-2:]
    assert choice in ("red", "green", "blue")
    assert "'colour':" in found


@pytest.mark.slow
def test_in_a_process_of_its_own(tiny_path: Path) -> None:
    """Only what is asked for crosses; the engine's process compiles it beside its loop."""
    settings = [params(CHOICE), params(WORDS, temperature=1.0, seed=3), params(SCHEMA, max_tokens=80), params()]
    kv = KvCacheConfig(num_blocks=128)
    with Engine.from_pretrained(tiny_path, kv_cache_config=kv, show_progress=False) as made:
        wanted = answers([made.generate(TEXT, s)[0] for s in settings])
    with Engine.from_pretrained(tiny_path, kv_cache_config=kv, show_progress=False, engine_process=True) as made:
        made._frontend.pipeline.warm_grammars()
        assert answers(made.generate([TEXT] * 4, settings)) == wanted
        with pytest.raises(InvalidGrammarError, match="look-around"):
            made.generate(TEXT, params(StructuredOutput(regex="(?=a)b")))
        stream = made.stream(TEXT, params(StructuredOutput(regex="[a-z]{40,60}"), max_tokens=60))
        assert next(stream).text
        stream.close()
        assert answers(made.generate(TEXT, settings[0])) == wanted[:1]
