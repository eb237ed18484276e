"""Which web pages may call where no key is needed: any page that a user of this machine looks at could, otherwise."""

from __future__ import annotations

import re
from ipaddress import ip_address

from mm_core.errors import PermissionDeniedError
from mm_core.server.config import ServerConfig

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:]+)(?::[0-9]*)?")


class Pages:
    """Tells a page's call by what its browser adds to it, which no page can change: Host, Origin, Sec-Fetch-Site."""

    def __init__(self, config: ServerConfig) -> None:
        self._names = {"localhost", config.host.lower(), *(name.lower() for name in config.allowed_hosts)}
        self._origins = {origin.rstrip("/").encode() for origin in config.allowed_origins}

    def check(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Raise PermissionDeniedError for a call that a page of somebody else may have sent. headers: names in lower
        case."""
        given = dict(headers)
        origin = given.get(b"origin")
        if b"*" in self._origins:
            return
        host = given.get(b"host")
        if host is not None and not self._is_ours(host.decode("latin-1").lower()):
            raise PermissionDeniedError(
                "The server does not know the name that it was called by. The option --allowed-host names those that "
                "it has; or call it by its address, or with keys."
            )
        if origin in self._origins:
            return
        site = given.get(b"sec-fetch-site")
        # Browsers tell the site to https and local addresses only; the origin with all but plain GETs.
        other = origin is not None and origin.lower().partition(b"://")[2] != (host or b"").lower()
        if site not in (b"same-origin", b"none") if site is not None else other:
            raise PermissionDeniedError("This web page may not call. The option --allow-origin names those that may.")

    def _is_ours(self, host: str) -> bool:
        """Whether a Host header names this server. A page's own name can be made to lead here (DNS rebinding), so
        names have to be known. Addresses need not: with one of them in Host, none was looked up."""
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = match[1].strip("[]")
        if name in self._names:
            return True
        try:
            ip_address(name)
        except ValueError:
            return False
        return True
