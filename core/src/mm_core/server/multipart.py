"""multipart/form-data, parsed as it arrives (RFC 7578). Every ceiling holds before the bytes behind it are kept."""

from __future__ import annotations

from collections.abc import AsyncIterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from mm_core.errors import BodyTooLargeError, InvalidBodyError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

_PLAIN_ENCODINGS = (b"", b"7bit", b"8bit", b"binary")
_MOST_HEADER_BYTES = 8192  # of one part
_BROKEN = "The body is no multipart form, or was cut off. Send it as `curl -F` or an OpenAI client does."


@dataclass(frozen=True)
class FormLimits:
    """Of one form. parts: fields and files together; field_bytes: of one field's text; file_bytes: of one file."""

    file_bytes: int
    field_bytes: int = 2**16
    parts: int = 32


@dataclass(frozen=True)
class Form:
    """What was sent: the texts of fields by name, in order, and files by name. What a client calls its files, and
    of which type it says they are, is not looked at."""

    fields: dict[str, list[str]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


class FormReader:
    """A form that arrives in chunks: `feed` each, then `finish`.

    content_type: the header. file_names: the fields that are files, each given once at most. Raises InvalidBodyError,
    and BodyTooLargeError, whose `param` names the field.
    """

    def __init__(self, content_type: str | None, limits: FormLimits, file_names: tuple[str, ...] = ("file",)) -> None:
        self._limits = limits
        self._file_names = file_names
        self._form = Form()
        self._parts = 0
        self._ended = False
        self._name = ""
        self._data = bytearray()
        self._header: list[bytes] = [b"", b""]
        self._header_bytes = 0
        self._headers: dict[bytes, bytes] = {}
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._add_header(0, data[start:end]),
            "on_header_value": lambda data, start, end: self._add_header(1, data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._name_part,
            "on_part_data": self._add,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }
        try:
            self._parser = MultipartParser(_boundary(content_type), callbacks)
        except FormParserError:
            raise InvalidBodyError("The boundary in Content-Type is too long; 70 characters are allowed.") from None

    def feed(self, chunk: bytes) -> None:
        """The next bytes of the body."""
        try:
            self._parser.write(chunk)
        except FormParserError:  # its text may hold bytes of the body
            raise InvalidBodyError(_BROKEN) from None

    def finish(self) -> Form:
        """The whole form, where its end has come."""
        if not self._ended:
            raise InvalidBodyError(_BROKEN)
        return self._form

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > self._limits.parts:
            raise InvalidBodyError(f"The form has more than {self._limits.parts} parts. Send each field once.")
        self._name, self._data, self._headers, self._header_bytes = "", bytearray(), {}, 0

    def _add_header(self, place: int, data: bytes) -> None:
        self._header_bytes += len(data)
        if self._header_bytes > _MOST_HEADER_BYTES:
            raise InvalidBodyError("A part of the form has more headers than a form needs. " + _BROKEN)
        self._header[place] += data

    def _end_header(self) -> None:
        name, value = self._header
        self._headers[name.lower()] = value
        self._header = [b"", b""]

    def _name_part(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition"))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if kind != b"form-data" or not name:
            raise InvalidBodyError(
                'Each part of the form has a header `Content-Disposition: form-data; name="…"`; one has not.'
            )
        shown = name[:40]
        if b"filename" in options and name not in self._file_names:
            raise InvalidBodyError(
                f"{shown!r} is sent as a file. Only {_listed(self._file_names)} is one.", param=shown
            )
        if name in self._form.files:
            raise InvalidBodyError(
                f"There are two files {shown!r}. Send one; make another call for another.", param=shown
            )
        if self._headers.get(b"content-transfer-encoding", b"").strip().lower() not in _PLAIN_ENCODINGS:
            raise InvalidBodyError(
                f"{shown!r} has a Content-Transfer-Encoding. Send its bytes as they are.", param=shown
            )
        self._name = name

    def _add(self, data: bytes, start: int, end: int) -> None:
        is_file = self._name in self._file_names
        limit = self._limits.file_bytes if is_file else self._limits.field_bytes
        if len(self._data) + end - start > limit:
            raise BodyTooLargeError(
                f"{self._name[:40]!r} has more than {limit} bytes, the server's limit. Send less.",
                param=self._name[:40],
            )
        self._data += data[start:end]

    def _end_part(self) -> None:
        if self._name in self._file_names:
            self._form.files[self._name] = bytes(self._data)
            return
        try:
            text = self._data.decode("utf-8")
        except UnicodeDecodeError:
            raise InvalidBodyError(f"{self._name[:40]!r} is not UTF-8 text.", param=self._name[:40]) from None
        self._form.fields.setdefault(self._name, []).append(text)

    def _end(self) -> None:
        self._ended = True


async def read_form(chunks: AsyncIterable[bytes], content_type: str | None, limits: FormLimits) -> Form:
    """A body's form. chunks: the body, itself bounded in bytes and time. Raises as `FormReader` does."""
    reader = FormReader(content_type, limits)
    async for chunk in chunks:
        if chunk:
            reader.feed(chunk)
    return reader.finish()


def _boundary(content_type: str | None) -> bytes:
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data":
        raise InvalidBodyError(
            "This route takes a form: `Content-Type: multipart/form-data`, as `curl -F` and OpenAI clients send it."
        )
    boundary = options.get(b"boundary", b"")
    if not boundary:
        raise InvalidBodyError("Content-Type names no boundary. Let the HTTP client set this header by itself.")
    return boundary


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names))
