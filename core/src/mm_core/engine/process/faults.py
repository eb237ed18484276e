"""Errors on their way between two processes: by the name of their class, never as objects."""

from __future__ import annotations

import msgspec

from mm_core import errors
from mm_core.errors import BatchError, EngineError, MMError


class Fault(msgspec.Struct, array_like=True, frozen=True):
    """An MMError. kind: its class' name in `mm_core.errors`; code: where it is not the class' own."""

    kind: str
    text: str
    param: str | None = None
    code: str | None = None


def to_fault(error: MMError) -> Fault:
    """What of an error crosses; of a class that `mm_core.errors` does not have, the nearest one that it has."""
    kind = next(c for c in type(error).__mro__ if getattr(errors, c.__name__, None) is c and c is not BatchError)
    code = error.code if error.code != getattr(kind, "code", None) else None
    param = getattr(error, "param", None)
    text = str(error).encode("utf-8", "replace").decode()
    return Fault(kind.__name__, text, param if isinstance(param, str) else None, code)


def from_fault(fault: Fault) -> MMError:
    """The error again; its cause stayed where it was, in that process' log."""
    kind = getattr(errors, fault.kind, None)
    if not (isinstance(kind, type) and issubclass(kind, MMError)):
        kind = EngineError
    error: MMError = kind.__new__(kind)
    error.args = (fault.text,)
    if fault.param is not None or hasattr(kind, "param") or issubclass(kind, errors.RequestError | errors.ServiceError):
        error.param = fault.param  # type: ignore[attr-defined]
    if fault.code is not None:
        error.code = fault.code
    return error
