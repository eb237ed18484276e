"""What users hand over, in all its shapes, to one plain form: text, ids or messages, and media."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from PIL import Image

from mm_core.errors import InvalidPromptError, RequestError, UnsupportedMediaError
from mm_core.inputs.fetch import require_modality
from mm_core.types import Modality, TextPrompt

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES = 4096
MAX_PARTS = 4096
_KEYS = {f.name for f in fields(TextPrompt)}
_DIRECT: Mapping[str, Modality] = {"image": "image", "video": "video", "audio": "audio"}
_URLS: Mapping[str, Modality] = {"image_url": "image", "video_url": "video", "audio_url": "audio"}


@dataclass(frozen=True)
class ChatPrompt:
    """Messages (OpenAI shape, media in the content parts) with the request's other inputs."""

    messages: Sequence[Mapping[str, Any]]
    mm_processor_kwargs: Mapping[str, Any] | None = None
    cache_salt: str | None = None


@dataclass(frozen=True)
class GivenItem:
    """One media item as given: `value` is None where the uuid alone stands for it."""

    modality: Modality
    value: Any
    uuid: str | None = None


@dataclass(frozen=True)
class Given:
    """A request's inputs in one form; exactly one of text, token_ids and messages is not None."""

    items: tuple[GivenItem, ...] = ()
    text: str | None = None
    token_ids: Sequence[int] | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    processor_kwargs: Mapping[str, Any] = field(default_factory=dict)
    cache_salt: str | None = None


PromptLike = str | TextPrompt | ChatPrompt | Mapping[str, Any] | Sequence[Mapping[str, Any]]


def read_prompt(prompt: PromptLike, family: str, modalities: tuple[Modality, ...]) -> Given:
    """Any accepted prompt to its plain form; media are listed, not touched. Raises RequestError."""
    if isinstance(prompt, str):
        return Given(text=prompt)
    if isinstance(prompt, list | tuple):
        prompt = ChatPrompt(prompt)
    if isinstance(prompt, ChatPrompt):
        messages, items = read_messages(prompt.messages, family, modalities)
        return Given(
            items=items,
            messages=messages,
            processor_kwargs=_mapping(prompt.mm_processor_kwargs, "mm_processor_kwargs"),
            cache_salt=prompt.cache_salt,
        )
    if isinstance(prompt, Mapping):
        unknown = [str(key)[:40] for key in prompt if key not in _KEYS]
        if unknown:
            raise InvalidPromptError(f"A prompt has no key {unknown[0]!r}. Keys: {', '.join(sorted(_KEYS))}.")
        prompt = TextPrompt(**prompt)
    if not isinstance(prompt, TextPrompt):
        raise InvalidPromptError(
            f"A prompt cannot be a {type(prompt).__name__}. "
            "Pass a str, a TextPrompt, a dict with its keys, or messages."
        )
    return _read_text_prompt(prompt, family, modalities)


def _read_text_prompt(prompt: TextPrompt, family: str, modalities: tuple[Modality, ...]) -> Given:
    if (prompt.prompt is None) == (prompt.prompt_token_ids is None):
        raise InvalidPromptError("A prompt has either `prompt` or `prompt_token_ids`. Pass exactly one of them.")
    if prompt.prompt is not None and not isinstance(prompt.prompt, str):
        raise InvalidPromptError(f"`prompt` is a str, not a {type(prompt.prompt).__name__}.", param="prompt")
    return Given(
        items=_read_media(prompt, family, modalities),
        text=prompt.prompt,
        token_ids=prompt.prompt_token_ids,
        processor_kwargs=_mapping(prompt.mm_processor_kwargs, "mm_processor_kwargs"),
        cache_salt=prompt.cache_salt,
    )


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise InvalidPromptError(f"`{name}` is a dict with str keys.", param=name)
    return value


def _read_media(prompt: TextPrompt, family: str, modalities: tuple[Modality, ...]) -> tuple[GivenItem, ...]:
    data = _mapping(prompt.multi_modal_data, "multi_modal_data")
    names = _mapping(prompt.multi_modal_uuids, "multi_modal_uuids")
    items: list[GivenItem] = []
    for key in (*data, *(name for name in names if name not in data)):
        modality = require_modality(key, family, modalities)
        uuids = names.get(key)
        uuids = [uuids] if isinstance(uuids, str) else uuids
        if uuids is not None and not isinstance(uuids, list | tuple):
            raise _bad_uuids(f"{key}: a list with one entry an item is wanted.")
        values = as_items(modality, data[key]) if data.get(key) is not None else [None] * len(uuids or ())
        if uuids is not None and len(uuids) != len(values):
            raise _bad_uuids(f"{key}: {len(uuids)} uuids for {len(values)} items. Give one an item, None for no name.")
        items += [given_item(modality, v, u) for v, u in zip(values, uuids or [None] * len(values), strict=True)]
    return tuple(items)


def _bad_uuids(text: str) -> InvalidPromptError:
    return InvalidPromptError(f"multi_modal_uuids: {text}", param="multi_modal_uuids")


def given_item(modality: Modality, value: Any, uuid: Any) -> GivenItem:
    """One item with its checked uuid; an item without content and without uuid is refused."""
    if uuid is not None and (not isinstance(uuid, str) or not _valid_name(uuid)):
        raise _bad_uuids("a uuid has 1 to 128 characters of A-Z a-z 0-9 _ . : -")
    if value is None and uuid is None:
        raise InvalidPromptError(
            f"An item of {modality} has neither content nor uuid. Pass the content, or the uuid it was given under.",
            param="multi_modal_data",
        )
    return GivenItem(modality, value, uuid)


def _valid_name(text: str, extra: str = "_.:-") -> bool:
    return 0 < len(text) <= 128 and text.isascii() and all(c.isalnum() or c in extra for c in text)


def check_salt(salt: Any) -> None:
    """Raise InvalidPromptError unless `salt` is None or a str of 1 to 128 of A-Z a-z 0-9 _ . -"""
    if salt is not None and not (isinstance(salt, str) and _valid_name(salt, "_.-")):
        raise InvalidPromptError(
            "cache_salt has 1 to 128 characters of A-Z a-z 0-9 _ . - (hash anything else first).", param="cache_salt"
        )


def as_items(modality: Modality, value: Any) -> list[Any]:
    """One value or a list of values to a list.

    A list is a list of items, but for video a list of pictures is one video's frames. (A list of numbers is
    no audio either way: one item, to be refused once.)
    """
    if not isinstance(value, list) or (modality == "audio" and value and isinstance(value[0], int | float)):
        return [value]
    if modality == "video" and value and all(_is_picture(v) for v in value):
        return [value]
    return value


def _is_picture(value: Any) -> bool:
    if isinstance(value, Image.Image):
        return True
    shape = getattr(value, "shape", None)
    return shape is not None and len(shape) < 4 and (isinstance(value, np.ndarray) or hasattr(value, "detach"))


def read_messages(
    messages: Any, family: str, modalities: tuple[Modality, ...]
) -> tuple[list[dict[str, Any]], tuple[GivenItem, ...]]:
    """Messages without their media, as chat templates want them, and the media in order."""
    if not isinstance(messages, list | tuple) or not messages or len(messages) > MAX_MESSAGES:
        raise _bad_message(f"a list of 1 to {MAX_MESSAGES} messages is wanted.")
    plain: list[dict[str, Any]] = []
    items: list[GivenItem] = []
    for message in messages:
        if not isinstance(message, Mapping) or not set(message) <= {"role", "content"}:
            raise _bad_message('a message is a dict with the keys "role" and "content", nothing else.')
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise _bad_message(f"a role is one of {', '.join(ROLES)}.")
        if isinstance(content, str):
            plain.append({"role": role, "content": content})
            continue
        if not isinstance(content, list | tuple) or not content or len(content) > MAX_PARTS:
            raise _bad_message("content is a str or a list of parts.")
        parts = [_read_part(part, family, modalities) for part in content]
        found = [part for part in parts if isinstance(part, GivenItem)]
        if found and role != "user":
            raise _bad_message(f"media belong in messages of the role user, not {role}.")
        items += found
        plain.append({"role": role, "content": [_plain_part(part) for part in parts]})
    return plain, tuple(items)


def _plain_part(part: str | GivenItem) -> dict[str, str]:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": part.modality}


def _bad_message(text: str) -> InvalidPromptError:
    return InvalidPromptError(f"messages: {text}", param="messages")


def _read_part(part: Any, family: str, modalities: tuple[Modality, ...]) -> str | GivenItem:
    """One content part: its text, or its item."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str):
        raise _bad_message('a part is a dict with a "type".')
    if kind == "text":
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise _bad_message('a text part is {"type": "text", "text": "…"}.')
        return str(part["text"])
    modality = _DIRECT.get(kind) or _URLS.get(kind) or ("audio" if kind == "input_audio" else None)
    if modality is None:
        raise _bad_message(
            f"unknown part type {kind[:40]!r}. Types: text, {', '.join((*_DIRECT, *_URLS, 'input_audio'))}."
        )
    require_modality(modality, family, modalities)
    if not set(part) <= {"type", kind, "uuid"}:
        raise _bad_message(f'a part of type {kind} has the keys "type", "{kind}" and, if it is named, "uuid".')
    try:
        return given_item(modality, _part_value(kind, part.get(kind)), part.get("uuid"))
    except RequestError as error:
        error.param = "messages"
        raise


def _part_value(kind: str, value: Any) -> Any:
    """The media value inside a part; OpenAI's kinds hold it in an object."""
    if value is None or kind in _DIRECT:
        return value
    inner = "data" if kind == "input_audio" else "url"
    known = {"input_audio": {"data", "format"}, "image_url": {"url", "detail"}}.get(kind, {"url"})
    if not isinstance(value, Mapping) or not isinstance(value.get(inner), str) or not set(value) <= known:
        raise _bad_message(f'"{kind}" is an object with "{inner}" (a str), and nothing but {", ".join(sorted(known))}.')
    if value.get("detail") not in (None, "auto"):
        raise _bad_message('"detail" can only be "auto". Use min_pixels/max_pixels in mm_processor_kwargs instead.')
    text = str(value[inner])
    if kind == "input_audio":
        return f"data:audio/any;base64,{text}"
    if not text[:5].lower() == "data:":
        raise UnsupportedMediaError(
            f'"{kind}" holds no data: URL. URLs are not fetched: send `data:{_URLS[kind]}/…;base64,…`.',
            param="messages",
        )
    return text
