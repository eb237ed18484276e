"""/admin/…: the caches in an operator's hands, and the server's inside. Under the admin key, and off without one.

Whose caches: `caller` is a key's name as the log shows it ("key-1a2b3c4d"), `cache_salt` what that caller's requests
give. Without `caller` it is everybody's who calls without a key; where keys are set, it must be given.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from mm_core.engine.feeds import AsyncCacheEvents
from mm_core.errors import InvalidParamsError
from mm_core.inputs.messages import ChatPrompt
from mm_core.server.body import read_model
from mm_core.server.context import ANYBODY, ServerContext, call_of, context_of
from mm_core.server.failures import json_reply
from mm_core.server.routing import Route
from mm_core.server.salts import callers_of, combine
from mm_core.types import CacheEvent, TextPrompt

_BEAT_S = 15.0  # between two signs of life of a quiet stream of events

Uuid = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")]
Salt = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]


class Whose(BaseModel):
    """Whose caches are meant."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    caller: Annotated[str, Field(max_length=64, description="A key's name, as in the log.")] | None = None
    cache_salt: Salt | None = None


class Named(Whose):
    """One item, by the name that its caller gave it."""

    uuid: Uuid


class Forget(Whose):
    """One item, or without uuid all of that salt."""

    uuid: Uuid | None = None


class Prompt(Whose):
    """A conversation or a text, as the chat and completion routes take them."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1024)] | None = None
    prompt: Annotated[str, Field(min_length=1)] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None


class Warm(Prompt):
    """What to compute ahead of need. pin: keep its named items."""

    pin: bool = False


class WarmedReply(BaseModel):
    """What is in the caches now, and what was there before."""

    prompt_tokens: int
    cached_tokens: int
    media_tokens: int
    encoded_media_tokens: int


class PinnedReply(BaseModel):
    """What is pinned of an item."""

    kv_tokens: int
    encoder_rows: int
    features: int
    stored: int


class EvictedReply(BaseModel):
    """What was forgotten."""

    kv_blocks: int
    encoder_items: int
    stored: int
    features: int


class LookupReply(BaseModel):
    """What of a prompt would be found now, by level."""

    prompt_tokens: int
    device_tokens: int
    host_tokens: int
    disk_tokens: int
    media: int
    encoded_media: int
    restorable_media: int
    source_tokens: int
    cached_source_tokens: int


class Done(BaseModel):
    """It is done."""

    done: bool = True


async def warm(request: Request) -> Response:
    """Compute a prompt and its media into the caches. It waits for its turn as any call does."""
    context, call = context_of(request), call_of(request)
    body = await read_model(request, Warm)
    prompt = await _prompt(request, body)
    async with context.gate.enter(call):
        warmed = await context.engine.cache.warm(prompt, pin=body.pin)
    return json_reply(dataclasses.asdict(warmed))


async def pin(request: Request) -> Response:
    """Keep what was and will be computed from an item."""
    body = await read_model(request, Named)
    context = context_of(request)
    return json_reply(dataclasses.asdict(await context.engine.cache.pin(body.uuid, _salt(context, body))))


async def unpin(request: Request) -> Response:
    """Undo a pin."""
    body = await read_model(request, Named)
    context = context_of(request)
    await context.engine.cache.unpin(body.uuid, _salt(context, body))
    return json_reply(Done().model_dump())


async def evict(request: Request) -> Response:
    """Forget an item, or all of a salt."""
    body = await read_model(request, Forget)
    context = context_of(request)
    salt = _salt(context, body)
    if body.uuid is not None:
        evicted = await context.engine.cache.evict(body.uuid, cache_salt=salt)
    elif salt is None:
        raise InvalidParamsError("Name what is to be forgotten: a uuid, or a caller or cache_salt.", param="uuid")
    else:
        evicted = await context.engine.cache.evict(salt=salt)
    return json_reply(dataclasses.asdict(evicted))


async def clear(request: Request) -> Response:
    """Forget everything, pins and names too."""
    return json_reply(dataclasses.asdict(await context_of(request).engine.cache.clear()))


async def lookup(request: Request) -> Response:
    """How much of a prompt would be found now."""
    body = await read_model(request, Prompt)
    prompt = await _prompt(request, body)
    return json_reply(dataclasses.asdict(await context_of(request).engine.cache.lookup(prompt)))


async def cache_stats(request: Request) -> Response:
    """Sizes and counters of every level."""
    return json_reply(dataclasses.asdict(await context_of(request).engine.cache.stats()))


async def stats(request: Request) -> Response:
    """The server's inside, for operators and tests: engine, gate and process."""
    context = context_of(request)
    health = context.engine.health(context.config.stall_timeout_s)
    found = {
        "engine": await context.engine.stats(),
        "health": dataclasses.asdict(health),
        "gate": {
            "calls": context.gate.calls,
            "running": context.gate.running,
            "waiting": context.gate.waiting,
            "refused": context.gate.refused,
            "bytes_held": context.gate.bytes_held,
        },
        "process": await asyncio.to_thread(_process),
    }
    return json_reply(_plain(found))


async def events(request: Request) -> Response:
    """What is cached now and every change, as server-sent events: one JSON object each, `lost` where the reader was
    too slow."""
    context = context_of(request)
    feed = await context.engine.cache.events()

    async def lines() -> AsyncIterator[bytes]:
        lost = 0
        ending = asyncio.create_task(_end_with(context.gate.closing, feed))
        try:
            while True:
                try:
                    async with asyncio.timeout(_BEAT_S):
                        event = await anext(feed)
                except TimeoutError:
                    yield b": still here\n\n"
                    continue
                except StopAsyncIteration:
                    return
                if feed.lost != lost:
                    lost = feed.lost
                    yield f"event: lost\ndata: {lost}\n\n".encode()
                yield b"data: " + json.dumps(_event(event)).encode() + b"\n\n"
        finally:
            ending.cancel()
            await feed.aclose()

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def _end_with(closing: asyncio.Event, feed: AsyncCacheEvents) -> None:
    """A stream of events has no end of its own: it ends when the server drains."""
    await closing.wait()
    await feed.aclose()


def _event(event: CacheEvent) -> dict[str, Any]:
    told = dataclasses.asdict(event)
    return {**told, "key": event.key.hex(), "parent": event.parent.hex()}


def _salt(context: ServerContext, body: Whose) -> str | None:
    """The engine's salt for whoever is meant. Raises InvalidParamsError for a caller that no key has."""
    known = callers_of(context.config)
    if body.caller is None:
        if ANYBODY.name not in known:
            raise InvalidParamsError("Say whose caches are meant: caller, a key's name as in the log.", param="caller")
        return combine(ANYBODY, body.cache_salt)
    if body.caller not in known:
        raise InvalidParamsError("No key has that name; the log shows the names.", param="caller")
    return combine(known[body.caller], body.cache_salt)


async def _prompt(request: Request, body: Prompt) -> Any:
    """The engine's prompt of a body. Raises InvalidParamsError, and what the media's way in raises."""
    context = context_of(request)
    if (body.messages is None) == (body.prompt is None):
        raise InvalidParamsError("Give exactly one of messages and prompt.", param="messages")
    options: Mapping[str, Any] = {
        "mm_processor_kwargs": body.mm_processor_kwargs, "cache_salt": _salt(context, body)
    }  # fmt: skip
    if body.messages is None:
        return TextPrompt(prompt=body.prompt, **options)
    return ChatPrompt(await context.intake.read_messages(body.messages, call_of(request)), **options)


def _process() -> dict[str, Any]:
    """This process's id, memory in bytes and open files, as far as the system tells."""
    found: dict[str, Any] = {"pid": os.getpid()}
    with suppress(OSError, ValueError, IndexError):
        found["open_files"] = len(os.listdir("/proc/self/fd"))
        with open("/proc/self/statm", encoding="ascii") as file:
            found["rss_bytes"] = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return found


def _plain(value: Any) -> Any:
    """Values that JSON has; of others their text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    return value if isinstance(value, str | int | bool | None) else str(value)


ROUTES = (
    Route("/admin/stats", "GET", stats, None, summary="The server's inside", access="admin", essential=True),
    Route("/admin/cache/stats", "GET", cache_stats, None, summary="Sizes and counters", access="admin"),
    Route("/admin/cache/events", "GET", events, None, {200: "text/event-stream"}, "Changes, as they come", "admin"),
    Route("/admin/cache/warm", "POST", warm, Warm, {200: WarmedReply}, "Compute ahead of need", "admin"),
    Route("/admin/cache/pin", "POST", pin, Named, {200: PinnedReply}, "Keep an item", "admin"),
    Route("/admin/cache/unpin", "POST", unpin, Named, {200: Done}, "Undo a pin", "admin"),
    Route("/admin/cache/evict", "POST", evict, Forget, {200: EvictedReply}, "Forget an item or a salt", "admin"),
    Route("/admin/cache/clear", "POST", clear, None, {200: EvictedReply}, "Forget everything", "admin"),
    Route("/admin/cache/lookup", "POST", lookup, Prompt, {200: LookupReply}, "What would be found", "admin"),
)
