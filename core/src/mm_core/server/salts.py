"""Who a key stands for, and the cache salt that keeps one key's reuse apart from another's."""

from __future__ import annotations

import hashlib

from mm_core.errors import InvalidParamsError, InvalidPromptError
from mm_core.inputs.caches import TENANT
from mm_core.inputs.messages import check_salt
from mm_core.server.config import ServerConfig
from mm_core.server.context import ANYBODY, Caller


def caller_of(key: str, *, admin: bool = False) -> Caller:
    """The caller that a key stands for: a name to log, and a salt, neither of which gives the key away."""
    return Caller(f"{'admin' if admin else 'key'}-{_digest('name', key)[:8]}", _digest("salt", key), admin)


def combine(caller: Caller, cache_salt: str | None) -> str | None:
    """The engine's salt for a caller's request: of the key and of the client's own `cache_salt`; None: of neither.

    Hashed, so that no client can name what belongs to another; the first half is the key's alone, by which what waits
    takes turns. Raises InvalidParamsError for a cache_salt that is none.
    """
    if cache_salt is None:
        return caller.salt
    try:
        check_salt(cache_salt)
    except InvalidPromptError as error:
        raise InvalidParamsError(str(error), param="cache_salt") from None
    joined = _digest("joined", caller.salt or "", cache_salt)
    return joined if caller.salt is None else caller.salt[:TENANT] + joined[TENANT:]


def _digest(*parts: str) -> str:
    """sha256 in hex over length-prefixed parts."""
    record = hashlib.sha256(b"mm-core salt")
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        record.update(len(data).to_bytes(8, "little") + data)
    return record.hexdigest()


def callers_of(config: ServerConfig) -> dict[str, Caller]:
    """Everybody who may call, by name: one a key, and anybody where no key is needed."""
    known = [caller_of(key.get_secret_value()) for key in config.api_keys] or [ANYBODY]
    if config.admin_key is not None:
        known.append(caller_of(config.admin_key.get_secret_value(), admin=True))
    return {caller.name: caller for caller in known}
