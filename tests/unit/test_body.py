"""JSON bodies: what is refused, how, and that nothing of what was sent is in the error."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, field_validator

from mm_core.errors import BodyTooLargeError, InvalidBodyError, InvalidParamsError
from mm_core.server.body import _without_long_texts, parse_model
from mm_core.server.failures import body_of, json_reply, reply_to


class Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    text: str
    weight: float = 1.0


class Thing(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    name: str = "x"
    count: Annotated[int, Field(ge=1)] = 1
    flag: bool | None = None
    parts: list[Part] = []
    more: dict[str, Any] | None = None
    own: str | None = None

    @field_validator("own")
    @classmethod
    def _own(cls, value: str | None) -> str | None:
        if value == "ours":
            raise InvalidParamsError("own cannot be that.", param="own")
        if value == "plain":
            raise ValueError("own is plain")
        return value


def refused(body: str | bytes) -> InvalidBodyError:
    with pytest.raises(InvalidBodyError) as caught:
        parse_model(body if isinstance(body, bytes) else body.encode(), Thing)
    error = caught.value
    assert error.status == 400
    json.loads(reply_to(error, "req-1").body)  # which must itself not fail
    return error


def test_a_body_is_read():
    thing = parse_model(b'{"name": "\xc3\xa9\xf0\x9f\x98\x80", "parts": [{"text": "a\\u00e9\\ud83d\\ude00"}]}', Thing)
    assert (thing.name, thing.parts[0].text) == ("é😀", "aé😀")


DEEP = 100_000


@pytest.mark.parametrize(
    "body",
    [
        "",
        "  ",
        "{",
        "nope",
        '{"name": "a"} extra',
        b'{"name": "\xff"}',
        b'{"name": "\xed\xa0\x80"}',
        '{"name": "a\x00b"}',
        '{"count": NaN}',
        '{"count": Infinity}',
        '{"more": {"x": -Infinity}}',
        f'{{"count": {"9" * 5000}}}',
        f'{{"more": {"[" * DEEP}{"]" * DEEP}}}',
        '{"more": ' + '{"a":' * DEEP + "1" + "}" * DEEP + "}",
        "[" * DEEP,
        '{"a": {"a":' * 300,
        "[]",
        "null",
        '"text"',
        "1",
    ],
    ids=lambda body: repr(body[:24]),
)
def test_what_is_no_object_in_json_is_refused(body):
    assert refused(body).code == "invalid_body"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ('{"name": 1}', "name"),
        ('{"name": null}', "name"),
        ('{"count": "1"}', "count"),
        ('{"count": true}', "count"),
        ('{"count": 1.5}', "count"),
        ('{"count": 0}', "count"),
        ('{"count": 1e400}', "count"),
        ('{"flag": 1}', "flag"),
        ('{"flag": "true"}', "flag"),
        ('{"parts": {}}', "parts"),
        ('{"parts": [{"text": "a"}, {"text": 2}]}', "parts[1].text"),
        ('{"parts": [{"text": "a", "weight": 1e400}]}', "parts[0].weight"),
        ('{"parts": [{"text": "a", "secret": 1}]}', "parts[0].secret"),
        ('{"parts": [{}]}', "parts[0].text"),
        ('{"unknown": 1}', "unknown"),
        ('{"name": "a", "name": "b"}', "name"),
        ('{"parts": [{"text": "a", "text": "a"}]}', "text"),
        ('{"more": {"x": {"y": 1, "y": 2}}}', "y"),
        ('{"own": "plain"}', "own"),
    ],
)
def test_the_fault_is_named(body, param):
    error = refused(body)
    assert error.param == param
    assert str(error)


@pytest.mark.parametrize("where", ['{"name": "%s"}', '{"%s": 1}', '{"more": {"x": ["a", "%s"]}}', '{"own": {"%s": 1}}'])
@pytest.mark.parametrize("half", ["\\ud800", "a\\udfff", "\\ud800\\u0041", "\\uDC00\\uD800"])
def test_half_a_surrogate_pair_is_no_text(where, half):
    assert refused(where % half).code == "invalid_unicode"


@pytest.mark.parametrize(
    "body",
    [
        '{"count": "0xdeadbeef /etc/passwd"}',
        '{"name": ["0xdeadbeef", "/etc/passwd"]}',
        '{"parts": [{"text": {"0xdeadbeef": "/etc/passwd"}}]}',
        '{"0xdeadbeef /etc/passwd\\u0000": 1}',
        '{"more": {"0xdeadbeef /etc/passwd": 1, "0xdeadbeef /etc/passwd": 1}}',
        '{"parts": [{"text": "a", "weight": NaN, "own": "0xdeadbeef /etc/passwd"}]}',
    ],
)
def test_nothing_of_a_body_is_in_its_error(body):
    text = json.dumps(body_of(refused(body)))
    assert "/etc" not in text
    assert "Traceback" not in text
    assert "pydantic" not in text


def test_errors_of_our_own_pass_through_validators():
    with pytest.raises(InvalidParamsError) as caught:
        parse_model(b'{"own": "ours"}', Thing)
    assert (caught.value.param, caught.value.code) == ("own", "invalid_params")


def test_many_small_values_are_refused_before_they_are_made():
    body = b'{"more": {"x": [' + b"1," * 2_000_000 + b"1]}}"
    start = time.perf_counter()
    error = refused(body)
    assert "values" in str(error)
    assert time.perf_counter() - start < 1.0


def test_a_large_text_is_no_fault():
    body = json.dumps({"name": "A" * 8_000_000}).encode()
    assert len(parse_model(body, Thing).name) == 8_000_000


LONG = "A" * 100_000


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        (f'{{"name": "{LONG}", "name": "{LONG}"}}', "name", "invalid_body"),
        (f'{{"name": "\\"", "own": "{LONG}", "count": NaN}}', None, "invalid_body"),
        (f'{{"name": "{LONG}\\ud800"}}', None, "invalid_unicode"),
        (f'{{"name": "\\"{LONG}\\ud800"}}', None, "invalid_unicode"),
        (f'{{"name": "{LONG}", "own": "\\ud800"}}', None, "invalid_unicode"),
        (f'{{"name": "{LONG}" {LONG}}}', None, "invalid_body"),
        (f'{{"name": {LONG}}}', None, "invalid_body"),
        (f'{{"name": "a"{LONG}"b"}}', None, "invalid_body"),
        (f'{{"count": {"9" * 100_000}, "name": "x"}}', None, "invalid_body"),
        (f'{{"name": "x", "more": {{"x": {"[" * 70_000}{"]" * 70_000}}}, "own": "x"}}', None, "invalid_body"),
        (f'{{"{LONG}": 1}}', "A" * 64, "invalid_body"),
        (f'{{"name": "{LONG}\x01"}}', None, "invalid_body"),
    ],
)
def test_faults_beside_long_texts_are_found(body, param, code):
    error = refused(body)
    assert (error.param, error.code) == (param, code)


def test_a_long_text_that_is_no_unicode_is_refused():
    assert refused(b'{"name": "' + LONG.encode() + b'\xff"}').code == "invalid_body"


@pytest.mark.parametrize("text", [LONG, LONG + '"' + LONG, "\\" + LONG, LONG + "é" + LONG, '"' * 70_000, "\n" + LONG])
def test_long_texts_arrive_whole(text):
    for ascii_only in (True, False):
        body = json.dumps({"name": text, "parts": [{"text": text}], "own": text}, ensure_ascii=ascii_only).encode()
        thing = parse_model(body, Thing)
        assert (thing.name, thing.parts[0].text, thing.own) == (text, text, text)


def test_replies_are_ascii_whatever_is_in_them():
    reply = json_reply({"text": "\ud800 é \u2028"})
    assert reply.body.isascii()
    assert json.loads(reply.body)["text"] == "\ud800 é \u2028"


@pytest.mark.parametrize(
    "text",
    ["\\n" * 2**23, "\\u4e2d" * 2**21, '\\"' * 2**23, "中" * 2**22, "a " * 2**23, " " * 2**24],
    ids=["line ends", "escapes", "quotes", "Chinese", "blanks", "nothing"],
)
def test_more_text_than_any_context_takes_is_refused_unread(text):
    """A reader of JSON lets nothing else run while it works."""
    body = f'{{"name": "{text}"}}'.encode()
    start = time.perf_counter()
    with pytest.raises(BodyTooLargeError, match="beside its media"):
        parse_model(body, Thing)
    assert time.perf_counter() - start < 0.2


@pytest.mark.parametrize("before", [0, 1, 2**15 - 1, 2**15, 2**16])
@pytest.mark.parametrize("length", [2**16 - 1, 2**16, 2**16 + 1, 3 * 2**16])
def test_long_texts_are_cut_off_wherever_they_stand(before, length):
    body = json.dumps({"x": "é" * before, "a": "A" * length, "b": "B" * length, "c": ["C" * length]}).encode()
    short = _without_long_texts(body)
    wanted = body
    if length >= 2**16:
        for letter in b"ABC":
            wanted = wanted.replace(bytes([letter]) * length, bytes([letter]))
    assert short == wanted
