"""Forms as they arrive: whole, in any pieces, too large, and broken."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from mm_core.errors import BodyTooLargeError, InvalidBodyError, ServiceError
from mm_core.server.multipart import Form, FormLimits, FormReader, read_form

TYPE = "multipart/form-data; boundary=XX"
LIMITS = FormLimits(file_bytes=1000, field_bytes=100, parts=8)
SOUND = bytes(range(256)) + b"\r\n--X\r\n--XXno\r\n\r--"


def part(name: str, data: bytes, *extra: str, filename: str | None = None) -> bytes:
    shown = f'Content-Disposition: form-data; name="{name}"' + (f'; filename="{filename}"' if filename else "")
    return "\r\n".join(["--XX", shown, *extra, "", ""]).encode() + data + b"\r\n"


def form(*parts: bytes, end: bytes = b"--XX--\r\n") -> bytes:
    return b"".join(parts) + end


WHOLE = form(
    part("model", b"whisper"),
    part("file", SOUND, "Content-Type: audio/wav", filename="../../etc/passwd"),
    part("g[]", b"word"),
    part("g[]", "sätze".encode()),
)


def read(body: bytes, step: int = 10**9, content_type: str | None = TYPE) -> Form:
    reader = FormReader(content_type, LIMITS)
    for place in range(0, len(body), step):
        reader.feed(body[place : place + step])
    return reader.finish()


@pytest.mark.parametrize("step", [1, 2, 3, 7, 64, 10**9])
def test_pieces_do_not_matter(step: int) -> None:
    found = read(WHOLE, step)
    assert found.fields == {"model": ["whisper"], "g[]": ["word", "sätze"]}
    assert found.files == {"file": SOUND}


def test_a_preamble_an_epilogue_and_a_quoted_boundary() -> None:
    assert read(WHOLE + b"epilogue\r\n" * 3).files == {"file": SOUND}
    assert read(WHOLE, content_type='multipart/form-data; charset=utf-8; boundary="XX"').files == {"file": SOUND}


def test_a_file_needs_no_filename_and_empty_parts_are_there() -> None:
    assert read(form(part("file", b""), part("prompt", b""))) == Form({"prompt": [""]}, {"file": b""})


def test_every_prefix_is_refused() -> None:
    last = len(WHOLE) - len(b"--\r\n")
    for length in range(last):
        with pytest.raises(InvalidBodyError):
            read(WHOLE[:length])


@pytest.mark.parametrize(
    "content_type",
    [None, "", "application/json", "multipart/form-data", "multipart/form-data; boundary=",
     "multipart/mixed; boundary=XX", "multipart/form-data; boundary=YY", "multipart/form-data; boundary=" + "X" * 300],
)  # fmt: skip
def test_wrong_content_types(content_type: str | None) -> None:
    with pytest.raises(InvalidBodyError):
        read(WHOLE, content_type=content_type)


BROKEN = {
    "no form at all": b'{"model": "whisper"}',
    "no header": b"--XX\r\n\r\ndata\r\n--XX--\r\n",
    "no name": b"--XX\r\nContent-Disposition: form-data\r\n\r\ndata\r\n--XX--\r\n",
    "an empty name": form(part("", b"data")),
    "another disposition": b'--XX\r\nContent-Disposition: attachment; name="a"\r\n\r\ndata\r\n--XX--\r\n',
    "a header without a colon": b"--XX\r\nContent-Disposition\r\n\r\ndata\r\n--XX--\r\n",
    "a header without an end": b"--XX\r\nContent-Disposition: " + b"a" * 10_000,
    "a long header": form(part("a", b"", "X-Long: " + "1" * 9000)),
    "many headers": form(part("a", b"", *(f"X-{i}: 1" for i in range(100)))),
    "two files": form(part("file", b"a", filename="a"), part("file", b"b", filename="b")),
    "a field sent as a file": form(part("prompt", b"a", filename="a")),
    "no UTF-8": form(part("prompt", b"\xff\xfe")),
    "a lone surrogate": form(part("prompt", b"\xed\xa0\x80")),
    "base64": form(part("file", b"QUJD", "Content-Transfer-Encoding: base64")),
    "many parts": form(*[part("a", b"1")] * 9),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("step", [1, 10**9])
def test_broken_forms(name: str, step: int) -> None:
    with pytest.raises(InvalidBodyError) as caught:
        read(BROKEN[name], step)
    assert len(str(caught.value)) > 20


@pytest.mark.parametrize(
    ("body", "param"),
    [(form(part("file", b"a" * 1001)), "file"), (form(part("prompt", b"a" * 101)), "prompt"),
     (form(part("file", b"a" * 1000), part("model", b"a" * 101)), "model")],
)  # fmt: skip
def test_too_large(body: bytes, param: str) -> None:
    for step in (1, 10**9):
        with pytest.raises(BodyTooLargeError) as caught:
            read(body, step)
        assert caught.value.param == param
    assert read(form(part("file", b"a" * 1000), part("prompt", b"a" * 100))).files == {"file": b"a" * 1000}


def test_nothing_is_read_behind_a_ceiling() -> None:
    """An endless upload: the chunks that are asked for end soon after the limit."""
    asked = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal asked
        yield WHOLE[: WHOLE.index(SOUND)]
        while True:
            asked += 1
            yield b"a" * 64

    with pytest.raises(BodyTooLargeError):
        asyncio.run(read_form(endless(), TYPE, LIMITS))
    assert asked <= LIMITS.file_bytes // 64 + 1


def test_errors_say_nothing_of_the_body() -> None:
    for body in BROKEN.values():
        with pytest.raises(ServiceError) as caught:
            read(body)
        assert "0x" not in str(caught.value)
        assert "aaaa" not in str(caught.value)
