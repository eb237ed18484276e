"""The one place where the server opens connections for its callers: media behind https (and http) URLs.

A URL is read once, its host resolved once, every address checked, and the connection made to one of the checked
addresses: no proxy, no cookies, no credentials, and no second look-up that could answer differently.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urljoin

import h11

from mm_core.errors import MediaFetchError, MediaTooLargeError, MMError
from mm_core.server.addresses import (
    PORTS,
    DomainRules,
    IPAddress,
    Target,
    blocked,
    check_characters,
    is_public,
    read_url,
)
from mm_core.server.config import MediaConfig
from mm_core.server.shares import Shares

logger = logging.getLogger(__name__)

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
_AGENT = "mm-core"
_CHUNK = 2**16
_MAX_HEAD = 2**15
_MAX_ADDRESSES = 32
_MAX_TRIES = 3
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
# One text for all: what an address answered, or that it did not, is not for the caller to learn.
_FAILED = (
    "The URL could not be fetched: it gave no file in time, or not in full. Check that it opens without a login, or "
    "send the content as a data: URL."
)
_NOT_ALLOWED = "The URL's host is not one that this server fetches from."


class Lookups:
    """Addresses of hosts, by the system's resolver. That takes as long as name servers like, and cannot be stopped:
    each look-up has a thread of its own, that holds up neither other work nor the end of the process."""

    def __init__(self, at_once: int = 64) -> None:
        self._left = at_once

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        """Raises OSError where there are none, too many look-ups hang, or a thread cannot start."""
        if self._left <= 0:
            raise OSError("too many look-ups hang")
        loop = asyncio.get_running_loop()
        told: asyncio.Future[list[str]] = loop.create_future()

        def finish(addresses: list[str], error: Exception | None) -> None:
            self._left += 1
            if told.done():  # nobody waits any more
                return
            if error is None:
                told.set_result(addresses)
            else:
                told.set_exception(error)

        def look_up() -> None:
            addresses, fault = [], None
            try:
                found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
            except Exception as error:
                fault = error
            with contextlib.suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(finish, addresses, fault)

        self._left -= 1
        try:
            threading.Thread(target=look_up, name="mm-lookup", daemon=True).start()
        except RuntimeError as error:  # the process has as many threads as it may
            self._left += 1
            raise OSError("no thread for a look-up") from error
        return await told


@dataclass(frozen=True)
class Network:
    """How the outside is reached; other than the defaults only in tests. ports: by scheme. public: which addresses
    may be connected to."""

    resolve: Resolve = field(default_factory=Lookups)
    public: Callable[[IPAddress], bool] = is_public
    ports: Mapping[str, int] = field(default_factory=lambda: PORTS)
    tls: ssl.SSLContext = field(default_factory=ssl.create_default_context)


class UrlFetcher:
    """Fetches URLs as `config` allows. At most `concurrency` at a time, and half of that for one caller."""

    def __init__(self, config: MediaConfig, network: Network | None = None, *, concurrency: int = 32) -> None:
        self._config = config
        self._rules = DomainRules(config.allowed_domains)
        self._network = network or Network()
        self._slots = Shares(concurrency)

    def check(self, url: str) -> Target:
        """Read a URL; nothing is resolved. Raises MediaBlockedError where it may not be fetched."""
        if not self._rules:
            raise blocked("This server fetches no URLs; whoever runs it can allow domains.")
        target = read_url(url)
        if target.scheme == "http" and not self._config.allow_http:
            raise blocked("This server fetches https URLs only.")
        if target.port != self._network.ports[target.scheme]:
            raise blocked("The URL names a port other than its scheme's own.")
        if not self._rules.allow(target.host) or not (target.address is None or self._network.public(target.address)):
            raise blocked(_NOT_ALLOWED)
        return target

    async def fetch(self, url: str, limit: int, caller: str = "") -> bytes:
        """The content behind a URL, at most `limit` bytes, within the configured time all in all.

        Raises MediaBlockedError, MediaFetchError, and MediaTooLargeError where the reply says that it is larger.
        """
        target = self.check(url)
        try:
            async with asyncio.timeout(self._config.fetch_timeout_s), self._slots.of(caller):
                return await self._follow(target, limit)
        except MMError:
            raise
        except (OSError, TimeoutError, ValueError, h11.ProtocolError) as error:  # ssl's errors are OSErrors
            logger.info("fetching from %s failed: %r", target.host, error)
            raise MediaFetchError(_FAILED) from error

    async def _follow(self, target: Target, limit: int) -> bytes:
        for _ in range(self._config.max_redirects + 1):
            reply = await self._get(target, limit)
            if isinstance(reply, bytes):
                return reply
            check_characters(reply)  # urljoin would drop some of them
            there = self.check(urljoin(target.url, reply))
            if target.scheme == "https" and there.scheme != "https":
                raise blocked("The URL redirects from https to http.")
            target = there
        raise blocked("The URL redirects, once more than this server follows.")

    async def _get(self, target: Target, limit: int) -> bytes | str:
        """The content, or where a redirect points."""
        addresses = await self._addresses(target)
        reader, writer = await self._connect(target, addresses)
        try:
            return await _Exchange(reader, writer, limit).get(target)
        finally:
            writer.transport.abort()  # at once: no goodbye that the other side could delay

    async def _addresses(self, target: Target) -> list[str]:
        """Where to connect to; all of a name's addresses must be public."""
        if target.address is not None:
            return [str(target.address)]
        found = list(await self._network.resolve(target.host, target.port))
        if not 0 < len(found) <= _MAX_ADDRESSES:
            raise ValueError(f"{len(found)} addresses")
        addresses = [ipaddress.ip_address(address) for address in found]
        if not all(self._network.public(address) for address in addresses):
            logger.warning("blocked: %s resolves to an address that is not public", target.host)
            raise blocked(_NOT_ALLOWED)
        return [str(address) for address in addresses]

    async def _connect(
        self, target: Target, addresses: Sequence[str]
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        fault: OSError = OSError("no address")
        for address in addresses[:_MAX_TRIES]:
            try:
                return await self._connect_to(target, address)
            except OSError as error:
                fault = error
        raise fault

    async def _connect_to(self, target: Target, address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to exactly this address; a certificate is checked against the URL's host."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        plain = socket.socket(family, socket.SOCK_STREAM)
        try:
            plain.setblocking(False)
            await asyncio.get_running_loop().sock_connect(plain, (address, target.port))
            if target.scheme == "http":
                return await asyncio.open_connection(sock=plain, limit=_CHUNK)
            return await asyncio.open_connection(
                sock=plain, ssl=self._network.tls, server_hostname=target.host, limit=_CHUNK
            )
        except BaseException:
            plain.close()
            raise


class _Exchange:
    """One GET on one connection; the body is counted as it comes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: int) -> None:
        self._reader, self._writer, self._limit = reader, writer, limit
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD)

    async def get(self, target: Target) -> bytes | str:
        """The body of a plain 200, or the Location of a redirect; ValueError for all else."""
        headers = [
            ("Host", target.authority), ("User-Agent", _AGENT), ("Accept", "*/*"), ("Accept-Encoding", "identity"),
            ("Connection", "close"),
        ]  # fmt: skip
        request = h11.Request(method="GET", target=target.path, headers=headers)
        self._writer.write((self._http.send(request) or b"") + (self._http.send(h11.EndOfMessage()) or b""))
        await self._writer.drain()
        head = await self._next()
        while isinstance(head, h11.InformationalResponse):
            head = await self._next()
        if not isinstance(head, h11.Response):
            raise ValueError("no response")
        found = {name.decode("ascii"): value.decode("latin-1").strip() for name, value in head.headers}
        if head.status_code in _REDIRECTS:
            if "location" not in found:
                raise ValueError("a redirect to nowhere")
            return found["location"]
        if head.status_code != 200 or found.get("content-encoding", "identity").lower() != "identity":
            raise ValueError(f"status {head.status_code}, encoding {found.get('content-encoding')!r}")
        if int(found.get("content-length") or 0) > self._limit:
            raise MediaTooLargeError(f"The file behind the URL has more than {self._limit} bytes. Use a smaller one.")
        return await self._body()

    async def _body(self) -> bytes:
        body = bytearray()
        while True:
            event = await self._next()
            if isinstance(event, h11.Data):
                if len(body) + len(event.data) > self._limit:
                    raise ValueError(f"more than {self._limit} bytes")
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                return bytes(body)
            else:
                raise ValueError("the connection ended")

    async def _next(self) -> object:
        while True:
            event = self._http.next_event()
            if event is not h11.NEED_DATA:
                return event
            self._http.receive_data(await self._reader.read(_CHUNK))
