"""`file:` URLs: what is read of a disk, and what is not."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest

from mm_core.errors import ConfigError, MediaBlockedError, MediaTooLargeError
from mm_core.server.files import FileReader


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory to read, beside things that are none of anybody's business."""
    inside = tmp_path / "media"
    (inside / "deep" / "er").mkdir(parents=True)
    (inside / "a.png").write_bytes(b"content of a")
    (inside / "deep" / "er" / "b c%é.png").write_bytes(b"content of b")
    (inside / "empty").write_bytes(b"")
    (inside / "dir.png").mkdir()
    (tmp_path / "media-secret").mkdir()
    (tmp_path / "media-secret" / "x.png").write_bytes(b"secret")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (inside / "out.png").symlink_to(tmp_path / "secret.png")
    (inside / "relative.png").symlink_to("../secret.png")
    (inside / "out").symlink_to(tmp_path)
    (inside / "up").symlink_to("..")
    (inside / "zero").symlink_to("/dev/zero")
    (inside / "loop").symlink_to("loop")
    (inside / "self").symlink_to("/proc/self")
    os.mkfifo(inside / "pipe.png")
    return inside


def test_files_below_the_root(root: Path) -> None:
    reader = FileReader(root)
    for head in ("file://", "file:", "FILE://", "file://localhost"):
        assert reader.read(f"{head}{root}/a.png", 12) == b"content of a"
    assert reader.read((root / "deep" / "er" / "b c%é.png").as_uri(), 100) == b"content of b"
    assert reader.read(f"file://{root}/empty", 100) == b""


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "file://{root}/../secret.png", "file://{root}/deep/../../secret.png",
        "file://{root}/%2e%2e/secret.png", "file://{root}/..%2fsecret.png", "file://{root}-secret/x.png",
        "file://{root}/out.png", "file://{root}/relative.png", "file://{root}/out/secret.png",
        "file://{root}/up/secret.png", "file://{root}/up/media/a.png", "file://{root}/zero", "file://{root}/loop",
        "file://{root}/self/environ", "file:///proc/self/environ", "file:///dev/zero", "file://{root}/pipe.png",
        "file://{root}/dir.png", "file://{root}", "file://{root}/", "file://{root}//a.png", "file://{root}/./a.png",
        "file://{root}/a.png/", "file://{root}/a.png/x", "file://{root}/absent.png", "file://{root}/a.png%00.jpg",
        "file://{root}/a.png%0a", "file://example.org{root}/a.png", "file://127.0.0.1{root}/a.png",
        "file:a.png", "file://a.png", "file:./a.png", "file:", "file://", "file:///", "file://{root}/ä.png",
        "file:////{root}/a.png", "file:\\\\{root}\\a.png", "file://{root}\\a.png",
    ],
)  # fmt: skip
def test_nothing_else_is_read(root: Path, url: str) -> None:
    start = time.monotonic()
    with pytest.raises(MediaBlockedError) as caught:
        FileReader(root).read(url.format(root=root), 1000)
    assert caught.value.code == "url_blocked"
    assert time.monotonic() - start < 1.0
    assert str(root) not in str(caught.value)


def test_whether_something_is_there_is_not_told(root: Path) -> None:
    texts = set()
    for url in ("file:///etc/passwd", "file:///etc/absent", f"file://{root}/out.png", f"file://{root}/absent"):
        with pytest.raises(MediaBlockedError) as caught:
            FileReader(root).read(url, 1000)
        texts.add(str(caught.value))
    assert len(texts) == 1


def test_size_is_bounded(root: Path) -> None:
    with open(root / "large", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(MediaTooLargeError):
        FileReader(root).read(f"file://{root}/large", 10**6)
    with pytest.raises(MediaTooLargeError):
        FileReader(root).read(f"file://{root}/a.png", 11)


def test_a_root_that_is_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    reader = FileReader(tmp_path / "link")
    assert reader.read(f"file://{tmp_path}/link/a.png", 100) == b"content of a"
    assert reader.read(f"file://{root}/a.png", 100) == b"content of a"


def test_no_descriptors_are_left(root: Path) -> None:
    reader = FileReader(root)
    before = len(os.listdir("/proc/self/fd"))
    for name in ("a.png", "absent", "deep/er/x", "out.png", "pipe.png", "dir.png"):
        for _ in range(5):
            with contextlib.suppress(MediaBlockedError):
                reader.read(f"file://{root}/{name}", 1000)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("path", ["/", "/absent/directory", "/etc/passwd"])
def test_roots_that_are_none(path: str) -> None:
    with pytest.raises(ConfigError, match="allowed_path"):
        FileReader(Path(path))
