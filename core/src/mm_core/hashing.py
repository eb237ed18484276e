"""Digests and keys. Every cache of the house is keyed by what this module computes.

All hashing goes over length-prefixed records, so that no two different sequences of fields give
the same bytes. Python's `hash()` is never used (it differs from process to process), and no digest
is truncated.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import xxhash

from mm_core.errors import ConfigError

HashAlgorithm = Literal["xxh3_128", "sha256"]
Field = bytes | str | int | float | bool | None
Hasher = Callable[[bytes], bytes]

ROOT = b"mm-core:root:1"


def get_hasher(algorithm: HashAlgorithm) -> Hasher:
    """The digest function by name: `xxh3_128` (fast) or `sha256` (callers who don't trust each other)."""
    if algorithm == "xxh3_128":
        return _xxh3_128
    if algorithm == "sha256":
        return _sha256
    raise ConfigError(f"hash_algorithm={algorithm!r} is unknown. Use 'xxh3_128' or 'sha256'.")


def _xxh3_128(data: bytes) -> bytes:
    return xxhash.xxh3_128_digest(data)


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def encode_fields(fields: Iterable[Field]) -> bytes:
    """Serialise fields unambiguously: a type letter, the length, the bytes, for each."""
    parts: list[bytes] = []
    for field in fields:
        tag, raw = _encode(field)
        parts.append(tag + struct.pack("<Q", len(raw)) + raw)
    return b"".join(parts)


def _encode(field: Field) -> tuple[bytes, bytes]:
    match field:
        case None:
            return b"n", b""
        case bool():
            return b"b", b"\x01" if field else b"\x00"
        case int():
            return b"i", str(field).encode()
        case float():
            return b"f", struct.pack("<d", field)
        case str():
            return b"s", field.encode("utf-8", "surrogatepass")
        case _:
            return b"y", field


def media_digest(hasher: Hasher, modality: str, header: Sequence[Field], data: bytes | memoryview) -> bytes:
    """Digest of one item's normalised content.

    header: dtype or mode, shape, and sample rate or frame times: everything that the raw bytes
    leave open (a 30×100 and a 100×30 picture can have the same bytes).
    """
    prefix = encode_fields((modality, len(header), *header, len(data)))
    return hasher(prefix + bytes(data))


def media_key(hasher: Hasher, namespace: bytes, variant: bytes, digest: bytes, uuid: str | None) -> bytes:
    """The one key of an item in every cache.

    namespace: salt, family, checkpoint identity and processor settings, already serialised by
    `encode_fields`; variant: what the processor says beside the content.
    """
    return hasher(encode_fields((namespace, variant, digest, uuid)))


def block_key(
    hasher: Hasher,
    parent: bytes,
    token_ids: Sequence[int],
    media: Sequence[tuple[bytes, int]],
    context: bytes,
    positions: bytes = b"",
) -> bytes:
    """Key of one full KV block, chained to its parent's.

    token_ids: the block's ids. media: (media key, offset in the item) for each item that touches
    the block, the offset being that of the block's first token of the item. context: salt and
    what `Fusion.condition` read. positions: of the block's tokens, where they are not their indices.
    """
    ids = struct.pack(f"<{len(token_ids)}q", *token_ids)
    fields: list[Field] = [parent, ids, context, positions, len(media)]
    for key, offset in media:
        fields += [key, offset]
    return hasher(encode_fields(fields))
