"""Bodies of calls: read with a count and a clock, and made values of strictly typed models."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from mm_core.errors import BodyTooLargeError, ClientTimeoutError, InvalidBodyError, MMError, RequestAbortedError
from mm_core.server.context import call_of, context_of
from mm_core.server.logs import log_asked
from mm_core.server.routing import Route

T = TypeVar("T", bound=BaseModel)

# Bytes from which on a body is parsed in a thread: of all of it, and of what is left without long texts, of which a
# byte takes fifty times as long.
_LARGE = 2**22
_LARGE_JSON = 2**16
# Of one body less its media. Nothing else runs while a reader is at work, in a thread or not; and so much text fits
# into no model's context.
_MAX_JSON = 2**23
# Those in texts included: each may be an object in memory.
_MAX_COMMAS = 2**19
_MAX_BRACKETS = 2**17
_LONG = 2**16  # bytes of a text from which on it may be media, and is not looked at twice
_WINDOW = _LONG // 2
_PIECE = 2**20


async def read_body(request: Request, *, limit: int, timeout_s: float) -> bytes:
    """All of a body. Content-Length is believed only where it is too large already.

    Raises BodyTooLargeError above `limit` bytes, ClientTimeoutError where it takes longer than `timeout_s` seconds,
    RequestAbortedError where the client is gone before its end.
    """
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > limit:
        raise _too_large(limit)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise _too_large(limit)
                parts.append(part)
    except TimeoutError:
        raise ClientTimeoutError(f"The body did not arrive within {timeout_s:g} s.") from None
    except ClientDisconnect:
        raise RequestAbortedError("The client closed the connection before the end of its call.") from None
    return b"".join(parts)


async def read_model(request: Request, model: type[T]) -> T:
    """The body as JSON of `model`. Raises InvalidBodyError, and what `read_body` does."""
    config = context_of(request).config
    route: Route | None = getattr(request.state, "route", None)
    limit = config.max_body_bytes if route is None or route.limit_bytes is None else route.limit_bytes
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise InvalidBodyError("The body must be JSON: send Content-Type: application/json.", param="Content-Type")
    body = await read_body(request, limit=limit, timeout_s=config.body_timeout_s)
    found: T | None = None
    if len(body) < _LARGE:
        found = await context_of(request).desk.do(lambda: _parse_soon(body, model))
    if found is None:
        found = await asyncio.to_thread(parse_model, body, model)
    if config.log_prompts:
        log_asked(call_of(request).request_id, found.model_dump(exclude_unset=True))
    return found


def _parse_soon(body: bytes, model: type[T]) -> T | None:
    """As `parse_model`; None where it would take long."""
    short = _without_long_texts(body)
    return _parse(body, short, model) if len(short) < _LARGE_JSON else None


def parse_model(body: bytes, model: type[T]) -> T:
    """JSON text to a model. Raises InvalidBodyError, BodyTooLargeError, or what a validator of the model raised."""
    return _parse(body, _without_long_texts(body), model)


def _parse(body: bytes, short: bytes, model: type[T]) -> T:
    """The same. short: the body without its long texts."""
    if len(short) > _MAX_JSON:
        raise BodyTooLargeError(
            f"The body holds more than {_MAX_JSON} bytes beside its media, which no model's context takes. Media are "
            "not counted where their base64 has no line ends or other escapes."
        )
    if not short.strip():
        raise InvalidBodyError("The body is empty; a JSON object is wanted.")
    if short.count(b",") > _MAX_COMMAS or short.count(b"[") + short.count(b"{") > _MAX_BRACKETS:
        raise InvalidBodyError(f"The body holds more than {_MAX_COMMAS} values, or {_MAX_BRACKETS} lists and objects.")
    _check_json(short)
    try:
        return model.model_validate_json(body, strict=True)
    except ValidationError as error:
        refuse(error)
    except RecursionError:
        raise InvalidBodyError("The body is nested too deeply.") from None


class _RepeatedKeyError(ValueError):
    """A key that is in an object twice."""


class _NotFiniteError(ValueError):
    """NaN or an infinity."""


def _without_long_texts(body: bytes) -> bytes:
    """A body whose long texts are cut off, as far as they may be base64: pydantic looks at these in any case.

    What stands between two quotes is a text if it begins with a letter or digit: behind a text's end neither may come.
    Texts are found by windows without a quote, so that their number does not matter.
    """
    kept: list[bytes] = []
    begin = at = 0
    while at + _WINDOW <= len(body):
        if body.find(b'"', at, at + _WINDOW) >= 0:
            at += _WINDOW
            continue
        quote, following = body.rfind(b'"', begin, at), body.find(b'"', at + _WINDOW)
        if following < 0:
            break
        if quote >= 0 and following - quote > _LONG and _may_be_base64(body, quote + 1, following):
            kept.append(body[begin : quote + 2])
            begin = following
        at = following - following % _WINDOW + _WINDOW
    return b"".join([*kept, body[begin:]]) if kept else body


def _may_be_base64(body: bytes, begin: int, end: int) -> bool:
    """Whether a text is ASCII without blanks and escapes; piece by piece, so that other threads have their turn."""
    if not body[begin : begin + 1].isalnum():
        return False
    for at in range(begin, end, _PIECE):
        piece = body[at : min(at + _PIECE, end)]
        if not piece.isascii() or b"\\" in piece or b" " in piece:
            return False
    return True


def _check_json(body: bytes) -> None:
    """What pydantic's reader lets pass: keys that are there twice, NaN, text that is no Unicode."""
    try:
        value = json.loads(body.decode(), object_pairs_hook=_pairs, parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise InvalidBodyError("The body is not UTF-8.") from None
    except RecursionError:
        raise InvalidBodyError("The body is nested too deeply.") from None
    except _RepeatedKeyError as error:
        raise InvalidBodyError("An object of the body has a key twice.", param=str(error)) from None
    except _NotFiniteError:
        raise InvalidBodyError("The body holds NaN or an infinity, which JSON does not have.") from None
    except json.JSONDecodeError as error:
        raise InvalidBodyError(f"The body is not JSON: an error at character {error.pos}.") from None
    except ValueError:  # a number with more digits than Python reads
        raise InvalidBodyError("The body holds a number with too many digits.") from None
    if b"\\u" in body:
        _check_unicode(value)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        raise _RepeatedKeyError(_word(next(key for key, _ in pairs if key in seen or seen.add(key))))  # type: ignore[func-returns-value]
    return found


def _no_constant(_: str) -> NoReturn:
    raise _NotFiniteError


def _check_unicode(value: Any) -> None:
    """Raises InvalidBodyError "invalid_unicode" for text with half of a surrogate pair."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                error = InvalidBodyError("A text of the body holds half of a surrogate pair, which is no Unicode.")
                error.code = "invalid_unicode"
                raise error from None
        elif isinstance(value, dict):
            waiting += value.keys()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def refuse(error: ValidationError) -> NoReturn:
    """The first fault of a body, as InvalidBodyError: where it is and what is wanted, nothing of what was given."""
    faults = error.errors(include_url=False, include_input=False)
    first = faults[0]
    own = first.get("ctx", {}).get("error")
    if isinstance(own, MMError):
        raise own
    param = _place(first["loc"])
    if first["type"] == "extra_forbidden":
        text = "is no field of this route"
    else:
        text = first["msg"].removeprefix("Value error, ").removesuffix(".")
        text = text[:1].lower() + text[1:300]
    raise InvalidBodyError(f"{param}: {text}." if param else f"{text[:1].upper()}{text[1:]}.", param=param) from None


def _place(location: tuple[int | str, ...]) -> str | None:
    """ "messages[0].content" of a fault's location; names of models and validators in it are left out."""
    place = ""
    for part in location:
        if isinstance(part, int):
            place += f"[{part}]"
        elif "[" not in part and "(" not in part:
            place += f".{_word(part)}"
    return place.removeprefix(".")[:200] or None


def _word(text: str) -> str:
    """A key that a client chose, fit to be shown."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_-.") else "?" for c in text[:64])


def _too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"The body is larger than {limit} bytes.")
