"""Digests and keys. Every cache of the house is keyed by what this module computes.

All hashing goes over length-prefixed records, so that no two different sequences of fields give
the same bytes. Python's `hash()` is never used (it differs from process to process), and no digest
is truncated.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
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


_INCREMENTAL: dict[Hasher, Callable[[bytes], Any]] = {_xxh3_128: xxhash.xxh3_128, _sha256: hashlib.sha256}


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
    size = data.nbytes if isinstance(data, memoryview) else len(data)  # len() of a view counts its first axis only
    prefix = encode_fields((modality, len(header), *header, size))
    begin = _INCREMENTAL.get(hasher)
    if begin is None or not (isinstance(data, bytes) or data.c_contiguous):
        return hasher(prefix + bytes(data))
    state = begin(prefix)
    state.update(data)  # no copy of megabytes only to put a few bytes before them
    digest: bytes = state.digest()
    return digest


def media_key(hasher: Hasher, namespace: bytes, variant: bytes, digest: bytes, uuid: str | None) -> bytes:
    """The one key of an item in every cache.

    namespace: salt, family, checkpoint identity and processor settings, already serialised by
    `encode_fields`; variant: what the processor says beside the content.
    """
    return hasher(encode_fields((namespace, variant, digest, uuid)))


def source_key(hasher: Hasher, key: bytes, index: int) -> bytes:
    """Key of block `index` of a source's keys and values; key: `types.Source.key`."""
    return hasher(encode_fields(("source", key, index)))


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
    `PreparedRequest.kv_context`. positions: of the block's tokens, where they are not their indices.
    """
    ids = struct.pack(f"<{len(token_ids)}q", *token_ids)
    fields: list[Field] = [parent, ids, context, positions, len(media)]
    for key, offset in media:
        fields += [key, offset]
    return hasher(encode_fields(fields))


def prompt_block_keys(
    hasher: Hasher,
    block_size: int,
    token_ids: Sequence[int],
    media: Sequence[tuple[bytes, int, int]],
    context: bytes,
    positions: np.ndarray[Any, Any] | None = None,
) -> tuple[bytes, ...]:
    """`block_key` of every full block of a prompt, chained: the same keys in a sixth of the time.

    media: (media key, offset, end) of each item's range, in prompt order. positions: int32 [axes, n],
    or None where they are 0…n-1.
    """
    count, size = len(token_ids) // block_size, 8 * block_size
    ids = np.array(token_ids[: count * block_size], dtype="<i8").tobytes()
    ids_head, context_field, plain = _bytes_head(size), encode_fields((context,)), encode_fields((b"",))
    places = _block_positions(positions, count, block_size)
    ranges = [(encode_fields((key,)), at, end) for key, at, end in media]
    keys: list[bytes] = []
    nothing, one = _int_field(0), _int_field(1)
    parent, parent_head, first = ROOT, _bytes_head(len(ROOT)), 0
    for block in range(count):
        start, end = block * block_size, (block + 1) * block_size
        while first < len(ranges) and ranges[first][2] <= start:
            first += 1
        touched = [
            field + _int_field(max(start - at, 0)) for field, at, last in ranges[first:] if at < end and last > start
        ]
        count_field = nothing if not touched else one if len(touched) == 1 else _int_field(len(touched))
        own, place = ids[block * size : block * size + size], places[block] if places else plain
        parent = hasher(b"".join((parent_head, parent, ids_head, own, context_field, place, count_field, *touched)))
        if not block:
            parent_head = _bytes_head(len(parent))
        keys.append(parent)
    return tuple(keys)


def _bytes_head(size: int) -> bytes:
    """What `encode_fields` puts before `size` bytes."""
    return b"y" + struct.pack("<Q", size)


_INT_HEADS = tuple(b"i" + struct.pack("<Q", digits) for digits in range(32))


def _int_field(value: int) -> bytes:
    """`encode_fields` of one int of fewer than 32 digits."""
    raw = b"%d" % value
    return _INT_HEADS[len(raw)] + raw


def _block_positions(positions: np.ndarray[Any, Any] | None, count: int, block_size: int) -> list[bytes]:
    """For each block the encoded field of its positions; empty bytes where they are the tokens' indices."""
    if positions is None:
        return []
    axes, n = len(positions), count * block_size
    blocks = positions[:, :n].astype(np.int32).reshape(axes, count, block_size)
    usual = (blocks == np.arange(n).reshape(count, block_size)).all(axis=(0, 2)).tolist()
    raw, size = blocks.transpose(1, 0, 2).tobytes(), 4 * axes * block_size
    head, empty = _bytes_head(size), _bytes_head(0)
    return [empty if same else head + raw[i * size : i * size + size] for i, same in enumerate(usual)]
