"""Values whose types nobody declared, as msgpack: what it knows by itself, and tuples, sets and numpy's beside."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from mm_core.errors import PluginError

_TUPLE, _SET, _ARRAY, _SCALAR = 1, 2, 3, 4
_SCALARS = (bool, float, str, bytes, type(None))
_DEPTH = 64

_encode = msgspec.msgpack.Encoder().encode


def pack(value: Any, depth: int = 0) -> Any:
    """The value as msgspec encodes it without asking. Raises PluginError for what is no plain data."""
    kind = type(value)
    if kind in _SCALARS:
        return value
    if kind is int and -(2**63) <= value < 2**64:
        return value
    if depth == _DEPTH:
        raise PluginError(f"A value is nested more than {_DEPTH} deep. Flatten it, or use engine_process=False.")
    if kind is list:
        return [pack(each, depth + 1) for each in value]
    if kind is dict:
        return {_key(key): pack(each, depth + 1) for key, each in value.items()}
    if kind is tuple:
        return _extended(_TUPLE, [pack(each, depth + 1) for each in value])
    if kind is set or kind is frozenset:
        return _extended(_SET, [kind is frozenset, *(pack(each, depth + 1) for each in value)])
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return _extended(_ARRAY, [value.dtype.str, list(value.shape), value.tobytes()])
    if isinstance(value, np.generic) and value.dtype.kind in "biufc":
        return _extended(_SCALAR, [value.dtype.str, value.tobytes()])
    raise PluginError(
        f"A value of type {kind.__name__} cannot be sent to the engine's process. Use numbers, texts, bytes, lists, "
        "tuples, sets, dicts and numpy arrays, or engine_process=False."
    )


def _key(key: Any) -> Any:
    if type(key) in (str, int, bytes, bool):
        return key
    raise PluginError(
        f"A mapping with a key of type {type(key).__name__} cannot be sent to the engine's process. Use texts or "
        "numbers as keys, or engine_process=False."
    )


def _extended(code: int, value: list[Any]) -> msgspec.msgpack.Ext:
    return msgspec.msgpack.Ext(code, _encode(value))


def unpack(code: int, data: memoryview) -> Any:
    """The `ext_hook` of a decoder. Raises ValueError for a code that nobody sends."""
    value = _DECODER.decode(data)
    if code == _TUPLE:
        return tuple(value)
    if code == _SET:
        return frozenset(value[1:]) if value[0] else set(value[1:])
    if code == _ARRAY:
        dtype, shape, content = value
        return np.frombuffer(bytearray(content), np.dtype(dtype)).reshape(shape)
    if code == _SCALAR:
        dtype, content = value
        return np.frombuffer(content, np.dtype(dtype))[0]
    raise ValueError(f"unknown extension {code}")


_DECODER = msgspec.msgpack.Decoder(ext_hook=unpack)
