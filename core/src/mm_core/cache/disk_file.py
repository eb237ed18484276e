"""DiskFile: blocks' contents in one file, with what tells them from anything else that may be in there.

Layout, all numbers little-endian:

    header    4096 bytes: magic, version, the identity and the sizes as JSON, a checksum of all that
    index     a record a place: key, part, token ids, checksum of the content, checksum of the record and its number
    contents  a place each

A content is written between its old record's end and its new record, so that whatever is cut short leaves a record
that does not verify, or a content that does not match its record: both are as if they were not there. Nothing read
from the file is trusted: lengths are bounded by the header, which has to be the expected one byte for byte.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import stat
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from mm_core.errors import ConfigError
from mm_core.hashing import encode_fields, get_hasher

logger = logging.getLogger(__name__)

MAGIC = b"\x89mm-core cache\r\n"
VERSION = 1
MAX_KEY = 32
_HEADER = 4096
_PAGE = 4096
_TAG = b"mmr1"
_RECORD = struct.Struct("<4sIIIIIQQ32s")  # tag, key's length, part, parts, rows, ids, stamp, checksum, key
_SUM = struct.Struct("<Q")
_READ_AT_ONCE = 2**23
_IGNORED = "is ignored: blocks are not kept on disk this time"


@dataclass(frozen=True)
class DiskIdentity:
    """What contents depend on. weights: the load format, and for random weights their seed. kv_shape: layers, heads,
    head size. device: results of another kind of device differ in their last bits."""

    family: str
    checkpoint: str
    revision: str
    weights: str
    dtype: str
    kv_dtype: str
    block_size: int
    kv_shape: tuple[int, int, int]
    hash_algorithm: str
    device: str

    @property
    def file_name(self) -> str:
        """Of the one file that may hold such contents."""
        fields = [str(value) for value in asdict(self).values()]
        return get_hasher("sha256")(encode_fields(fields)).hex() + ".mmcache"


class Record(NamedTuple):
    """What a place holds: part `part` of `parts` of an entry. stamp: of its writing, the same for all parts."""

    key: bytes
    part: int
    parts: int
    token_ids: tuple[int, ...]
    num_rows: int
    stamp: int


class DiskFile:
    """An open, locked file. Reading and writing contents is for threads, of which none touches another's place."""

    def __init__(self, descriptor: int, header: bytes, sizes: _Sizes) -> None:
        self.num_places = sizes.places
        self.slot_bytes = sizes.slot_bytes
        self._descriptor = descriptor
        self._sizes = sizes
        self._sums = np.zeros(sizes.places, np.uint64)
        self._header = header
        self._warned = False

    @classmethod
    def open(cls, directory: str, size: int, identity: DiskIdentity, slot_bytes: int) -> DiskFile | None:
        """The file for such contents, of at most `size` bytes; None, with a warning in the log, where it is another's
        or another engine uses it. Raises ConfigError where the directory cannot be used or the size is too small."""
        sizes = _Sizes.within(size, slot_bytes, identity.block_size)
        descriptor, path = _open(Path(directory).expanduser(), identity.file_name)
        try:
            if not _is_usable(descriptor, path):
                os.close(descriptor)
                return None
            file = cls(descriptor, _make_header(identity, sizes), sizes)
            file._begin(path)
        except OSError as error:
            os.close(descriptor)
            logger.warning("%s %s (%s)", path, _IGNORED, error.strerror)
            return None
        return file

    def _begin(self, path: Path) -> None:
        """Take over what is there if it is what it should be, else begin anew."""
        found = os.pread(self._descriptor, _HEADER, 0)
        if found == self._header:
            if os.fstat(self._descriptor).st_size != self._sizes.total:
                os.ftruncate(self._descriptor, self._sizes.total)  # cut short: what is missing does not verify
            return
        if found.strip(b"\0"):
            logger.warning("%s is of another version, model or size, or damaged: it is begun anew", path)
        os.ftruncate(self._descriptor, 0)
        self._write(self._header, 0)
        os.ftruncate(self._descriptor, self._sizes.total)

    # -- records ---------------------------------------------------------------------------

    def records(self) -> dict[int, Record]:
        """Those that verify, by place."""
        found: dict[int, Record] = {}
        width = self._sizes.record_bytes
        step = max(_READ_AT_ONCE // width, 1)
        for first in range(0, self.num_places, step):
            count = min(step, self.num_places - first)
            raw = self._pread(count * width, self._sizes.record_at(first))
            tags = np.frombuffer(raw, np.uint8)[: len(raw) // width * width].reshape(-1, width)[:, : len(_TAG)]
            for index in np.flatnonzero((tags == np.frombuffer(_TAG, np.uint8)).all(axis=1)).tolist():
                self._take(found, first + index, raw[index * width : (index + 1) * width])
        return found

    def _pread(self, count: int, offset: int) -> bytes:
        try:
            return os.pread(self._descriptor, count, offset)
        except OSError as error:
            self._warn("read", error)
            return b""

    def _take(self, found: dict[int, Record], place: int, raw: bytes) -> None:
        if raw[-8:] != _sum_of_record(place, raw[:-8]):
            return
        _, key_len, part, parts, rows, ids, stamp, content_sum, key = _RECORD.unpack_from(raw)
        if not 0 < key_len <= MAX_KEY or part >= parts or 8 * ids > len(raw) - _RECORD.size - 8:
            return
        token_ids = struct.unpack_from(f"<{ids}q", raw, _RECORD.size)
        self._sums[place] = content_sum
        found[place] = Record(key[:key_len], part, parts, token_ids, rows, stamp)

    def erase(self, places: Sequence[int]) -> None:
        """End the records of places."""
        for place in places:
            try:
                self._write(b"\0" * len(_TAG), self._sizes.record_at(place))
            except OSError as error:
                self._warn("write", error)

    # -- contents (in threads) -------------------------------------------------------------

    def write(self, places: Sequence[int], records: Sequence[Record], contents: Sequence[Any]) -> bool:
        """An entry's contents, then its records. False where the disk refuses: nothing is there then."""
        try:
            for place, content in zip(places, contents, strict=True):
                self._write(b"\0" * len(_TAG), self._sizes.record_at(place))
                self._sums[place] = xxhash.xxh3_64_intdigest(content)
                self._write(content, self._sizes.content_at(place))
            for place, record in zip(places, records, strict=True):
                self._write(self._encode(place, record), self._sizes.record_at(place))
        except OSError as error:
            self._warn("write", error)
            return False
        return True

    def _encode(self, place: int, record: Record) -> bytes:
        key, part, parts, ids, rows, stamp = record
        fixed = _RECORD.pack(_TAG, len(key), part, parts, rows, len(ids), stamp, int(self._sums[place]), key)
        raw = (fixed + struct.pack(f"<{len(ids)}q", *ids)).ljust(self._sizes.record_bytes - 8, b"\0")
        return raw + _sum_of_record(place, raw)

    def read(self, place: int, into: Any) -> bool:
        """A place's content, uint8 [slot_bytes]; False where it is not what was written."""
        view, at = memoryview(into).cast("B"), 0
        try:
            while at < len(view):
                got = os.preadv(self._descriptor, [view[at:]], self._sizes.content_at(place) + at)
                if not got:
                    return False
                at += got
        except OSError as error:
            self._warn("read", error)
            return False
        return bool(xxhash.xxh3_64_intdigest(view) == self._sums[place])

    def _write(self, data: Any, offset: int) -> None:
        view = memoryview(data).cast("B")
        while view:
            done = os.pwrite(self._descriptor, view, offset)
            view, offset = view[done:], offset + done

    def _warn(self, what: str, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("the disk cache cannot be %s (%s): requests go on without", what, error.strerror)

    def close(self) -> None:
        """Let go of the file and its lock. Idempotent."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


@dataclass(frozen=True)
class _Sizes:
    slot_bytes: int
    record_bytes: int
    places: int

    @classmethod
    def within(cls, size: int, slot_bytes: int, block_size: int) -> _Sizes:
        record = -(-(_RECORD.size + 8 * block_size + _SUM.size) // 64) * 64
        places = (size - _HEADER - _PAGE) // (slot_bytes + record)
        if places < 1:
            raise ConfigError(
                f"KvCacheConfig(disk_cache_size={size}) is too small: a block of this model's KV cache takes "
                f"{slot_bytes} bytes. Use {slot_bytes + record + _HEADER + _PAGE} or more (gigabytes are usual), or "
                "leave disk_cache_path out."
            )
        return cls(slot_bytes, record, places)

    def record_at(self, place: int) -> int:
        return _HEADER + place * self.record_bytes

    def content_at(self, place: int) -> int:
        begin = -(-self.record_at(self.places) // _PAGE) * _PAGE
        return begin + place * self.slot_bytes

    @property
    def total(self) -> int:
        return self.content_at(self.places)


def _sum_of_record(place: int, raw: bytes) -> bytes:
    return _SUM.pack(xxhash.xxh3_64_intdigest(_SUM.pack(place) + raw))


def _make_header(identity: DiskIdentity, sizes: _Sizes) -> bytes:
    text = json.dumps({"version": VERSION, **asdict(identity), **asdict(sizes)}, sort_keys=True).encode()
    if len(text) > _HEADER - 128:
        text = json.dumps({"version": VERSION, "name": identity.file_name, **asdict(sizes)}, sort_keys=True).encode()
    raw = (MAGIC + struct.pack("<II", VERSION, len(text)) + text).ljust(_HEADER - 16, b"\0")
    return raw + xxhash.xxh3_128_digest(raw)


def _open(directory: Path, name: str) -> tuple[int, Path]:
    """The file, made where it is absent; no link is followed in the directory's last part or for the file."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            return os.open(name, flags, 0o600, dir_fd=folder), directory / name
        finally:
            os.close(folder)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "no path"
        raise ConfigError(
            f"KvCacheConfig(disk_cache_path={str(directory)!r}) cannot be used: {why}. Give a directory (no link) that "
            "this user may write to, or leave it out."
        ) from error


def _is_usable(descriptor: int, path: Path) -> bool:
    """Whether the file is ours alone; a warning where it is not."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink != 1:
        logger.warning("%s is not a file of this user's own and %s", path, _IGNORED)
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.warning("%s is used by another engine and %s", path, _IGNORED)
        return False
    os.fchmod(descriptor, 0o600)
    begin = os.pread(descriptor, len(MAGIC), 0)
    # A start that was cut short leaves nothing, or zeros.
    if begin.strip(b"\0") and begin != MAGIC:
        logger.warning("%s was not made by mm-core and %s; remove it, or choose another directory", path, _IGNORED)
        return False
    return True
