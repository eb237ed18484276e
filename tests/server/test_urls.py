"""URLs of pictures over HTTP (rows U of the catalogue of bad inputs): what a server reads for its callers."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.clips import picture
from support.openai_calls import Canary, check_error
from support.serving import Server, running_server

DOMAINS = ("media.example.org", "*.example.net", "127.0.0.1", "169.254.169.254", "0.0.0.0")
NAME = "media.example.org"


class Listener:
    """Ears on the loopback, of both families: how often anybody called."""

    def __init__(self) -> None:
        self.connections = 0
        self._sockets = []
        self.port = 0
        for family, host in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
            made = socket.socket(family, socket.SOCK_STREAM)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.bind((host, self.port))
            made.listen()
            self.port = made.getsockname()[1]
            self._sockets.append(made)
            threading.Thread(target=self._count, args=(made,), daemon=True).start()

    def _count(self, ear: socket.socket) -> None:
        while True:
            try:
                ear.accept()[0].close()
            except OSError:
                return
            self.connections += 1

    def close(self) -> None:
        for each in self._sockets:
            each.shutdown(socket.SHUT_RDWR)
            each.close()


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    made.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory to read, beside one that is not."""
    folder = tmp_path_factory.mktemp("files")
    inside = folder / "media"
    inside.mkdir()
    (folder / "media-secret").mkdir()
    for name in ("media/a.png", "media-secret/a.png", "secret.png"):
        (folder / name).write_bytes(picture())
    (inside / "out.png").symlink_to(folder / "secret.png")
    (inside / "up").symlink_to("..")
    os.mkfifo(inside / "pipe.png")
    return inside


@pytest.fixture(scope="module")
def reader(root: Path) -> Iterator[Server]:
    """A server that may read some hosts and one directory."""
    with running_server(
        in_process=True, decode_workers=1, allowed_domain=list(DOMAINS), allow_http=True, allowed_path=root,
        fetch_timeout_s=3, max_redirects=2,
    ) as made:  # fmt: skip
        yield made


@pytest.fixture(scope="module")
def http(reader: Server) -> Iterator[httpx.Client]:
    with reader.http() as made:
        yield made


@pytest.fixture(scope="module")
def canary(reader: Server) -> Iterator[Canary]:
    with closing(Canary(reader)) as made:
        yield made


def ask(http: httpx.Client, url: Any, stream: bool = False) -> httpx.Response:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": content}]
    body = {"model": http.get("/v1/models").json()["data"][0]["id"], "messages": messages, "max_tokens": 4}
    return http.post("/v1/chat/completions", json={**body, "temperature": 0, "stream": stream})


HOSTS = {
    "U1": [
        "169.254.169.254", "127.0.0.1", "127.0.0.1:{port}", "127.1:{port}", "0:{port}", "0.0.0.0:{port}",
        "0x7f.1:{port}",
        "0x7f000001:{port}", "2130706433:{port}", "0177.0.0.1:{port}", "0177.1", "127.0.0.1.:{port}",
        "127.0.0.01:{port}",
        "10.0.0.1", "192.168.0.1", "172.16.0.1", "100.64.0.1", "localhost:{port}", "localhost.:{port}", "metadata",
    ],
    "U2": [
        "[::1]:{port}", "[::]:{port}", "[::ffff:169.254.169.254]", "[::ffff:127.0.0.1]:{port}", "[fd00::1]",
        "[fe80::1]",
        "[fe80::1%25lo]:{port}", "[64:ff9b::a9fe:a9fe]", "[2002:a9fe:a9fe::]", "[ff02::1]", "[2001::1]",
        "[::127.0.0.1]",
    ],
    "U3": [
        "ok\\@127.0.0.1:{port}", f"{NAME}@127.0.0.1:{{port}}", f"user:pw@{NAME}", f"127.0.0.1:{{port}}#@{NAME}",
        f"127.0.0.1:{{port}}\\@{NAME}", f"{NAME}\t.evil.com", f"{NAME}\n", "127。0。0。1:{port}", "①②⑦.0.0.1:{port}",
        f"{NAME}。evil.com", f"{NAME}%00.evil.com", f"{NAME}:22", f"{NAME}:{{port}}", "evil.com", f"{NAME}.evil.com",
        f"evil{NAME}", "example.net",
    ],
}  # fmt: skip


@pytest.mark.parametrize("row", HOSTS)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_hosts_that_are_not_connected_to(
    http: httpx.Client, listener: Listener, canary: Canary, row: str, scheme: str
) -> None:
    for host in HOSTS[row]:
        url = f"{scheme}://{host.format(port=listener.port)}/latest/meta-data"
        error = check_error(ask(http, url), 400, "url_blocked")
        assert error["param"] == "messages", url
    assert listener.connections == 0
    socket.create_connection(("127.0.0.1", listener.port)).close()  # it does listen
    while not listener.connections:
        pass
    listener.connections = 0
    canary.check()


@pytest.mark.parametrize("stream", [False, True])
def test_other_schemes(http: httpx.Client, canary: Canary, stream: bool) -> None:
    for url in (
        "ftp://media.example.org/x", "gopher://media.example.org/", "s3://bucket/x", "javascript:alert(1)", "://x", "x",
        "//media.example.org/x.png", "/etc/passwd", "http:", "http://", "https:///x", "HTTP:\\\\media.example.org\\",
        " https://media.example.org/", "ws://media.example.org/", "unix:/run/x.sock", "data :x", "blob:https://x",
    ):  # fmt: skip
        check_error(ask(http, url, stream), 400, "url_blocked")
    assert ask(http, "").status_code == 400
    canary.check()


def test_u6_files(http: httpx.Client, root: Path, canary: Canary) -> None:
    good = ask(http, f"file://{root}/a.png")
    assert good.status_code == 200, good.text
    for url in (
        "file:///etc/passwd", f"file://{root}/../secret.png", f"file://{root}/%2e%2e/secret.png",
        f"file://{root}/out.png", f"file://{root}/up/secret.png", f"file://{root}-secret/a.png", "file:///dev/zero",
        f"file://{root}/pipe.png", "file:///proc/self/environ", f"file://{root}", f"file://{root}/absent.png",
        f"file://{root}/a.png%00", f"file://evil.com{root}/a.png", "file://a.png", "file:a.png",
    ):  # fmt: skip
        check_error(ask(http, url), 400, "url_blocked")
    canary.check()


def test_u8_a_host_that_does_not_answer(http: httpx.Client, canary: Canary) -> None:
    """Allowed, and without an address: the name is nobody's."""
    error = check_error(ask(http, "https://no-such-host.example.net/x.png"), 400, "fetch_failed")
    assert "example.net" not in error["message"]
    canary.check()


def test_nothing_is_fetched_unless_it_is_allowed(server: Server, listener: Listener) -> None:
    before = listener.connections
    with server.http() as http:
        for url in (f"http://127.0.0.1:{listener.port}/", f"https://{NAME}/x.png", "file:///etc/passwd"):
            check_error(ask(http, url), 400, "url_blocked")
    assert listener.connections == before
