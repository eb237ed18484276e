"""Errors to HTTP: status, body in OpenAI's shape, and nothing of an exception that is not ours."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from mm_core.errors import (
    EngineClosedError,
    EngineDiedError,
    MediaTooLargeError,
    MMError,
    OutOfMemoryError,
    RequestError,
    ServiceError,
)

logger = logging.getLogger(__name__)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_TEMPORARY = (EngineDiedError, EngineClosedError, OutOfMemoryError)
RETRY_AFTER_S = 5


def status_of(error: BaseException) -> int:
    """The HTTP status that an error is answered with."""
    if isinstance(error, ServiceError):
        return error.status
    if isinstance(error, MediaTooLargeError):
        return 413
    if isinstance(error, RequestError):
        return 400
    return 503 if isinstance(error, _TEMPORARY) else 500


def headers_of(error: BaseException) -> dict[str, str]:
    """Headers that go with the error's reply."""
    if isinstance(error, ServiceError):
        return dict(error.headers)
    return {"Retry-After": str(RETRY_AFTER_S)} if isinstance(error, _TEMPORARY) else {}


def body_of(error: BaseException, request_id: str | None = None) -> dict[str, Any]:
    """OpenAI's error body. Texts of errors that are not from the MMError tree stay in the log."""
    if isinstance(error, MMError):
        message, code = " ".join(str(error).split()), error.code
    else:
        message, code = "The server failed. The log has the details under this request's id.", "internal_error"
    return error_body(message, code, status_of(error), getattr(error, "param", None), request_id)


def error_body(
    message: str, code: str, status: int, param: str | None = None, request_id: str | None = None
) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}`."""
    error: dict[str, Any] = {
        "message": message, "type": _TYPES.get(status, "server_error"), "param": param, "code": code,
    }  # fmt: skip
    return {"error": error if request_id is None else {**error, "request_id": request_id}}


def log_unforeseen(error: BaseException, about: Mapping[str, Any]) -> None:
    """The whole of an error that is no MMError, for whoever runs the server."""
    if not isinstance(error, MMError):
        logger.error("a call failed: %s", dict(about), exc_info=error)


def reply_to(error: BaseException, request_id: str | None = None, *, close: bool = False) -> Response:
    """The reply that tells an error. close: end the connection, because the call's body may not have been read."""
    headers = headers_of(error)
    if close:
        headers["Connection"] = "close"
    return json_reply(body_of(error, request_id), status_of(error), headers)


def json_reply(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII, so that no text can make its encoding fail."""
    text = json.dumps(body, allow_nan=False, separators=(",", ":"))
    return Response(text.encode("ascii"), status, headers, "application/json")
