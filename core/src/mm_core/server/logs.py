"""Lines on stderr: as text for people, or one JSON object a line for programs."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any, Literal

prompt_log = logging.getLogger("mm_core.server.prompts")

_LONGEST_SHOWN = 4096  # characters
_MOST_SHOWN = 256  # entries of a list
_LONGEST_WORD = 512  # characters without a blank; more of them are base64
_MEDIA_KEYS = frozenset(("data", "b64_json", "file_data"))  # base64 stands there, without a scheme


class TextFormatter(logging.Formatter):
    """ "2026-11-22T10:00:00 INFO access: status=200 ms=12.5"."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the traceback where there is one."""
        fields = getattr(record, "fields", {})
        said = [record.getMessage(), *(f"{name}={_plain(value)}" for name, value in fields.items())]
        line = f"{_stamp(record)} {record.levelname} {record.name}: {' '.join(said)}"
        return line if record.exc_info is None else f"{line}\n{self.formatException(record.exc_info)}"


class JsonFormatter(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's text and fields."""
        line: dict[str, Any] = {
            "time": _stamp(record), "level": record.levelname, "logger": record.name, "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }  # fmt: skip
        if record.exc_info is not None:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def set_up(log_format: Literal["text", "json"], level: int = logging.INFO) -> None:
    """Send all of this process's log to stderr. Replaces what handlers there are."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("mm_core").setLevel(level)
    # Its warnings are of bytes that are no HTTP: lines that anybody could write, as many as wanted.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)


def log_asked(request_id: str, body: Mapping[str, Any]) -> None:
    """What a call asks, less its media: for those who want that in their log."""
    prompt_log.info(
        "asked", extra={"fields": {"request_id": request_id, "body": json.dumps(_shown(body), default=str)}}
    )


def _shown(value: Any, name: str = "") -> Any:
    """A body's texts, those that are media or very long cut off. name: the key that the value is under."""
    if isinstance(value, Mapping):
        return {str(key): _shown(each, str(key)) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(each, name) for each in value[:_MOST_SHOWN]]
    if isinstance(value, str):
        if value.lstrip()[:5].lower() == "data:":
            return "data:…"
        start = value[:_LONGEST_WORD]
        if name in _MEDIA_KEYS or (len(value) > len(start) and start.isascii() and not set(start) & set(" \n")):
            return f"… ({len(value)} characters)"
        return value if len(value) <= _LONGEST_SHOWN else f"{value[:_LONGEST_SHOWN]}… ({len(value)} characters)"
    return value


def _stamp(record: logging.LogRecord) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{whole}.{int(record.msecs):03d}Z"


def _plain(value: Any) -> str:
    """A value without blanks or line ends, so that a line stays one and its fields can be told apart."""
    text = str(value)
    return text if text.isprintable() and not any(c in ' "=' for c in text) else json.dumps(text)
