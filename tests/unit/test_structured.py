"""Structured output without a model: what may be asked for, what is compiled, and which tokens a grammar allows."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.e2e import check_message

from mm_core import SamplingParams, StructuredOutput
from mm_core.engine.grammars import GrammarDesk
from mm_core.engine.messages import Submit
from mm_core.errors import (
    EngineClosedError,
    EngineError,
    InvalidGrammarError,
    InvalidParamsError,
    MissingExtraError,
    MMError,
    OverloadedError,
)
from mm_core.structured import library as library_module
from mm_core.structured.check_main import read_message, write_message
from mm_core.structured.checker import Checker
from mm_core.structured.grammar import grammar_text
from mm_core.structured.grammars import MAX_WAITING, Grammars, outcome
from mm_core.structured.library import Library, TokenTable
from mm_core.structured.matcher import Compiled, Matcher, clear_tokens, fill_masks
from mm_core.structured.tokens import read_tokens
from mm_core.types import FinishReason, PreparedRequest

# Bytes, then words of several; one special token, and two that end an answer.
WORDS = [b"ab", b"abc", b"{}", b'{"', b'"}', b'":', b"12", b"  ", b"\n  ", b" a", b"aa", "é".encode(), "€".encode()[:2]]
TOKENS = [bytes([i]) for i in range(256)] + WORDS + [b"", b"", b"", b""]
SPECIAL, END, OTHER_END, PADDING = range(len(TOKENS) - 4, len(TOKENS))
TABLE = TokenTable(TOKENS, [SPECIAL, PADDING], [END, OTHER_END])
SPACED = TokenTable(TOKENS, [SPECIAL, PADDING], [END, OTHER_END], leading_space=True)

NESTED: dict[str, Any] = {"type": "string"}
for _ in range(25):
    NESTED = {"type": "object", "properties": {"a": NESTED}, "required": ["a"]}
CYCLE = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(TABLE)


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    made = Grammars(lambda: TABLE)
    made.warm()
    yield made
    made.close()


def follow(library: Library, spec: StructuredOutput, table: TokenTable = TABLE) -> Matcher:
    return Matcher(Compiled(library, grammar_text(spec, table.leading_space)))


def allowed(matcher: Matcher) -> set[int]:
    masks = np.zeros((1, matcher.compiled.library.mask_words), np.int32)
    fill_masks([matcher], masks)
    assert matcher.error is None
    bits = np.unpackbits(masks[0].view(np.uint8), bitorder="little")
    return set(np.nonzero(bits)[0].tolist())


def say(matcher: Matcher, text: str | bytes) -> bool:
    """Byte by byte, each looked up in the mask before; False at the first that is not allowed."""
    for byte in text.encode() if isinstance(text, str) else text:
        if not matcher.open or byte not in allowed(matcher):
            return False
        matcher.accept(matcher.length, byte)
    return True


def fits(library: Library, spec: StructuredOutput, text: str) -> bool:
    """Whether a text is a whole answer."""
    matcher = follow(library, spec)
    return say(matcher, text) and (matcher.ended or END in allowed(matcher))


# -- what may be asked for -----------------------------------------------------------------


def deep(count: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(count):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, "has nothing; give one of"),
        ({"json_object": False}, "has nothing"),
        ({"regex": "a", "choice": ["b"]}, "has regex and choice"),
        ({"regex": ""}, "regex is empty"),
        ({"regex": "a" * 9000}, "the limit is 8192"),
        ({"regex": "(" * 65 + ")" * 65}, "nests 65 brackets, the limit is 64"),
        ({"regex": "\ud800"}, "half a surrogate pair"),
        ({"regex": 5}, "valid string"),
        ({"grammar": "a" * 70_000}, "the limit is 65536"),
        ({"choice": ["a", ""]}, "empty entry"),
        ({"choice": ["a"] * 1001}, "1001 entries, the limit is 1000"),
        ({"choice": ["a" * 70_000]}, "the limit is 65536"),
        ({"choice": ["\udfff"]}, "half a surrogate pair"),
        ({"json_schema": "{"}, "is no JSON"),
        ({"json_schema": "[]"}, "has to be a JSON object"),
        ({"json_schema": '{"minimum": NaN}'}, "number that is none in JSON"),
        ({"json_schema": '{"minimum": 1' + "0" * 5000 + "}"}, "thousands of digits"),
        ({"json_schema": {"minimum": float("nan")}}, "no JSON can be made of it"),
        ({"json_schema": {"a": {1, 2}}}, "no JSON can be made of it"),
        ({"json_schema": deep(65)}, "nests 66 brackets"),
        ({"json_schema": deep(5000)}, "no JSON can be made of it"),
        ({"json_schema": {"description": "x" * 70_000}}, "the limit is 65536"),
        ({"json_schema": {"$ref": "http://127.0.0.1/a.json"}}, "something outside of it"),
        ({"json_schema": {"items": [{"$ref": "file:///etc/passwd"}]}}, "something outside of it"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bounds(given: dict[str, Any], wanted: str) -> None:
    with pytest.raises(InvalidGrammarError, match=re.escape(wanted)) as caught:
        StructuredOutput(**given)
    check_message(caught.value)


def test_brackets_within_strings_do_not_count() -> None:
    text = json.dumps({"description": '[{("' * 100})
    assert StructuredOutput(json_schema=text).json_schema == text


def test_params_hold_it() -> None:
    spec = StructuredOutput(choice=["a", "b"])
    assert spec.choice == ("a", "b")
    params = SamplingParams(structured=spec)
    assert SamplingParams(**params.model_dump()).structured == spec  # as it crosses to another process
    with pytest.raises(InvalidParamsError, match="structured"):
        SamplingParams(structured="json")


# -- which tokens are allowed --------------------------------------------------------------


def viable(texts: Sequence[bytes], begun: bytes) -> bool:
    return any(text.startswith(begun) for text in texts)


@pytest.mark.parametrize(
    "texts",
    [["a", "ab", "abc", "aab"], ["{}", '{"', "12", "1"], ["é", "€", "aé"], ["a/b", "a\\b", "a.b", "\n", "\x01"]],
    ids=repr,
)
@pytest.mark.parametrize("how", ["choice", "regex", "grammar"])
def test_masks_are_what_a_search_finds(library: Library, texts: list[str], how: str) -> None:
    """In every state that tokens lead to: a token is allowed if, and only if, some answer goes on with it."""
    if how == "choice":
        spec = StructuredOutput(choice=texts)
    elif how == "regex":
        spec = StructuredOutput(regex="|".join(re.escape(t) if t.isprintable() else f"\\x{ord(t):02x}" for t in texts))
    else:
        spec = StructuredOutput(grammar="start: " + " | ".join(json.dumps(t, ensure_ascii=False) for t in texts[:4]))
        if "\x01" in texts:
            texts = texts[:4]
    answers = [t.encode() for t in texts]
    states: list[tuple[int, ...]] = [()]
    seen = 0
    while states:
        tokens = states.pop()
        begun = b"".join(TOKENS[i] for i in tokens)
        matcher = follow(library, spec)
        for at, token in enumerate(tokens):
            matcher.accept(at, token)
        more = {i for i, t in enumerate(TOKENS) if t and viable(answers, begun + t)}
        assert matcher.ended == (not more)
        if not matcher.ended:
            wanted = more | ({END, OTHER_END} if begun in answers else set())
            assert allowed(matcher) == wanted
        seen += 1
        states += [(*tokens, token) for token in more]
    assert seen >= 8


@pytest.mark.parametrize("expression", ["[a-c]{2,4}", "(ab|a)*12", r"\{(a|b)+\}", "a?b?c?", "(a|b|ab)+"])
def test_what_is_drawn_from_the_masks_matches(library: Library, expression: str) -> None:
    spec, dice = StructuredOutput(regex=expression), random.Random(expression)
    for _ in range(20):
        matcher, text = follow(library, spec), b""
        while matcher.open and len(text) < 30:
            token = dice.choice(sorted(allowed(matcher)))
            matcher.accept(matcher.length, token)
            text += TOKENS[token]
        assert matcher.error is None
        if matcher.ended:
            assert re.fullmatch(expression, text.decode())


def test_json_is_what_it_says(library: Library) -> None:
    spec = StructuredOutput(json_schema=PERSON)
    good = ['{"name":"a","age":7}', '{ "name": "a b",\n  "age": 120\n}', '{"name":"","age":0}']
    bad = [
        '{"age":7,"name":"a"}',
        '{"name":"a"}',
        '{"name":"a","age":121}',
        '{"name":"0123456789","age":1}',
        "[]",
        " {",
    ]
    assert [fits(library, spec, text) for text in good] == [True] * 3
    assert [fits(library, spec, text) for text in bad] == [False] * 6
    anything = StructuredOutput(json_object=True)
    assert fits(library, anything, '{"a": [1.5e3, true, null, {"b": "\\n"}], "": -0}')
    assert not fits(library, anything, "[1]")
    assert not fits(library, anything, '{"a": 01}')
    one = StructuredOutput(json_schema={"oneOf": [{"type": "null"}, {"type": "integer"}]})  # read as anyOf
    assert fits(library, one, "12")
    # A schema's own options do not count.
    free = StructuredOutput(json_schema={**PERSON, "x-guidance": {"whitespace_pattern": ".*", "lenient": True}})
    assert not say(follow(library, free), '{"name" x')


def test_blanks_come_to_an_end(library: Library) -> None:
    """Between any two parts: one, or a line's end and an indent."""
    spec = StructuredOutput(json_schema=PERSON)
    assert say(follow(library, spec), '{\n        "name" : "x"')
    for text in ("{  ", "{\n\n", "{ \n", "{\t", "{\n" + " " * 33, '{"name":  ', '{"name":"x",\n\n'):
        assert not say(follow(library, spec), text), text
    dice = random.Random(0)
    for _ in range(20):  # a model that draws blanks wherever it may
        matcher, text = follow(library, spec), b""
        while matcher.open:
            tokens = allowed(matcher)
            blank = [i for i in tokens if TOKENS[i] and not TOKENS[i].strip()]
            token = dice.choice(sorted(blank or tokens))
            matcher.accept(matcher.length, token)
            text += TOKENS[token]
        assert matcher.error is None
        assert json.loads(text).keys() == {"name", "age"}


def test_no_special_token_is_allowed(library: Library) -> None:
    spec = StructuredOutput(regex="(?s:.)*")
    assert not allowed(follow(library, spec)) & {SPECIAL, PADDING}
    assert {END, OTHER_END} <= allowed(follow(library, spec))


def test_a_grammar_cannot_name_special_tokens(grammars: Grammars) -> None:
    for token in (SPECIAL, PADDING):
        matcher = Matcher(outcome(grammars.start(StructuredOutput(grammar=f'start: "a" (<[{token}]> | "b")'))))
        assert say(matcher, "a")
        assert allowed(matcher) == {ord("b")}
        stuck = Matcher(outcome(grammars.start(StructuredOutput(grammar=f'start: "a" <[{token}]>'))))
        assert say(stuck, "a")
        masks = np.zeros((1, stuck.compiled.library.mask_words), np.int32)
        fill_masks([stuck], masks)
        assert stuck.error is not None
        assert (masks == -1).all()


def test_a_space_that_is_not_in_the_text(library: Library) -> None:
    """Tokenizers of sentencepiece's kind drop the space that the first token begins with."""
    for spec in (
        StructuredOutput(choice=["ab", "12"]),
        StructuredOutput(regex="ab|12"),
        StructuredOutput(grammar='start: a | "12"\na: "ab"'),
    ):
        assert not say(follow(library, spec, SPACED), "ab")
        for text in (" ab", " 12"):
            matcher = follow(library, spec, SPACED)
            assert say(matcher, text)
            assert matcher.ended
    assert say(follow(library, StructuredOutput(json_schema=PERSON), SPACED), ' {"name"')
    assert not say(follow(library, StructuredOutput(json_schema=PERSON), SPACED), "  {")


def test_without_ends_an_answer_ends_where_nothing_follows() -> None:
    library = Library(TokenTable(TOKENS, [SPECIAL, END, OTHER_END, PADDING], []))
    matcher = follow(library, StructuredOutput(choice=["ab", "abc"]))
    assert say(matcher, "ab")
    assert allowed(matcher) - {ord("c")} == {len(TOKENS)}  # behind the vocabulary: no score is there
    assert say(matcher, "c")
    assert matcher.ended


# -- following an answer -------------------------------------------------------------------


def test_tokens_may_be_told_twice_and_taken_back(library: Library) -> None:
    spec = StructuredOutput(regex="[ab]{3}|a12")
    matcher = follow(library, spec)
    for at, token in enumerate(b"aab"):
        matcher.accept(at, token)
        matcher.accept(at, token)
    assert matcher.ended
    matcher.accept(1, ord("1"))  # what was in flight was drawn anew
    assert (matcher.length, matcher.ended, allowed(matcher)) == (2, False, {ord("2")})
    matcher.rewind(0)
    assert allowed(matcher) == allowed(follow(library, spec))
    matcher.accept(0, ord("a"))
    matcher.accept(1, END)  # not allowed there
    assert matcher.ended
    matcher.rewind(1)
    matcher.accept(1, ord("x"))
    assert matcher.error is not None
    check_message(matcher.error)
    matcher.accept(2, ord("x"))  # nothing more happens
    matcher.rewind(1)
    assert matcher.open
    assert say(matcher, "12")


def test_many_masks_at_once(library: Library) -> None:
    specs = [StructuredOutput(json_schema=PERSON), StructuredOutput(choice=["ab", "a12"]), StructuredOutput(regex="a+")]
    matchers = [follow(library, specs[i % 3]) for i in range(10)]
    for matcher in matchers:
        say(matcher, "{" if matcher is matchers[0] else "a")
    matchers[4].fail("of a test")
    matchers[7].ended = True
    masks = np.zeros((10, library.mask_words), np.int32)
    fill_masks(matchers, masks)
    for at in set(range(10)) - {4, 7}:
        alone = np.zeros((1, library.mask_words), np.int32)
        fill_masks([matchers[at]], alone)
        assert (masks[at] == alone[0]).all()
    assert (masks[[4, 7]] == -1).all()
    fill_masks([matchers[4]], masks[4:5])
    assert (masks[4] == -1).all()


def test_tokens_are_taken_out_only_if_others_are_left() -> None:
    mask = np.array([-1, 0, 5], np.int32)
    clear_tokens(mask, frozenset({0, 31, 64, 200, -4}))
    assert mask.tolist() == [0x7FFFFFFE, 0, 4]
    alone = np.array([0, 5], np.int32)
    clear_tokens(alone, frozenset({32, 34}))
    assert alone.tolist() == [0, 5]


# -- compiling -----------------------------------------------------------------------------

REFUSED = {
    "look-around": {"regex": "(?=a)b"},
    "backreference": {"regex": r"(a)\1"},
    "brackets": {"regex": "(a"},
    "cycle": {"json_schema": CYCLE},
    "only itself": {"json_schema": {"allOf": [{"$ref": "#"}]}},
    "no such definition": {"json_schema": {"$ref": "#/$defs/x"}},
    "nothing fits": {"json_schema": {"type": "object", "properties": {"a": False}, "required": ["a"]}},
    "unknown keyword": {"json_schema": {"not": {"type": "string"}}},
    "wrong type": {"json_schema": {"type": "strong"}},
    "no grammar": {"grammar": "yes or no"},
    "no start": {"grammar": 'a: "x"'},
    "endless": {"grammar": "start: a\na: a"},
}
TRIED = {
    "nested repetition": {"regex": "(a+)+$"},
    "ambiguous": {"regex": "(a|aa|a*)*b"},
    "states": {"regex": ".*a.{500}"},
    "counts": {"regex": "((((a{100}){100}){100}){100}){100}"},
    "a large count": {"regex": "a{1000000000}"},
    "alternatives": {"regex": "|".join(f"w{i}" for i in range(1500))},
    "classes": {"regex": r"(\p{L}{1,100}){1,50}"},
    "choices": {"choice": [f"option number {i}" for i in range(1000)]},
    "deep": {"json_schema": NESTED},
    "doubling": {"json_schema": {
        "$ref": "#/$defs/d0",
        "$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(30)}
        | {"d30": {"type": "null"}},
    }},
    "properties": {"json_schema": {
        "type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}, "required": ["p7"],
    }},
    "values": {"json_schema": {"enum": [f"value number {i}" for i in range(2500)]}},
    "items": {"json_schema": {"type": "array", "items": {"type": "null"}, "minItems": 10**9}},
    "conjunction": {"grammar": "start: A\nA: " + " & ".join(f"/.*{c}.{{20}}/" for c in "abcd")},
    "brackets": {"regex": "(" * 64 + "a" + ")" * 64},
}  # fmt: skip


@pytest.mark.parametrize("given", REFUSED.values(), ids=REFUSED)
def test_refused(grammars: Grammars, given: dict[str, Any]) -> None:
    with pytest.raises(InvalidGrammarError) as caught:
        outcome(grammars.start(StructuredOutput(**given), check=True))
    check_message(caught.value)
    assert caught.value.param == "structured"


@pytest.mark.parametrize("given", TRIED.values(), ids=TRIED)
def test_whatever_is_asked_for_is_decided_in_a_second(grammars: Grammars, given: dict[str, Any]) -> None:
    """And followed for a while: each step is bounded, too."""
    begun = time.perf_counter()
    try:
        matcher = Matcher(outcome(grammars.start(StructuredOutput(**given), check=True)))
    except InvalidGrammarError:
        matcher = None
    assert time.perf_counter() - begun < 2  # the limit of 1 s, and what a busy machine adds
    dice = random.Random(0)
    masks = np.zeros((1, -(-len(TOKENS) // 32)), np.int32)
    for _ in range(50 if matcher is not None else 0):
        begun = time.perf_counter()
        fill_masks([matcher], masks)
        if not matcher.open:
            break
        bits = np.nonzero(np.unpackbits(masks[0].view(np.uint8), bitorder="little"))[0]
        matcher.accept(matcher.length, int(dice.choice(bits)))
        assert time.perf_counter() - begun < 0.5
    assert outcome(grammars.start(StructuredOutput(choice=["a"]), check=True))


def test_outcomes_are_kept(grammars: Grammars) -> None:
    good, bad = StructuredOutput(regex="kept[0-9]"), StructuredOutput(regex="(?=kept)")
    first = outcome(grammars.start(good, check=True))
    assert outcome(grammars.start(StructuredOutput(regex="kept[0-9]"))) is first
    with pytest.raises(InvalidGrammarError):
        outcome(grammars.start(bad, check=True))
    refused = grammars.start(bad)
    assert refused.done()
    errors = []
    for _ in range(2):
        with pytest.raises(InvalidGrammarError) as caught:
            outcome(grammars.start(bad, check=True))
        errors.append(caught.value)
    assert grammars.start(bad) is refused
    assert errors[0] is not errors[1]  # nobody else's trace is in it


def test_what_is_kept_is_bounded() -> None:
    grammars = Grammars(lambda: TABLE, kept_bytes=10 * 2**21)
    try:
        specs = [StructuredOutput(choice=[f"a{i}"]) for i in range(30)]
        for spec in specs:
            grammars.start(spec).result()
        deadline = time.monotonic() + 5
        while grammars.kept[1] > 10 * 2**21 and time.monotonic() < deadline:
            time.sleep(0.01)
        count, size = grammars.kept
        assert 1 <= count <= 10
        assert size <= 10 * 2**21
        last, first = grammars.start(specs[-1]), grammars.start(specs[0])
        assert last.done()
        assert first.result()  # made anew
        large = StructuredOutput(grammar="start: " + " | ".join(f'"word {i}"' for i in range(4000)))
        before = grammars.kept[0]
        grammars.start(large).result()
        deadline = time.monotonic() + 5
        while grammars.kept[0] > before - 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert grammars.kept[0] <= before - 2  # it takes the room of several
    finally:
        grammars.close()
    with pytest.raises(EngineClosedError):
        grammars.start(specs[0])


class SlowChecker:
    """In the checking process' place: each grammar takes until it is told to go on; tells which it was asked."""

    pid = None

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.go = threading.Semaphore(0)

    def begin(self) -> None:
        return

    def check(self, text: str) -> int:
        self.texts.append(text)
        assert self.go.acquire(timeout=10)
        return 1

    def close(self) -> None:
        self.go.release(1000)

    def asked(self, grammars: Grammars, specs: Sequence[StructuredOutput], wanted: int) -> list[int]:
        """Which of the specs it was asked, once it was asked so many."""
        deadline = time.monotonic() + 10
        while len(self.texts) < wanted and time.monotonic() < deadline:
            time.sleep(0.002)
        texts = [grammar_text(spec, False) for spec in specs]
        return [texts.index(text) for text in self.texts]


@pytest.fixture
def slow() -> Iterator[tuple[Grammars, SlowChecker]]:
    grammars, checker = Grammars(lambda: TABLE), SlowChecker()
    grammars._checker = checker  # type: ignore[assignment]
    yield grammars, checker
    checker.close()
    grammars.close()


SPECS = [StructuredOutput(regex=f"a{i}") for i in range(300)]


def test_what_nobody_waits_for_is_not_compiled(slow: tuple[Grammars, SlowChecker]) -> None:
    grammars, checker = slow
    first, second, third = (grammars.start(spec, check=True) for spec in SPECS[:3])
    also = grammars.start(SPECS[2], check=True)
    assert checker.asked(grammars, SPECS, 1) == [0]
    assert second.cancel()
    assert third.cancel()  # somebody else waits for it
    assert first.cancel()  # begun: it is kept all the same
    assert grammars.waiting == 1
    checker.go.release(2)
    assert also.result(10)
    assert checker.asked(grammars, SPECS, 2) == [0, 2]
    assert grammars.kept[0] == 2
    assert grammars.start(SPECS[0]).done()
    again = grammars.start(SPECS[1], check=True)
    assert checker.asked(grammars, SPECS, 3) == [0, 2, 1]
    checker.go.release()
    assert again.result(10)


def test_who_waits_takes_turns(slow: tuple[Grammars, SlowChecker]) -> None:
    """By the key's half of the salt; one that several wait for has its place with each of them."""
    grammars, checker = slow
    key, other = "k" * 32, "o" * 32
    for i in range(5):
        grammars.start(SPECS[i], check=True, salt=key + str(i))
    assert checker.asked(grammars, SPECS, 1) == [0]
    grammars.start(SPECS[4], check=True, salt=other)
    grammars.start(SPECS[5], check=True, salt=other)
    last = grammars.start(SPECS[6], check=True)
    checker.go.release(10)
    assert last.result(10)
    assert checker.asked(grammars, SPECS, 7) == [0, 1, 4, 6, 2, 5, 3]


def test_how_many_may_wait(slow: tuple[Grammars, SlowChecker]) -> None:
    grammars, checker = slow
    grammars.start(SPECS[0], check=True, salt="a")
    assert checker.asked(grammars, SPECS, 1) == [0]
    waiting = [grammars.start(spec, check=True, salt="a", bounded=True) for spec in SPECS[1 : 1 + MAX_WAITING // 4]]
    assert grammars.start(SPECS[1], salt="a", bounded=True)  # no other one
    with pytest.raises(OverloadedError) as caught:
        grammars.start(SPECS[299], check=True, salt="a", bounded=True)
    check_message(caught.value)
    assert grammars.start(SPECS[299], check=True, salt="a").cancel()  # of a program, whose requests are its own
    for at, salt in enumerate("bcd"):
        begin = MAX_WAITING // 4 * (at + 1)
        waiting += [grammars.start(s, salt=salt, bounded=True) for s in SPECS[begin + 1 : begin + 1 + MAX_WAITING // 4]]
    with pytest.raises(OverloadedError):
        grammars.start(SPECS[299], salt="e", bounded=True)
    assert all(ticket.cancel() for ticket in waiting[1:])
    assert grammars.waiting == 1
    threading.Timer(0.1, checker.go.release).start()  # close() waits for what is being checked
    grammars.close()
    assert waiting[0].cancelled()


def test_a_vocabulary_that_cannot_be_read_is_read_once() -> None:
    """A tokenizer of some family, which no grammar can follow: its requests are refused, and say why."""
    tried: list[int] = []

    def broken() -> TokenTable:
        tried.append(1)
        raise TypeError("sequence item 0: expected str instance, NoneType found")

    grammars = Grammars(broken)
    try:
        for spec in SPECS[:2]:
            with pytest.raises(InvalidGrammarError, match="reading it fails with TypeError") as caught:
                outcome(grammars.start(spec, check=True))
            check_message(caught.value)
        with pytest.raises(InvalidGrammarError):
            grammars.warm()
    finally:
        grammars.close()
    assert len(tried) == 1


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    grammars = Grammars(lambda: TABLE)
    try:
        for _ in range(2):
            with pytest.raises(MissingExtraError, match=r"pip install 'mm-core\[structured\]'"):
                outcome(grammars.start(StructuredOutput(json_object=True), check=True))
        assert grammars.kept == (0, 0)  # it may be installed by then
    finally:
        grammars.close()


# -- the process that tries them -----------------------------------------------------------


def wait_for_another(checker: Checker, pid: int | None) -> int:
    deadline = time.monotonic() + 30
    while checker.pid in (None, pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert checker.pid not in (None, pid)
    return checker.pid or 0


def test_one_that_takes_too_long_is_killed() -> None:
    checker = Checker(lambda: TABLE, limit_s=0.3)
    try:
        good = grammar_text(StructuredOutput(choice=["a"]), False)
        assert checker.check(good) >= 0
        pid = checker.pid
        assert pid is not None
        signal_process(pid, signal.SIGSTOP)  # it answers nothing any more
        begun = time.monotonic()
        with pytest.raises(InvalidGrammarError, match=r"more than 0\.3 s"):
            checker.check(good)
        assert time.monotonic() - begun < 0.8
        other = wait_for_another(checker, pid)
        assert checker.check(good) >= 0  # by the next one, which was there already
        assert checker.pid == other
        signal_process(other, signal.SIGKILL)
        time.sleep(0.05)
        assert checker.check(good) >= 0  # found dead before anything was sent
    finally:
        checker.close()
    with pytest.raises(EngineError):
        checker.check(good)


def signal_process(pid: int, number: signal.Signals) -> None:
    os.kill(pid, number)


def test_one_that_ends_the_process_is_refused() -> None:
    checker = Checker(lambda: TABLE, limit_s=5)
    try:
        good = grammar_text(StructuredOutput(choice=["a"]), False)
        checker.check(good)
        pid = checker.pid
        assert pid is not None
        signal_process(pid, signal.SIGSTOP)
        threading.Timer(0.2, signal_process, (pid, signal.SIGKILL)).start()
        with pytest.raises(InvalidGrammarError, match="too much memory"):
            checker.check(good)
        wait_for_another(checker, pid)
        assert checker.check(good) >= 0
    finally:
        checker.close()


def test_its_memory_is_bounded() -> None:
    """A process that may take no more than it has refuses what a usual one takes."""
    code = (
        "from mm_core.structured import check_main\n"
        "check_main.GROWTH_BYTES = 2 ** 22\n"
        "check_main.main()\n"
    )  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, stderr=subprocess.DEVNULL)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        write_message(process.stdin, [TABLE.tokens, TABLE.special, TABLE.ends])
        assert read_message(process.stdout) == ["", 0]
        schema = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}}
        write_message(process.stdin, grammar_text(StructuredOutput(json_schema=schema), False))
        try:
            error, _ = read_message(process.stdout)
        except EOFError:
            error = "died"
        assert error
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_it_imports_nothing_from_the_working_directory(tmp_path: Path) -> None:
    """A file that lies where the server was started must not run."""
    (tmp_path / "resource.py").write_text("import os\nos.write(1, b'taken')\nos._exit(0)\n", encoding="utf-8")
    program = (
        "from mm_core.structured.checker import Checker\nfrom mm_core.structured.library import TokenTable\n"
        "c = Checker(lambda: TokenTable([b'a', b'b'], [], []))\n"
        "c.begin(); print(c._process.stdout.read(5)); c.close()\n"
    )
    found = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stdout.startswith("b'")
    assert "taken" not in found.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone says so")
def test_it_may_do_next_to_nothing() -> None:
    checker = Checker(lambda: TABLE)
    try:
        checker.check(grammar_text(StructuredOutput(choice=["a"]), False))
        told = Path(f"/proc/{checker.pid}/status").read_text(encoding="utf-8")
        fields = dict(line.split(":\t", 1) for line in told.splitlines() if ":\t" in line)
        assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")
        assert int(fields["CapEff"], 16) == 0
        limits = Path(f"/proc/{checker.pid}/limits").read_text(encoding="utf-8")
        assert re.search(r"Max open files\s+64 ", limits)
        assert re.search(r"Max file size\s+0 ", limits)
    finally:
        checker.close()


# -- a model's tokenizer -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen2", "llama", "opt", "t5", "nougat"])
def test_tokens_of_tokenizers(kind: str) -> None:
    """Some answer of a choice is drawn by every tokenizer, whose own decoding gives it back."""
    from support import tiny_blip2, tiny_llava, tiny_nougat

    make = {"qwen2": tiny_llava.qwen_tokenizer, "llama": tiny_llava.llama_tokenizer, "nougat": tiny_nougat._tokenizer}
    tokenizer = make[kind]() if kind in make else tiny_blip2.make_tokenizer(kind)
    width, ends = len(tokenizer) + 7, [tokenizer.eos_token_id, len(tokenizer) + 100]
    table = read_tokens(tokenizer, width, ends)
    assert len(table.tokens) == width
    assert table.ends == [tokenizer.eos_token_id]
    assert set(range(len(tokenizer), width)) | set(tokenizer.all_special_ids) <= set(table.special)
    assert not any(table.tokens[i] for i in table.special)
    assert table.leading_space == (kind in ("llama", "t5"))
    library, dice = Library(table), random.Random(kind)
    for spec, check in (
        (StructuredOutput(choice=["the cat", "a dog", " x"]), lambda text: text in ("the cat", "a dog", " x")),
        (StructuredOutput(regex="[a-z ]{5,9}"), lambda text: re.fullmatch("[a-z ]{5,9}", text)),
    ):
        for _ in range(10):
            matcher, ids = follow(library, spec, table), []
            while matcher.open:
                ids.append(dice.choice(sorted(allowed(matcher))))
                matcher.accept(len(ids) - 1, ids[-1])
            assert matcher.error is None
            assert check(tokenizer.decode(ids, skip_special_tokens=True)), ids


def test_a_tokenizer_whose_texts_are_not_its_tokens() -> None:
    from support.tiny_blip2 import make_qformer_tokenizer

    with pytest.raises(InvalidGrammarError, match="tokenizer cannot be used"):
        read_tokens(make_qformer_tokenizer(), 100, [])
    with pytest.raises(InvalidGrammarError, match="none of the tokenizers library"):
        read_tokens(object(), 100, [])


def test_word_pieces() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = ["[UNK]", "[END]", "a", "b", "##b", "##c", "cat", "##s", "a1"]
    backend = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[END]")
    table = read_tokens(tokenizer, 9, [1])
    assert table.leading_space
    assert table.tokens == [b"", b"", b" a", b" b", b"b", b"c", b" cat", b"s", b" a1"]
    matcher = follow(Library(table), StructuredOutput(regex="cats? b"), table)
    assert [allowed(matcher)] == [{6}]
    for at, token in enumerate((6, 7, 3)):
        matcher.accept(at, token)
    assert matcher.ended
    assert tokenizer.decode([6, 7, 3]) == "cats b"


# -- requests that wait for their grammar --------------------------------------------------


class LateGrammars:
    """Compiles when it is told to."""

    def __init__(self) -> None:
        self.futures: dict[StructuredOutput, list[Future[Any]]] = {}

    def start(self, spec: StructuredOutput, *, salt: str | None = None) -> Future[Any]:
        assert salt is None
        self.futures.setdefault(spec, []).append(Future())
        return self.futures[spec][-1]


def request(name: str, **settings: Any) -> PreparedRequest:
    return PreparedRequest(name, (1, 2), SamplingParams(**settings))


def test_a_request_is_submitted_again_when_its_grammar_is_there(library: Library) -> None:
    desk, sent = GrammarDesk(), []
    desk.wake = sent.append
    late = LateGrammars()
    desk.source = late  # type: ignore[assignment]
    plain = request("p", n=2)
    assert desk.ready(plain)
    assert desk.matchers(plain) == [None, None]
    spec = StructuredOutput(choice=["a"])
    one, two, three = (request(name, structured=spec, n=2) for name in ("1", "2", "3"))
    assert [desk.ready(r) for r in (one, two, three)] == [False] * 3
    assert desk.held == ["1", "2", "3"]
    ended = desk.abort("2", FinishReason.ABORT)
    assert [(o.request_id, o.index, o.finish_reason) for o in ended] == [("2", 0, "abort"), ("2", 1, "abort")]
    assert desk.abort("2", FinishReason.ABORT) == desk.abort("p", FinishReason.ABORT) == []
    assert [future.cancelled() for future in late.futures[spec]] == [False, True, False]
    for future in late.futures[spec][::2]:
        future.set_result(Compiled(library, grammar_text(spec, False)))
    assert [m.request.request_id for m in sent if isinstance(m, Submit)] == ["2", "1", "3"]
    assert [desk.ready(m.request) for m in sent] == [False, True, True]  # type: ignore[union-attr]
    assert len(late.futures[spec]) == 3
    assert desk.held == []
    first, second = desk.matchers(one)
    assert first is not second
    assert isinstance(first, Matcher)


def test_a_grammar_that_fails_late_ends_its_request() -> None:
    desk = GrammarDesk()
    late = LateGrammars()
    desk.source = late  # type: ignore[assignment]
    asked = request("1", structured=StructuredOutput(choice=["a"]))
    assert not desk.ready(asked)
    late.futures[StructuredOutput(choice=["a"])][0].set_exception(InvalidGrammarError("No.", param="structured"))
    with pytest.raises(InvalidGrammarError, match="No"):
        desk.ready(asked)
    assert desk.held == []
    desk.source = None
    with pytest.raises(MMError, match="no structured output"):
        desk.ready(request("2", structured=StructuredOutput(choice=["a"])))


# -- grammars whose states are used up -----------------------------------------------------


def draw_any(matcher: Matcher, dice: random.Random, limit: int) -> int:
    """Tokens drawn until it is not open, or there are so many."""
    while matcher.open and matcher.length < limit:
        masks = np.zeros((1, matcher.compiled.library.mask_words), np.int32)
        fill_masks([matcher], masks)
        if matcher.open:
            bits = np.nonzero(np.unpackbits(masks[0].view(np.uint8), bitorder="little"))[0]
            matcher.accept(matcher.length, int(dice.choice([b for b in bits if b not in (END, OTHER_END)] or [END])))
    return matcher.length


def test_a_grammar_is_renewed_when_its_states_are_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of a matcher share states: one answer's must not be at the cost of the next one's."""
    monkeypatch.setattr(library_module, "_MAX_LEXER_STATES", 600)
    compiled = Compiled(Library(TABLE), grammar_text(StructuredOutput(regex="(.*a.{60}|.*b.{60}).*"), False))
    dice = random.Random(1)
    lengths = []
    for _ in range(30):
        matcher = Matcher(compiled)
        lengths.append(draw_any(matcher, dice, 40))
        assert matcher.error is None
    assert set(lengths) == {40}
    assert compiled.generation >= 2
    # One that uses up several generations by itself comes to an end, and says so.
    greedy = Matcher(Compiled(Library(TABLE), grammar_text(StructuredOutput(regex="(.*a.{400}|.*b.{400}).*"), False)))
    assert draw_any(greedy, dice, 4000) < 4000
    assert greedy.error is not None
    assert greedy.compiled.generation <= 9
    check_message(greedy.error)
