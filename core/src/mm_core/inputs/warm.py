"""What `engine.cache.warm` takes: prompts, or bare media values whose kind is told by their content."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from mm_core.errors import InvalidParamsError, InvalidPromptError, UnsupportedMediaError
from mm_core.inputs.fetch import require_modality
from mm_core.inputs.messages import ChatPrompt, Given, as_items, check_salt, given_item, read_prompt
from mm_core.media.sniff import audio_format, image_format, video_demuxer
from mm_core.types import Modality, TextPrompt

_DATA_URL = re.compile(r"data:(image|video|audio)/", re.IGNORECASE)
_HEAD = 64  # bytes that tell what a file is


@dataclass(frozen=True)
class WarmPrompt:
    """A prompt to compute, or one item (`modality` or `is_media(value)` says so) with what stands before it in a chat.

    uuid: of the item, or of the prompt's only one. The other fields complete what `value` itself says.
    """

    value: Any
    uuid: str | None = None
    cache_salt: str | None = None
    modality: str | None = None
    mm_processor_kwargs: Mapping[str, Any] | None = None

    @property
    def is_item(self) -> bool:
        """Whether `value` is an item, not a prompt."""
        return self.modality is not None or is_media(self.value, self.uuid)


def is_media(value: Any, uuid: str | None) -> bool:
    """Whether a value is an item. A str is a prompt, unless it is a `data:` URL or has a name."""
    if isinstance(value, str):
        return uuid is not None or _DATA_URL.match(value) is not None
    if isinstance(value, Mapping):
        return "frames" in value
    return not (isinstance(value, TextPrompt | ChatPrompt) or is_conversation(value))


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages."""
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping) and "role" in value[0]


def as_warm_prompts(value: Any, uuid: Any, **more: Any) -> tuple[list[WarmPrompt], bool]:
    """What is to be warmed, one each, and whether it was a list. uuid: one, or one each."""
    one_video = more.get("modality") == "video" and isinstance(value, list) and as_items("video", value) == [value]
    if not isinstance(value, list) or is_conversation(value) or one_video:
        return [WarmPrompt(value, uuid, **more)], False
    uuids = [uuid] * len(value) if uuid is None else uuid
    if not value or not isinstance(uuids, list | tuple) or len(uuids) != len(value):
        raise InvalidParamsError(
            "warm() takes one prompt or item, or a list of them that is not empty, with a list of as many uuids "
            "(None for no name).",
            param="uuid",
        )
    return [WarmPrompt(each, name, **more) for each, name in zip(value, uuids, strict=True)], True


def read_warm(prompt: WarmPrompt, family: str, modalities: tuple[Modality, ...]) -> Given:
    """The plain form of what is to be warmed. Raises RequestError."""
    check_salt(prompt.cache_salt)
    if prompt.is_item:
        modality = require_modality(prompt.modality or recognise(prompt.value, modalities), family, modalities)
        given_item(modality, prompt.value, prompt.uuid)  # a name that cannot be one is told of as such
        part: dict[str, Any] = {"type": modality, modality: prompt.value, "uuid": prompt.uuid}
        chat = ChatPrompt([{"role": "user", "content": [part]}], prompt.mm_processor_kwargs, prompt.cache_salt)
        return read_prompt(chat, family, modalities)
    given = read_prompt(prompt.value, family, modalities)
    salt, uuid = prompt.cache_salt, prompt.uuid
    if salt is not None:
        if given.cache_salt not in (None, salt):
            raise InvalidParamsError("cache_salt is not the prompt's own. Give one of them.", param="cache_salt")
        given = replace(given, cache_salt=salt)
    if prompt.mm_processor_kwargs is not None:
        given = replace(given, processor_kwargs={**given.processor_kwargs, **prompt.mm_processor_kwargs})
    return given if uuid is None else _named(given, uuid)


def _named(given: Given, uuid: str) -> Given:
    if len(given.items) != 1 or given.items[0].uuid not in (None, uuid):
        raise InvalidPromptError(
            f"uuid names one item; the prompt has {len(given.items)}, or another name for it. Name the items in the "
            "prompt, by multi_modal_uuids or by the uuid of a message's part.",
            param="uuid",
        )
    item = given.items[0]
    return replace(given, items=(given_item(item.modality, item.value, uuid),))


def recognise(value: Any, modalities: Sequence[Modality]) -> Modality:
    """What kind of item a value is. Raises UnsupportedMediaError where nothing tells."""
    if len(modalities) == 1:
        return modalities[0]
    found = _told_by(value)
    if found is None:
        raise UnsupportedMediaError(
            f"It cannot be told whether this {type(value).__name__} is {' or '.join(modalities) or 'of any modality'}. "
            "Say so with modality=...",
            param="modality",
        )
    return found


def _told_by(value: Any) -> Modality | None:
    if isinstance(value, str) and (match := _DATA_URL.match(value)):
        return _MODALITIES[match[1].lower()]
    if isinstance(value, str | Path):
        return _told_by_bytes(_head_of(value))
    if isinstance(value, bytes | bytearray | memoryview):
        return _told_by_bytes(bytes(value[:_HEAD]))
    if isinstance(value, Image.Image):
        return "image"
    if isinstance(value, Mapping):
        return "video"
    if isinstance(value, tuple) and len(value) == 2:
        return "video" if isinstance(value[0], list | tuple) or _axes(value[0]) == 4 else "audio"
    return {2: "image", 3: "image", 4: "video"}.get(_axes(value))  # type: ignore[return-value]


_MODALITIES: Mapping[str, Modality] = {"image": "image", "video": "video", "audio": "audio"}


def _axes(value: Any) -> int:
    return len(getattr(value, "shape", ()))


def _head_of(path: str | Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_HEAD)
    except (OSError, ValueError):
        raise UnsupportedMediaError(
            "The file of the item cannot be read. Check the path, and give modality=... if it is right.", param="value"
        ) from None


def _told_by_bytes(head: bytes) -> Modality | None:
    if image_format(head):
        return "image"
    if video_demuxer(head):
        return "video"
    return "audio" if audio_format(head) else None
