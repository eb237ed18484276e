"""Media of calls: from `data:`, `https:` and `file:` URLs to bytes, counted before any of them is touched."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from mm_core.errors import (
    InvalidPromptError,
    MediaTooLargeError,
    RequestError,
    TooManyMediaError,
    UnsupportedMediaError,
)
from mm_core.inputs.messages import given_item
from mm_core.media.decode import MediaLimits
from mm_core.media.encoded import decode_base64, decode_data_url
from mm_core.server.addresses import blocked
from mm_core.server.config import MediaConfig
from mm_core.server.context import Call
from mm_core.server.desk import Desk
from mm_core.server.fetcher import Network, UrlFetcher
from mm_core.server.files import FileReader
from mm_core.server.shares import Shares
from mm_core.types import MODALITIES, Modality

if TYPE_CHECKING:
    from mm_core.engine.async_engine import AsyncEngine

Encoded = bytes | list[bytes]
"""A file, or the frames of a video, each a picture by itself."""
_URL_PARTS: Mapping[str, Modality] = {"image_url": "image", "video_url": "video", "audio_url": "audio"}
_DIRECT: Mapping[str, Modality] = {"image": "image", "video": "video", "audio": "audio"}
_QUICK = 2**20  # characters of base64 that are decoded where they are: in less than a millisecond
_AT_ONCE = 4  # items of one call that are read at a time
_FETCHING = 64


@dataclass(frozen=True)
class _Wanted:
    """One item of a call. text: its URL, or base64 alone (plain); None where the uuid stands for it."""

    modality: Modality
    text: str | None
    uuid: str | None
    plain: bool = False


class _Budget:
    """Encoded bytes that one call may still bring."""

    def __init__(self, total: int, part: int) -> None:
        self._total, self._left, self._part = total, total, part

    @property
    def room(self) -> int:
        """Bytes that the next item may have."""
        return min(self._left, self._part)

    def take(self, data: Encoded) -> Encoded:
        """Count an item; MediaTooLargeError where all together are too large."""
        self._left -= len(data) if isinstance(data, bytes) else sum(map(len, data))
        if self._left < 0:
            raise MediaTooLargeError(
                f"The request's media have more than {self._total} bytes together. Send fewer or smaller ones."
            )
        return data


class MediaIntake:
    """Reads what callers send or point to. modalities: what the model reads. limits: items of a modality that one
    request may have. on_fetch: told the seconds that each URL took. fetching: room for calls whose media are fetched
    or were, and that have no place in the gate yet."""

    def __init__(
        self,
        config: MediaConfig,
        modalities: Sequence[Modality] = MODALITIES,
        limits: Mapping[str, int] | None = None,
        *,
        desk: Desk | None = None,
        network: Network | None = None,
        on_fetch: Callable[[float], None] | None = None,
    ) -> None:
        self._config = config
        self._modalities = tuple(modalities)
        self._caps = dict(limits or {})
        self._fetcher = UrlFetcher(config, network)
        self._files = None if config.allowed_path is None else FileReader(config.allowed_path)
        self._limits = MediaLimits(max_encoded_bytes=config.max_part_bytes, max_video_frames=config.max_video_frames)
        self._on_fetch = on_fetch
        self._desk = desk or Desk()
        self.fetching = Shares(_FETCHING)

    @classmethod
    def for_engine(
        cls, config: MediaConfig, engine: AsyncEngine, desk: Desk, on_fetch: Callable[[float], None] | None = None
    ) -> MediaIntake:
        """With the modalities of the engine's model and the engine's limits."""
        info, limits = engine.info, dict(engine.config.limit_mm_per_prompt)
        for modality, count in info.limits.items():
            limits[modality] = min(count, limits.get(modality, count))
        return cls(config, info.modalities, limits, desk=desk, on_fetch=on_fetch)

    async def read_messages(self, messages: Sequence[Mapping[str, Any]], call: Call) -> list[dict[str, Any]]:
        """Messages with OpenAI's parts to messages whose media are bytes: `{"type": "image", "image": bytes,
        "uuid": …}`. What holds no media is passed on as it is.

        Raises InvalidPromptError, TooManyMediaError and UnsupportedMediaError before anything is read, then
        MediaError and its kinds.
        """
        wanted = [
            [_read_part(part) for part in content]
            if isinstance(content := message.get("content"), list | tuple)
            else None
            for message in messages
        ]
        for message, parts in zip(messages, wanted, strict=True):
            if message.get("role") != "user" and any(isinstance(part, _Wanted) for part in parts or ()):
                raise _bad("media belong in messages of the role user.")
        items = [part for parts in wanted for part in parts or () if isinstance(part, _Wanted)]
        values = iter(await self._read_all(items, call, "messages"))
        return [
            dict(message) if parts is None else {**message, "content": [_plain(part, values) for part in parts]}
            for message, parts in zip(messages, wanted, strict=True)
        ]

    async def read_media_data(
        self, data: Mapping[str, Any], uuids: Mapping[str, Any] | None, call: Call
    ) -> dict[str, list[Encoded | None]]:
        """`multi_modal_data` with URLs (one or a list a modality; None where a uuid stands for it) to bytes. The uuids
        themselves are for the engine to check."""
        items = []
        for modality in dict.fromkeys((*data, *(uuids or {}))):
            if modality not in MODALITIES:
                raise UnsupportedMediaError(f"There is no modality {modality[:40]!r}.", param="multi_modal_data")
            values, names = data.get(modality), (uuids or {}).get(modality)
            count = len(names) if isinstance(names, list | tuple) else 1
            values = [None] * count if values is None else values if isinstance(values, list) else [values]
            for value in values:
                if value is not None and not isinstance(value, str):
                    raise InvalidPromptError(
                        "multi_modal_data holds URLs: strings, or null for an item that has a uuid.",
                        param="multi_modal_data",
                    )
                items.append(_Wanted(modality, value, None))
        found: dict[str, list[Encoded | None]] = {}
        for item, value in zip(items, await self._read_all(items, call, "multi_modal_data"), strict=True):
            found.setdefault(item.modality, []).append(value)
        return found

    async def read_url(self, modality: Modality, url: str, call: Call) -> Encoded:
        """What is behind one URL. Raises MediaError and its kinds."""
        (value,) = await self._read_all([_Wanted(modality, url, None)], call, "url")
        if value is None:
            raise InvalidPromptError("A URL is wanted.", param="url")
        return value

    # -- reading ---------------------------------------------------------------------------

    async def _read_all(self, items: Sequence[_Wanted], call: Call, param: str) -> list[Encoded | None]:
        """Contents in the order given; the first fault ends the reading of all."""
        try:
            self._check_counts(items)
            budget = _Budget(self._config.max_total_bytes, self._config.max_part_bytes)
            if not any(item.text is not None for item in items):
                return [None] * len(items)
            phase, call.phase = call.phase, "fetch"
            slots = asyncio.Semaphore(_AT_ONCE)
            tasks = [asyncio.ensure_future(self._read(item, budget, slots, call)) for item in items]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                call.phase = phase
        except RequestError as error:
            error.param = error.param or param
            raise

    def _check_counts(self, items: Sequence[_Wanted]) -> None:
        if len(items) > self._config.max_items:
            raise TooManyMediaError(
                f"The request has {len(items)} media items; the limit is {self._config.max_items}. Send fewer."
            )
        for modality, count in Counter(item.modality for item in items).items():
            if modality not in self._modalities:
                raise UnsupportedMediaError(
                    f"The model reads {' and '.join(self._modalities) or 'no media'}, not {modality}. Leave it out."
                )
            if count > self._caps.get(modality, count):
                raise TooManyMediaError(
                    f"The request has {count} item(s) of {modality}; the limit is {self._caps[modality]}. Send fewer."
                )

    async def _read(self, item: _Wanted, budget: _Budget, slots: asyncio.Semaphore, call: Call) -> Encoded | None:
        if item.text is None:
            return None
        async with slots:
            return budget.take(await self._content(item, item.text, budget.room, call))

    async def _content(self, item: _Wanted, text: str, room: int, call: Call) -> Encoded:
        if item.plain:
            limit = self._limits.max_encoded_bytes
            return await self._apart(len(text), partial(decode_base64, text, item.modality, limit))
        scheme = text[:9].partition(":")[0].lower()
        if scheme == "data":
            return await self._apart(len(text), partial(decode_data_url, text, item.modality, self._limits))
        if scheme in ("http", "https"):
            return await self._fetch(text, room, call)
        if scheme == "file":
            if self._files is None:
                raise blocked("This server reads no files; whoever runs it can allow a directory.")
            return await asyncio.to_thread(self._files.read, text, room)
        raise blocked("The URL is none of data:, https: and file:.")

    async def _fetch(self, url: str, room: int, call: Call) -> bytes:
        start = time.perf_counter()
        try:
            return await self._fetcher.fetch(url, room, call.caller.name)
        finally:
            if self._on_fetch is not None:
                self._on_fetch(time.perf_counter() - start)

    async def _apart(self, length: int, decode: Callable[[], Encoded]) -> Encoded:
        """Decode here if it takes little time, else in a thread."""
        return await (self._desk.do(decode, first=True) if length <= _QUICK else asyncio.to_thread(decode))


def points_elsewhere(values: Iterable[Any]) -> bool:
    """Whether any is a URL to fetch, or a part of a message with one; what is neither is for others to refuse."""
    for value in values:
        part = value if isinstance(value, Mapping) else {"image_url": value}
        inner = next((part[kind] for kind in _URL_PARTS if kind in part), None)
        text = inner.get("url") if isinstance(inner, Mapping) else inner
        if isinstance(text, str) and text[:4].lower() == "http":
            return True
    return False


# -- parts -------------------------------------------------------------------------------------


def _read_part(part: Any) -> Any:
    """The item that a part wants; any other part as it is. Raises InvalidPromptError."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    modality = None if not isinstance(kind, str) else _URL_PARTS.get(kind) or _DIRECT.get(kind)
    if kind == "input_audio":
        modality = "audio"
    if modality is None or not isinstance(kind, str):
        if kind != "text":
            raise _bad("a part has one of the types text, image_url, video_url, audio_url and input_audio.")
        return part
    if not set(part) <= {"type", kind, "uuid"}:
        raise _bad(f'a part of type {kind} has the keys "type", "{kind}" and, if it is named, "uuid".')
    text, uuid = _text_of(kind, part.get(kind)), part.get("uuid")
    try:
        given_item(modality, text, uuid)
    except RequestError as error:
        error.param = "messages"
        raise
    return _Wanted(modality, text, uuid, plain=kind == "input_audio")


def _text_of(kind: str, value: Any) -> str | None:
    """The URL, or the base64, inside a part."""
    if value is None:
        return None
    if kind in _DIRECT:
        if not isinstance(value, str):
            raise _bad(f'"{kind}" is a URL (a str).')
        return value
    inner = "data" if kind == "input_audio" else "url"
    known = {"input_audio": {"data", "format"}, "image_url": {"url", "detail"}}.get(kind, {"url"})
    if not isinstance(value, Mapping) or not isinstance(value.get(inner), str) or not set(value) <= known:
        raise _bad(f'"{kind}" is an object with "{inner}" (a str), and nothing but {", ".join(sorted(known))}.')
    if value.get("detail") not in (None, "auto"):
        raise _bad('"detail" can only be "auto". Use min_pixels/max_pixels in mm_processor_kwargs instead.')
    return str(value[inner])


def _plain(part: Any, values: Any) -> Any:
    """A part as the engine takes it; media take the next of `values`."""
    if not isinstance(part, _Wanted):
        return part
    named = {} if part.uuid is None else {"uuid": part.uuid}
    return {"type": part.modality, part.modality: next(values), **named}


def _bad(text: str) -> InvalidPromptError:
    return InvalidPromptError(f"messages: {text}", param="messages")
