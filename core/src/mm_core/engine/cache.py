"""`engine.cache`: what users do to the caches, and what they are told of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from mm_core.config import SamplingParams
from mm_core.engine.feeds import AsyncCacheEvents, CacheEvents, Feed, Subscription
from mm_core.engine.frontend import Frontend
from mm_core.engine.messages import AskLevels, EvictItems, Held, LevelStats, LookUp, PinItem, UnpinItem
from mm_core.errors import InvalidParamsError, InvalidPromptError, MMError
from mm_core.inputs.caches import Owner
from mm_core.inputs.messages import PromptLike, check_salt, given_item
from mm_core.inputs.warm import WarmPrompt, as_warm_prompts
from mm_core.types import CacheEvent, CacheLookup, RequestOutput

EVENTS = 65536  # that wait for a slow reader, before the oldest are lost

_WARMING = SamplingParams(max_tokens=1, temperature=0.0)


@dataclass(frozen=True)
class Warmed:
    """What `warm` did. prompt_tokens: that are in the caches now, as far as they fill blocks; cached_tokens of them
    were there before. media_tokens: encoder rows of the items; encoded_media_tokens of them were encoded now."""

    prompt_tokens: int
    cached_tokens: int
    media_tokens: int = 0
    encoded_media_tokens: int = 0

    @property
    def computed_tokens(self) -> int:
        """Tokens that were computed."""
        return self.prompt_tokens - self.cached_tokens


@dataclass(frozen=True)
class Pinned:
    """What is pinned of an item now; what is computed from it later joins, while there is room among the pinned.
    kv_tokens, encoder_rows: on the device; stored: entries that were in the host's memory only."""

    kv_tokens: int
    encoder_rows: int
    features: int
    stored: int = 0


@dataclass(frozen=True)
class Evicted:
    """What was forgotten. kv_blocks, encoder_items: on the device; stored: entries in the host's memory and on disk;
    features: preprocessed items."""

    kv_blocks: int = 0
    encoder_items: int = 0
    stored: int = 0
    features: int = 0


@dataclass(frozen=True)
class CacheStats:
    """Counters since the start, and sizes now, of each level of the caches. A level that is not there has capacity 0.

    processor: preprocessed media; encoder: rows on the device; device: KV blocks there; host and disk: what left the
    device, KV blocks and rows.
    """

    processor: LevelStats
    encoder: LevelStats
    device: LevelStats
    host: LevelStats
    disk: LevelStats


class _Desk:
    """What `CacheControl` and `AsyncCacheControl` share. Methods that wait for the engine may take a step's time."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    def begin_warm(self, prompt: WarmPrompt, pin: bool) -> tuple[Future[RequestOutput], str, list[Owner]]:
        """Start to compute a prompt: its output, its request's id, and the names that it gives."""
        given = self._frontend.pipeline.read(prompt)
        check_salt(given.cache_salt)
        names = [Owner(given.cache_salt, item.uuid) for item in given.items if item.uuid is not None]
        if pin and not names:
            raise InvalidParamsError("pin=True keeps items by their names: give uuid=...", param="uuid")
        done: Future[RequestOutput] = Future()

        def listener(result: RequestOutput | MMError) -> None:
            if done.set_running_or_notify_cancel():
                done.set_exception(result) if isinstance(result, MMError) else done.set_result(result)

        return done, self._frontend.add(prompt, _WARMING, listener), names

    def pin(self, uuid: Any, cache_salt: Any) -> Pinned:
        owner = _owner(uuid, cache_salt)
        media = self._frontend.pipeline.media
        with self._frontend.desk.changes:
            fresh = media.pin(owner)
            try:
                held: Held = self._frontend.desk.ask(PinItem, uuid, cache_salt).result()
            except BaseException:
                if fresh:  # all of it, or nothing
                    media.unpin(owner)
                raise
        block_size = self._frontend.config.kv_cache_config.block_size
        return Pinned(held.blocks * block_size, held.rows, media.cache.count(owner), held.stored)

    def unpin(self, uuid: Any, cache_salt: Any) -> None:
        owner = _owner(uuid, cache_salt)
        with self._frontend.desk.changes:
            self._frontend.pipeline.media.unpin(owner)
            self._frontend.desk.ask(UnpinItem, uuid, cache_salt).result()

    def evict(self, uuid: Any, cache_salt: Any, salt: Any) -> Evicted:
        if (uuid is None) == (salt is None) or (uuid is None and cache_salt is not None):
            raise InvalidParamsError(
                "evict() takes a uuid (with cache_salt, if it was given under one), or salt=... for all of a salt. "
                "clear() forgets everything.",
                param="uuid",
            )
        if uuid is not None:
            wanted = _owner(uuid, cache_salt)
            return self._evict(lambda owner: owner == wanted, uuid=uuid, salt=cache_salt)
        _check_salt(salt, "salt")
        return self._evict(lambda owner: owner.salt == salt, salt=salt)

    def clear(self) -> Evicted:
        return self._evict(lambda _: True, everything=True)

    def _evict(self, wanted: Callable[[Owner], bool], **what: Any) -> Evicted:
        with self._frontend.desk.changes:
            features = self._frontend.pipeline.media.evict(wanted)
            held: Held = self._frontend.desk.ask(EvictItems, **what).result()
        return Evicted(held.blocks, held.items, held.stored, features)

    def begin_lookup(self, prompt: PromptLike) -> Future[CacheLookup]:
        """Prepare a prompt without a trace, then ask the core what of it there is."""
        found: Future[CacheLookup] = Future()
        prepared = self._frontend.pipeline.submit("lookup", prompt, peek=True)
        prepared.add_done_callback(lambda done: _pass_on(done, found, self._ask_core))
        return found

    def _ask_core(self, request: Any, found: Future[CacheLookup]) -> None:
        self._frontend.desk.ask(LookUp, request).add_done_callback(lambda done: _pass_on(done, found))

    def stats(self) -> CacheStats:
        levels = {level.level: level for level in self._frontend.desk.ask(AskLevels).result()}
        own = self._frontend.pipeline.stats()
        processor = LevelStats(
            level="processor",
            unit="items",
            size_unit="bytes",
            capacity=own.capacity,
            used=own.nbytes,
            entries=own.entries,
            queries=own.hits + own.misses,
            hits=own.hits,
            stored=own.misses,
            evicted=own.evicted,
            pinned=own.pinned_bytes,
        )
        return CacheStats(processor=processor, **levels)

    def join(self, feed: Feed) -> Future[Any]:
        return self._frontend.desk.join(feed)

    def leave(self, feed: Feed) -> None:
        self._frontend.desk.leave(feed)


class CacheControl:
    """What is cached, under your control. docs/cache-api.md has an example.

    A name is a uuid within a cache_salt: the same uuid under another salt names something else.
    """

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._desk = _Desk(frontend)

    def warm(
        self,
        prompt_or_media: Any,
        uuid: Any = None,
        *,
        cache_salt: str | None = None,
        modality: str | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        pin: bool = False,
    ) -> Any:
        """Compute a prompt, or an item with the chat turn's beginning before it, into the caches; a list of these
        all at once. Returns `Warmed`, or a list.

        prompt_or_media: as `Engine.generate` and `Engine.chat` take prompts, or an item: PIL image, `Path`, bytes,
        `data:` URL, array, `(samples, rate)`, frames. A str is a prompt, unless it is a `data:` URL or uuid or
        modality is given. uuid: names the item (a list of them for a list). pin: as `pin`, once it is computed.
        Raises what the same request would, CacheFullError with pin=True; with a list the first error.
        """
        options = {"cache_salt": cache_salt, "modality": modality, "mm_processor_kwargs": mm_processor_kwargs}
        prompts, many = as_warm_prompts(prompt_or_media, uuid, **options)
        begun: list[tuple[Future[RequestOutput], str, list[Owner]]] = []
        try:
            for prompt in prompts:
                begun.append(self._desk.begin_warm(prompt, pin))
            warmed = [_warmed(done.result()) for done, _, _ in begun]
        finally:
            for _, request_id, _ in begun:
                self._frontend.abort(request_id)
        for _, _, names in begun if pin else ():
            for owner in names:
                self._desk.pin(owner.uuid, owner.salt)
        return warmed if many else warmed[0]

    def pin(self, uuid: str, cache_salt: str | None = None) -> Pinned:
        """Keep what was computed from the item of that name, and what will be, until `unpin`: its preprocessed
        features, encoder rows, and the KV blocks that it touches with those before them.

        Raises MediaNotCachedError where its content is not cached, CacheFullError where more than half of a cache
        would be pinned; nothing is pinned then.
        """
        return self._desk.pin(uuid, cache_salt)

    def unpin(self, uuid: str, cache_salt: str | None = None) -> None:
        """Undo `pin`. Raises MediaNotCachedError for a name that nothing is known of."""
        self._desk.unpin(uuid, cache_salt)

    def evict(self, uuid: str | None = None, *, cache_salt: str | None = None, salt: str | None = None) -> Evicted:
        """Forget, at once, all that was computed from the item of that name, or for all requests of `salt`; pinned or
        not, on every level. Requests that run go on, and publish nothing more of it."""
        return self._desk.evict(uuid, cache_salt, salt)

    def clear(self) -> Evicted:
        """Forget everything, names and pins too."""
        return self._desk.clear()

    def lookup(self, prompt: PromptLike) -> CacheLookup:
        """How much of a prompt would be found now. Nothing runs on the device; nothing is counted as used."""
        return self._desk.begin_lookup(prompt).result()

    def stats(self) -> CacheStats:
        """Sizes and counters of every level."""
        return self._desk.stats()

    def subscribe(self, listener: Callable[[CacheEvent], None], *, max_waiting: int = EVENTS) -> Subscription:
        """Call `listener` with what is cached now, as events, and then with every event, in a thread of its own.
        Call what is returned to unsubscribe. max_waiting: events that a slow listener may be behind."""
        feed = Feed(max_waiting)
        self._desk.join(feed).result()
        return Subscription(feed, self._desk.leave, listener)

    def events(self, *, max_waiting: int = EVENTS) -> CacheEvents:
        """As `subscribe`, to iterate over. It ends with its `close()` and with the engine."""
        feed = Feed(max_waiting)
        self._desk.join(feed).result()
        return CacheEvents(feed, self._desk.leave)


class AsyncCacheControl:
    """`CacheControl` for asyncio programs: the same methods, awaited."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._desk = _Desk(frontend)

    async def warm(
        self,
        prompt_or_media: Any,
        uuid: Any = None,
        *,
        cache_salt: str | None = None,
        modality: str | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        pin: bool = False,
    ) -> Any:
        """See `CacheControl.warm`. Cancelling aborts it."""
        options = {"cache_salt": cache_salt, "modality": modality, "mm_processor_kwargs": mm_processor_kwargs}
        prompts, many = as_warm_prompts(prompt_or_media, uuid, **options)
        begun: list[tuple[Future[RequestOutput], str, list[Owner]]] = []
        try:
            for prompt in prompts:
                begun.append(await asyncio.to_thread(self._desk.begin_warm, prompt, pin))
            warmed = [_warmed(await asyncio.wrap_future(done)) for done, _, _ in begun]
        finally:
            for _, request_id, _ in begun:
                self._frontend.abort(request_id)
        for _, _, names in begun if pin else ():
            for owner in names:
                await self.pin(owner.uuid or "", owner.salt)
        return warmed if many else warmed[0]

    async def pin(self, uuid: str, cache_salt: str | None = None) -> Pinned:
        """See `CacheControl.pin`."""
        return await asyncio.to_thread(self._desk.pin, uuid, cache_salt)

    async def unpin(self, uuid: str, cache_salt: str | None = None) -> None:
        """See `CacheControl.unpin`."""
        await asyncio.to_thread(self._desk.unpin, uuid, cache_salt)

    async def evict(
        self, uuid: str | None = None, *, cache_salt: str | None = None, salt: str | None = None
    ) -> Evicted:
        """See `CacheControl.evict`."""
        return await asyncio.to_thread(self._desk.evict, uuid, cache_salt, salt)

    async def clear(self) -> Evicted:
        """See `CacheControl.clear`."""
        return await asyncio.to_thread(self._desk.clear)

    async def lookup(self, prompt: PromptLike) -> CacheLookup:
        """See `CacheControl.lookup`."""
        return await asyncio.wrap_future(self._desk.begin_lookup(prompt))

    async def stats(self) -> CacheStats:
        """See `CacheControl.stats`."""
        return await asyncio.to_thread(self._desk.stats)

    async def subscribe(self, listener: Callable[[CacheEvent], None], *, max_waiting: int = EVENTS) -> Subscription:
        """See `CacheControl.subscribe`: the listener is called in a thread of its own, not in the loop's."""
        feed = Feed(max_waiting)
        await asyncio.wrap_future(self._desk.join(feed))
        return Subscription(feed, self._desk.leave, listener)

    async def events(self, *, max_waiting: int = EVENTS) -> AsyncCacheEvents:
        """See `CacheControl.events`: `async for event in await engine.cache.events()`."""
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            loop.call_soon_threadsafe(news.set)

        feed = Feed(max_waiting, tell)
        await asyncio.wrap_future(self._desk.join(feed))
        return AsyncCacheEvents(feed, self._desk.leave, news)


def _warmed(output: RequestOutput) -> Warmed:
    usage = output.usage
    return Warmed(usage.prompt_tokens, usage.cached_tokens, usage.media_tokens, usage.encoded_media_tokens)


def _owner(uuid: Any, cache_salt: Any) -> Owner:
    try:
        given_item("image", b"", uuid if uuid is not None else "")
    except InvalidPromptError:
        raise InvalidParamsError("A uuid has 1 to 128 characters of A-Z a-z 0-9 _ . : -", param="uuid") from None
    _check_salt(cache_salt, "cache_salt")
    return Owner(cache_salt, uuid)


def _check_salt(salt: Any, param: str) -> None:
    try:
        check_salt(salt)
    except InvalidPromptError:
        raise InvalidParamsError(
            f"{param} has 1 to 128 characters of A-Z a-z 0-9 _ . - (hash anything else first).", param=param
        ) from None


def _pass_on(done: Future[Any], to: Future[Any], take: Callable[[Any, Future[Any]], None] | None = None) -> None:
    """What one future brought to another, by way of `take` where there is one."""
    try:
        result = done.result()
        if take is not None:
            take(result, to)
            return
    except BaseException as error:
        to.set_exception(error)
    else:
        to.set_result(result)
