"""Encoded media behind a path or a `data:` URL."""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path

from mm_core.errors import MediaDecodeError, MediaTooLargeError, UnsupportedMediaError
from mm_core.media.decode import read_regular_file
from mm_core.types import Modality

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # two letters or more: "C:" is a drive


def read_encoded(modality: Modality, value: str | Path, limit: int, *, allow_paths: bool = True) -> bytes:
    """Bytes behind a path or a `data:` URL, at most `limit`. allow_paths=False: only the latter.

    Raises UnsupportedMediaError for other URLs, MediaError, MediaDecodeError, MediaTooLargeError.
    """
    if isinstance(value, str):
        scheme = _SCHEME.match(value)
        if scheme and scheme[0].lower() == "data:":
            return decode_data_url(value, modality, limit)
        if scheme:
            raise UnsupportedMediaError(
                f"URLs ({scheme[0][:20]}) are not fetched. "
                "Download the file and pass its path or bytes, or a data: URL."
            )
    if not allow_paths:
        raise UnsupportedMediaError(
            f"The {modality} is no data: URL. Send it as `data:{modality}/…;base64,…`; paths are not read here."
        )
    return read_regular_file(value, limit)


def decode_data_url(url: str, modality: Modality, limit: int) -> bytes:
    """Bytes of a `data:<type>;base64,…` URL: standard alphabet, padded, no white space, not empty.

    The length is checked before anything is decoded. Raises MediaDecodeError, MediaTooLargeError.
    """
    code = f"invalid_{modality}"
    head, comma, body = url[5:].partition(",")
    kind, *options = head[:200].lower().split(";")
    if not comma or "base64" not in options:
        raise MediaDecodeError(
            f"The data: URL is not of the form `data:{modality}/…;base64,…`. Encode the file with standard base64.",
            code=code,
        )
    if kind and kind.split("/")[0] not in (modality, "application"):
        raise MediaDecodeError(
            f"The data: URL says it holds {kind[:40]!r}, where {modality} is wanted. Send it as `data:{modality}/…`.",
            code=code,
        )
    if len(body) // 4 * 3 > limit + 2:
        raise MediaTooLargeError(f"The data: URL holds more than {limit} bytes. Send a smaller file.")
    try:
        data = base64.b64decode(body.encode("ascii"), validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if not data:
        raise MediaDecodeError(
            "The data: URL's base64 is empty or damaged. Use the standard alphabet with padding, without white space.",
            code=code,
        )
    return data
