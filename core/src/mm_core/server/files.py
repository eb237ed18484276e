"""`file:` URLs: regular files below one directory, and nothing else."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path
from urllib.parse import unquote_to_bytes

from mm_core.errors import ConfigError, MediaBlockedError, MediaTooLargeError

_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")
_HEAD = re.compile(r"file:(?://(?:localhost)?)?(?=/)", re.IGNORECASE)
_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_REFUSED = "The file: URL names no regular file below the directory that this server reads. Send the content instead."


class FileReader:
    """Reads files below `root`; links below it are not followed. Raises ConfigError where that is no directory."""

    def __init__(self, root: Path) -> None:
        try:
            self._root = os.path.realpath(root, strict=True)
        except OSError:
            self._root = ""
        if not os.path.isdir(self._root) or self._root == "/":
            raise ConfigError(
                f"allowed_path={str(root)[:200]!r} is no directory below /. Name one that holds nothing but media."
            )
        # A root that is itself a link may be named by either of its paths.
        self._prefixes = {tuple(os.fsencode(p).split(b"/")[1:]) for p in (self._root, os.path.abspath(root))}

    def read(self, url: str, limit: int) -> bytes:
        """Content of the file that a `file:` URL names, at most `limit` bytes.

        One text for all that is refused: whether something is there outside of the root is not told. Raises
        MediaBlockedError, MediaTooLargeError.
        """
        handle = self._open(self._path(url))
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise MediaBlockedError(_REFUSED)
            _check(status.st_size, limit)
            with os.fdopen(handle, "rb", closefd=False) as file:
                data = file.read(limit + 1)  # it may have grown since
        except OSError as error:
            raise MediaBlockedError(_REFUSED) from error
        finally:
            os.close(handle)
        _check(len(data), limit)
        return data

    def _path(self, url: str) -> list[bytes]:
        """Names from the root down to the file."""
        head = _HEAD.match(url)
        path = unquote_to_bytes(url[head.end() :]) if head and url.isascii() and len(url) <= 4096 else b""
        names = path.split(b"/")[1:]
        found = [names[len(p) :] for p in self._prefixes if tuple(names[: len(p)]) == p]
        if not found or not found[0] or _CONTROL.search(path) or {b"", b".", b".."} & set(found[0]):
            raise MediaBlockedError(_REFUSED)
        return found[0]

    def _open(self, names: list[bytes]) -> int:
        """Walk down without following a single link: what is opened lies below the root, whoever renames what."""
        at = -1
        try:
            at = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            for name in names[:-1]:
                below = os.open(name, _FLAGS | os.O_DIRECTORY, dir_fd=at)
                os.close(at)
                at = below
            return os.open(names[-1], _FLAGS, dir_fd=at)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            raise MediaBlockedError(_REFUSED) from error
        finally:
            if at >= 0:
                os.close(at)


def _check(count: int, limit: int) -> None:
    if count > limit:
        raise MediaTooLargeError(f"The file has more than {limit} bytes. Send a smaller or more compressed one.")
