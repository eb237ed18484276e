"""Which URLs may be fetched: one strict reading of a URL, rules for its host, and a table of forbidden addresses.

A URL that two readers could read in two ways is refused; so is every address that is not plainly public.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

from mm_core.errors import ConfigError, MediaBlockedError

MAX_URL = 8192
IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
PORTS = {"http": 80, "https": 443}

_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})+")
_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9a-f:.]+\]|[a-z0-9.-]+)(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[^?#]*)?(?P<query>\?[^#]*)?(?:#.*)?",
    re.ASCII,
)
_AUTHORITY = re.compile(r"[^:/?#]+://[^/?#]*")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")  # how a last label reads that makes the whole host an IPv4 address
_UNSAFE = re.compile(r"[\x00-\x20\x7f-\U0010ffff\\<>\"^`{|}]")

# IANA's special-purpose registries (RFC 6890 and its successors), multicast, and Azure's host agent.
_FORBIDDEN_4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "168.63.129.16/32", "169.254.0.0/16",
        "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24",
        "192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4",
        "240.0.0.0/4",
    )
)  # fmt: skip
# Of IPv6 only 2000::/3 is given out. Left out of it: IETF's own (Teredo among them), documentation, 6to4, AS112.
# NAT64, mapped IPv4, site- and link-local, unique local and multicast addresses all lie outside.
_GLOBAL_6 = ipaddress.IPv6Network("2000::/3")
_FORBIDDEN_6 = tuple(
    ipaddress.IPv6Network(network)
    for network in ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20")
)


def is_public(address: IPAddress) -> bool:
    """Whether an address may be connected to. `ipaddress.is_global` alone lets NAT64, 6to4 and multicast pass."""
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _FORBIDDEN_4)
    if address not in _GLOBAL_6 or address.scope_id is not None:
        return False
    return not any(address in network for network in _FORBIDDEN_6)


@dataclass(frozen=True)
class Target:
    """A URL as it was read, once. host: a name in lower case, or the literal address that `address` holds."""

    scheme: str
    host: str
    port: int
    path: str
    address: IPAddress | None = None

    @property
    def authority(self) -> str:
        """The value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The URL, put together again."""
        return f"{self.scheme}://{self.authority}{self.path}"


def blocked(text: str) -> MediaBlockedError:
    """The error for a URL that may not be fetched."""
    return MediaBlockedError(f"{text} Send the content as a data: URL.")


def read_url(url: str) -> Target:
    """The parts of an http or https URL. Raises MediaBlockedError for anything unusual in it: other schemes, user
    names, backslashes, white space, control and non-ASCII characters, dots at an end, odd forms of addresses."""
    check_characters(url)
    head = _AUTHORITY.match(url)
    if head is None:
        raise blocked("The URL is not of the form https://host/path.")
    match = _URL.fullmatch(head[0].lower() + url[head.end() :])
    if match is None:
        raise blocked("The URL is not of the form https://host/path; user names and other schemes are not read.")
    scheme, host = match["scheme"], match["host"]
    port = int(match["port"]) if match["port"] else PORTS[scheme]
    address = _literal(host)
    if address is None and (len(host) > 253 or not _NAME.fullmatch(host)):
        raise blocked("The URL's host is no full domain name.")
    shown = host if address is None else str(address)
    return Target(scheme, shown, port, (match["path"] or "/") + (match["query"] or ""), address)


def check_characters(url: str) -> None:
    """Raise MediaBlockedError where a URL, or the target of a redirect, is long or holds unusual characters."""
    if len(url) > MAX_URL:
        raise blocked(f"The URL has more than {MAX_URL} characters.")
    if _UNSAFE.search(url):
        raise blocked("The URL holds characters that do not belong in one (names and paths in other scripts are "
                      "written as xn--… and %…).")  # fmt: skip


def _literal(host: str) -> IPAddress | None:
    """The address that a host spells in its one proper form; None for a name. Other numeric forms are refused."""
    if host.startswith("["):
        try:
            return ipaddress.IPv6Address(host[1:-1])
        except ValueError:
            raise blocked("The URL's address is no IPv6 address.") from None
    if not _NUMBER.fullmatch(host.rpartition(".")[2]):
        return None
    try:
        return ipaddress.IPv4Address(host)  # four decimal numbers without leading zeros, nothing else
    except ValueError:
        raise blocked("The URL's address is not written as four decimal numbers.") from None


class DomainRules:
    """Hosts that URLs may name: "example.org" is that host, "*.example.org" every host below it. An address is
    allowed only where it is listed itself. Raises ConfigError for anything else."""

    def __init__(self, domains: Iterable[str]) -> None:
        self._hosts: set[str] = set()
        self._suffixes: set[str] = set()
        for domain in domains:
            name = domain.strip().lower()
            below = name.startswith("*.")
            bare = name.removeprefix("*.")
            if not _NAME.fullmatch(bare) or (_NUMBER.fullmatch(bare.rpartition(".")[2]) and not _is_ipv4(name)):
                raise ConfigError(
                    f"allowed_domains: {domain[:80]!r} is no domain. Write example.org for one host, *.example.org for "
                    "all below it; names in other scripts as xn--…."
                )
            (self._suffixes if below else self._hosts).add(bare)

    def __bool__(self) -> bool:
        return bool(self._hosts or self._suffixes)

    def allow(self, host: str) -> bool:
        """Whether a host, in lower case, is allowed."""
        if host in self._hosts:
            return True
        labels = host.split(".")
        return any(".".join(labels[at:]) in self._suffixes for at in range(1, len(labels)))


def _is_ipv4(text: str) -> bool:
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True
