"""URLs of callers: what is fetched, and what is not even connected to."""

from __future__ import annotations

import asyncio
import gzip
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.web import Web, make_certificate, ok, redirect, web

from mm_core.errors import ConfigError, MediaBlockedError, MediaError, MediaFetchError, MediaTooLargeError
from mm_core.server.addresses import DomainRules, is_public, read_url
from mm_core.server.config import MediaConfig
from mm_core.server.fetcher import Lookups, Network, UrlFetcher

HOST = "media.example.org"
ALLOWED = ("*.example.org", "ok.net", "127.0.0.1", "169.254.169.254", "10.0.0.1", "0.0.0.0")


def anywhere(address: Any) -> bool:
    return True


def resolving(*addresses: str) -> Callable[[str, int], Awaitable[Sequence[str]]]:
    async def resolve(host: str, port: int) -> Sequence[str]:
        return addresses

    return resolve


def fetcher(at: Web, network: Network | None = None, **options: Any) -> UrlFetcher:
    """One that finds every name at the loopback, and takes it for public."""
    network = network or Network(resolving("127.0.0.1"), anywhere, {"http": at.port, "https": at.port})
    options = {"allowed_domains": ALLOWED, "allow_http": True, "fetch_timeout_s": 5.0} | options
    return UrlFetcher(MediaConfig(**options), network)


async def refused(made: UrlFetcher, url: str, kind: type[MediaError], code: str, limit: int = 1000) -> MediaError:
    with pytest.raises(kind) as caught:
        await made.fetch(url, limit)
    assert type(caught.value) is kind
    assert caught.value.code == code
    assert not any(leak in str(caught.value) for leak in ("127.0.0.1", "0x", "Errno", "Traceback", "certificate"))
    return caught.value


# -- what is never connected to ----------------------------------------------------------------

FORBIDDEN = [
    # U1: addresses, in all their spellings
    "http://169.254.169.254/latest/meta-data", "http://127.0.0.1:{port}/", "http://127.1:{port}/", "http://127.0.1/",
    "http://0:{port}/", "http://0.0.0.0:{port}/", "http://0x7f.1:{port}/", "http://0x7f000001:{port}/",
    "http://2130706433:{port}/", "http://0177.0.0.1:{port}/", "http://017700000001/", "http://127.0.0.1.:{port}/",
    "http://127.0.0.01:{port}/", "http://10.0.0.1:{port}/", "http://1.2.3.4.5/", "http://127.0.0.256/",
    "http://0x7f.0.0.0x1:{port}/", "http://media.example.org.:{port}/", "http://.example.org/", "http://a..example.org/",
    # U2: IPv6
    "http://[::1]:{port}/", "http://[::ffff:127.0.0.1]:{port}/", "http://[::ffff:169.254.169.254]/",
    "http://[fd00::1]:{port}/", "http://[fe80::1]:{port}/", "http://[fe80::1%25eth0]:{port}/", "http://[ff02::1]/",
    "http://[64:ff9b::a9fe:a9fe]/", "http://[2002:a9fe:a9fe::]/", "http://[::]:{port}/", "http://[::127.0.0.1]/",
    "http://[2001:0:7f00:1::]/", "http://[0:0:0:0:0:0:0:1]:{port}/", "http://[::1/", "http://[]/",
    # U3: two readers would read two hosts
    "http://ok.net\\@127.0.0.1:{port}/", "http://ok.net@127.0.0.1:{port}/", "http://user:pw@media.example.org:{port}/",
    "http://127.0.0.1:{port}\\@ok.net/", "http://ok.net\t.example.org/", "http://media.example\n.org:{port}/",
    "http://media.example.org:{port}/a b", " http://media.example.org:{port}/", "http://media。example。org:{port}/",
    "http://ｍedia.example.org:{port}/", "http://①②⑦.0.0.1:{port}/", "http://127。0。0。1:{port}/",
    "http://media.example.org\x00:{port}/", "http:///media.example.org:{port}/", "http:\\\\media.example.org:{port}/",
    "http://media.example.org%2f:{port}/", "http://media.example.org%00.evil.net:{port}/", "http://ex_ample.org/",
    "http://media.example.org:{port}:80/", "http://media.example.org:/", "http://media.example.org:99999/",
    "http://media.example.org:+80/", "http://-a.example.org:{port}/", "http://localhost:{port}/",
    "http://127.0.0.1:{port}#@ok.net/", "http://ok.net#@127.0.0.1:{port}/", "http:media.example.org:{port}/",
    # hosts and ports that nobody allowed
    "http://example.org:{port}/", "http://evilexample.org:{port}/", "http://media.example.org.evil.net:{port}/",
    "http://evil.net:{port}/", "http://sub.ok.net:{port}/", "http://media.example.org:22/", "http://media.example.org/",
    "http://xn--.example.net:{port}/",
    # U7: other schemes
    "ftp://media.example.org:{port}/", "gopher://media.example.org:{port}/", "s3://media.example.org/x",
    "javascript:alert(1)", "://media.example.org:{port}/", "//media.example.org:{port}/", "/etc/passwd", "", "http://",
    "file:///etc/passwd", "ws://media.example.org:{port}/", "http+unix://media.example.org/", "data:,x",
]  # fmt: skip


def test_nothing_forbidden_is_connected_to() -> None:
    async def go() -> None:
        async with web({"/": ok(b"secret")}) as at:
            network = Network(resolving("127.0.0.1"), ports={"http": at.port, "https": at.port})
            made = fetcher(at, network)
            for url in FORBIDDEN:
                await refused(made, url.format(port=at.port), MediaBlockedError, "url_blocked")
            assert at.connections == 0
            assert await fetcher(at).fetch(f"http://{HOST}:{at.port}/", 100) == b"secret"  # it does listen
            assert at.connections == 1

    assert len(FORBIDDEN) >= 40
    asyncio.run(go())


@pytest.mark.parametrize(
    "addresses",
    [("127.0.0.1",), ("93.184.215.14", "127.0.0.1"), ("::1",), ("2606:4700::1111", "fe80::1%1"), ("64:ff9b::7f00:1",),
     ("::ffff:127.0.0.1",), ("100.64.0.1",), ("224.0.0.1",), ("168.63.129.16",), ("255.255.255.255",)],
)  # fmt: skip
def test_names_of_addresses_that_are_not_public(addresses: tuple[str, ...]) -> None:
    """One such among a name's addresses is enough, wherever it comes from (A records, CNAMEs, a hosts file)."""

    async def go() -> None:
        async with web({"/": ok(b"secret")}) as at:
            made = fetcher(at, Network(resolving(*addresses), ports={"http": at.port, "https": at.port}))
            await refused(made, f"http://{HOST}:{at.port}/", MediaBlockedError, "url_blocked")
            assert at.connections == 0

    asyncio.run(go())


def test_a_name_is_resolved_once() -> None:
    """What a resolver says later does not matter: the connection goes to the address that was checked."""

    async def go() -> None:
        async with web({"/": ok(b"there")}) as good, web({"/": ok(b"secret")}) as bad:
            answers = [["127.0.0.2"], ["127.0.0.1"]]
            asked: list[str] = []

            async def rebinding(host: str, port: int) -> Sequence[str]:
                asked.append(host)
                return answers[min(len(asked), 2) - 1]

            network = Network(rebinding, lambda a: str(a) == "127.0.0.2", {"http": bad.port, "https": good.port})
            await refused(fetcher(bad, network), f"http://{HOST}:{bad.port}/", MediaFetchError, "fetch_failed")
            assert asked == [HOST]  # 127.0.0.2 does not listen; nobody asked for another
            await refused(fetcher(bad, network), f"http://{HOST}:{bad.port}/", MediaBlockedError, "url_blocked")
            assert bad.connections == 0

    asyncio.run(go())


def test_off_unless_domains_are_allowed() -> None:
    async def go() -> None:
        async with web({"/": ok(b"x")}) as at:
            for options in ({"allowed_domains": ()}, {"allow_http": False}):
                made = fetcher(at, **options)
                await refused(made, f"http://{HOST}:{at.port}/", MediaBlockedError, "url_blocked")
            assert at.connections == 0

    asyncio.run(go())


def test_public_addresses() -> None:
    for text in ("93.184.215.14", "1.1.1.1", "2606:4700:4700::1111", "2a00:1450:4001::200e"):
        assert is_public(ipaddress.ip_address(text))
    for text in (
        "0.1.2.3", "10.1.1.1", "100.127.0.1", "127.9.9.9", "169.254.1.1", "172.31.0.1", "192.0.0.8", "192.0.2.1",
        "192.88.99.1", "192.168.0.1", "198.19.0.1", "198.51.100.1", "203.0.113.1", "239.1.1.1", "240.0.0.1",
        "255.255.255.255", "::", "::1", "::ffff:1.1.1.1", "64:ff9b::1.1.1.1", "64:ff9b:1::1", "100::1", "2001::1",
        "2001:db8::1", "2001:20::1", "2002:101:101::1", "3fff::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fec0::1",
        "ff0e::1", "4000::1", "5f00::1",
    ):  # fmt: skip
        assert not is_public(ipaddress.ip_address(text)), text


def test_domain_rules() -> None:
    rules = DomainRules(("Example.org", "*.cdn.net", "1.1.1.1"))
    assert all(rules.allow(host) for host in ("example.org", "a.cdn.net", "a.b.cdn.net", "1.1.1.1"))
    assert not any(rules.allow(h) for h in ("a.example.org", "cdn.net", "xcdn.net", "org", "", "1.1.1.2", "net"))
    assert not DomainRules(())
    for wrong in ("*", "*.", "*.*.org", "https://a.org", "a.org:80", "a.org/x", "ä.org", "", "a", "127.1", "a.0x1"):
        with pytest.raises(ConfigError, match="allowed_domains"):
            DomainRules((wrong,))


def test_a_url_is_read_once() -> None:
    target = read_url("HTTPS://Media.Example.ORG/a/../b?q=1%20#frag")
    assert (target.scheme, target.host, target.port, target.path) == ("https", HOST, 443, "/a/../b?q=1%20")
    assert target.url == f"https://{HOST}/a/../b?q=1%20"
    assert read_url("http://[2606:4700::1]:81").authority == "[2606:4700::1]:81"


# -- what is fetched ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"), f"DNS:{HOST}")


def trusting(at: Web, certificate: tuple[Path, Path], **options: Any) -> UrlFetcher:
    tls = ssl.create_default_context(cafile=str(certificate[0]))
    network = Network(resolving("127.0.0.1"), anywhere, {"http": at.port, "https": at.port}, tls)
    return fetcher(at, network, **options)


def test_https(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    async def go() -> None:
        body = bytes(range(256)) * 1000
        pieces = b"".join(
            b"%x\r\n%s\r\n" % (len(body[at : at + 999]), body[at : at + 999]) for at in range(0, len(body), 999)
        )
        chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n"
        until_end = b"HTTP/1.0 200 OK\r\n\r\n" + body
        replies = {"/a?b=%20": ok(body, "Content-Encoding: identity"), "/chunked": chunked, "/end": until_end}
        async with web(replies, certificate) as at:
            made = trusting(at, certificate, allow_http=False)
            for path in replies:
                assert await made.fetch(f"https://{HOST}:{at.port}{path}", len(body)) == body
            head = at.requests[0].lower()
            assert f"host: {HOST}:{at.port}\r\n" in head
            assert "accept-encoding: identity" in head
            assert not any(name in head for name in ("cookie", "authorization", "referer", "proxy"))
            # The certificate is for this name alone, and only for those who trust it.
            other = f"https://other.example.org:{at.port}/end"
            await refused(made, other, MediaFetchError, "fetch_failed")
            distrusting = Network(resolving("127.0.0.1"), anywhere, {"http": at.port, "https": at.port})
            url = f"https://{HOST}:{at.port}/end"
            await refused(fetcher(at, distrusting), url, MediaFetchError, "fetch_failed")
            assert len(at.requests) == 3

    asyncio.run(go())


def test_redirects(certificate: tuple[Path, Path]) -> None:
    async def go() -> None:
        replies: dict[str, Any] = {
            "/": ok(b"there"),
            "/loop": redirect("/loop"),
            "/on": redirect("/"),
            "/two": redirect("on"),
        }
        async with web(replies, certificate) as at, web({"/": ok(b"plain")}) as plain:
            url = f"https://{HOST}:{at.port}"
            replies["/down"] = redirect(f"http://{HOST}:{plain.port}/")
            places = {
                "/private": f"https://127.0.0.1:{at.port}/", "/other": f"https://evil.net:{at.port}/",
                "/file": "file:///etc/passwd", "/odd": f"//127.1:{at.port}/", "/up": f"https://a@{HOST}:{at.port}/",
                "/tab": f"ht\ttps://{HOST}:{at.port}/", "/data": "data:image/png;base64,AAAA",
            }  # fmt: skip
            replies.update({path: redirect(place) for path, place in places.items()})
            network = Network(
                resolving("127.0.0.1"), anywhere, {"http": plain.port, "https": at.port},
                ssl.create_default_context(cafile=str(certificate[0])),
            )  # fmt: skip
            off, two = (fetcher(at, network, max_redirects=count) for count in (0, 2))
            two._rules = DomainRules(("*.example.org",))
            assert await two.fetch(f"{url}/on", 10) == b"there"
            assert await two.fetch(f"{url}/two", 10) == b"there"
            await refused(off, f"{url}/on", MediaBlockedError, "url_blocked")
            seen = at.connections
            await refused(two, f"{url}/loop", MediaBlockedError, "url_blocked")
            assert at.connections == seen + 3
            for path in ("/down", *places):
                await refused(two, url + path, MediaBlockedError, "url_blocked")
            assert at.connections == seen + 3 + 1 + len(places)  # none of them was followed
            assert plain.connections == 0

    asyncio.run(go())


def test_a_redirect_is_resolved_and_checked_anew() -> None:
    async def go() -> None:
        async with web({"/": redirect("http://inner.example.org:{port}/x")}) as at:
            at.replies["/"] = redirect(f"http://inner.example.org:{at.port}/x")

            async def resolve(host: str, port: int) -> Sequence[str]:
                return ["127.0.0.1"] if host == HOST else ["127.0.0.1", "10.0.0.1"]

            network = Network(resolve, lambda a: str(a) == "127.0.0.1", {"http": at.port, "https": 1})
            await refused(
                fetcher(at, network, max_redirects=5), f"http://{HOST}:{at.port}/", MediaBlockedError, "url_blocked"
            )
            assert at.connections == 1

    asyncio.run(go())


# -- what fails --------------------------------------------------------------------------------


async def drip(writer: asyncio.StreamWriter) -> None:
    """A byte at a time, for ever."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n")
    while not writer.transport.is_closing():
        writer.write(b"x")
        await asyncio.sleep(0.05)


async def drip_head(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while not writer.transport.is_closing():
        writer.write(b"X: y\r\n")
        await asyncio.sleep(0.05)


async def endless(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while not writer.transport.is_closing():
        writer.write(bytes(2**16))
        await writer.drain()


async def silent(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(5)


async def informal(writer: asyncio.StreamWriter) -> None:
    while not writer.transport.is_closing():
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await asyncio.sleep(0.05)


FAILURES: dict[str, Any] = {
    "/missing": b"HTTP/1.1 404 Not Found\r\nContent-Length: 6\r\n\r\nsecret",
    "/error": b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n",
    "/none": b"HTTP/1.1 204 No Content\r\n\r\n",
    "/part": b"HTTP/1.1 206 Partial Content\r\nContent-Length: 1\r\n\r\nx",
    "/gzip": ok(gzip.compress(bytes(10**6)), "Content-Encoding: gzip"),
    "/br": ok(b"x", "Content-Encoding: br"),
    "/both": ok(b"x", "Content-Encoding: identity, gzip"),
    "/transfer": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
    "/short": b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\nxyz",
    "/nonsense": b"220 smtp.internal ESMTP\r\n",
    "/hang-up": b"",
    "/heads": b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: %s\r\n" % (n, b"y" * 90) for n in range(1000)) + b"\r\n",
    "/nowhere": b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n",
    "/lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    "/drip": drip, "/drip-head": drip_head, "/endless": endless, "/silent": silent, "/informal": informal,
}  # fmt: skip


def test_what_gives_no_file_in_time() -> None:
    async def go() -> None:
        async with web(FAILURES) as at:
            made = fetcher(at, fetch_timeout_s=1.0)
            texts = set()
            for path in FAILURES:
                start = time.monotonic()
                fault = await refused(made, f"http://{HOST}:{at.port}{path}", MediaFetchError, "fetch_failed")
                assert time.monotonic() - start < 2.5, path
                texts.add(str(fault))
            assert len(texts) == 1  # nothing is told of what answered
            unresolved = Network(lambda host, port: _fails(), anywhere, {"http": at.port, "https": at.port})
            texts.add(
                str(
                    await refused(fetcher(at, unresolved), f"http://{HOST}:{at.port}/", MediaFetchError, "fetch_failed")
                )
            )
            hangs = Network(lambda host, port: asyncio.sleep(60), anywhere, {"http": at.port, "https": at.port})
            slow = fetcher(at, hangs, fetch_timeout_s=0.3)
            texts.add(str(await refused(slow, f"http://{HOST}:{at.port}/", MediaFetchError, "fetch_failed")))
            many = Network(resolving(*["127.0.0.1"] * 1000), anywhere, {"http": at.port, "https": at.port})
            texts.add(
                str(await refused(fetcher(at, many), f"http://{HOST}:{at.port}/", MediaFetchError, "fetch_failed"))
            )
            assert len(texts) == 1

    asyncio.run(go())


async def _fails() -> Sequence[str]:
    raise OSError("no such host: 10.1.2.3")


def test_size_is_bounded() -> None:
    async def go() -> None:
        async with web({"/": ok(b"x" * 1000)}) as at:
            url = f"http://{HOST}:{at.port}/"
            assert len(await fetcher(at).fetch(url, 1000)) == 1000
            with pytest.raises(MediaTooLargeError, match="999"):  # it says so itself
                await fetcher(at).fetch(url, 999)

    asyncio.run(go())


def test_a_cancelled_fetch_leaves_nothing() -> None:
    async def go() -> None:
        async with web({"/": silent}) as at:
            task = asyncio.ensure_future(fetcher(at).fetch(f"http://{HOST}:{at.port}/", 10))
            while not at.requests:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(go())


def test_another_address_is_tried() -> None:
    async def go() -> None:
        async with web({"/": ok(b"there")}) as at:
            network = Network(resolving("127.0.0.9", "127.0.0.1"), anywhere, {"http": at.port, "https": at.port})
            assert await fetcher(at, network).fetch(f"http://{HOST}:{at.port}/", 10) == b"there"

    asyncio.run(go())


def test_look_ups_that_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold up nothing but themselves, and only so many can."""
    real, ended = socket.getaddrinfo, threading.Event()

    def look_up(host: str, *more: Any, **options: Any) -> Any:
        if host.startswith("slow"):
            ended.wait(10)
        return real("127.0.0.1", *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)

    async def go() -> None:
        lookups = Lookups(3)
        assert await lookups("quick.example.org", 80) == ["127.0.0.1"]
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(lookups("slow.example.org", 80), 0.05)
        assert await lookups("quick.example.org", 80) == ["127.0.0.1"]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(lookups("slow.example.org", 80), 0.05)
        with pytest.raises(OSError, match="too many"):
            await lookups("quick.example.org", 80)
        ended.set()
        while lookups._left < 3:
            await asyncio.sleep(0.01)
        assert await lookups("quick.example.org", 80) == ["127.0.0.1"]

    asyncio.run(go())


def test_look_ups_for_which_there_is_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not counted as hanging."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def go() -> None:
        lookups = Lookups(1)
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            for _ in range(2):
                with pytest.raises(OSError, match="no thread"):
                    await lookups("localhost", 80)
        assert await lookups("localhost", 80)

    asyncio.run(go())


def test_names_that_nobody_has() -> None:
    async def go() -> None:
        with pytest.raises(OSError):  # noqa: PT011
            await Lookups()("no-such-host.invalid", 80)

    asyncio.run(go())
