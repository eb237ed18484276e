"""Requests from a file: JSON lines or a JSON list of {"prompt", "media" or "media_paths", "output_tokens"}."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_core.bench.workloads import INSTRUCTION, BenchRequest
from mm_core.errors import DatasetError
from mm_core.types import TextPrompt

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT_OUTPUT_TOKENS = 128
_VIDEO = frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"})
_AUDIO = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a"})
_KEYS = frozenset({"prompt", "media", "media_paths", "output_tokens"})


def read_dataset(path: Path, count: int | None, output_tokens: int | None) -> list[BenchRequest]:
    """The file's first `count` requests (None: all), its entries over again where it has fewer.

    Media paths are relative to the file. output_tokens, where given, wins over the entries' own.
    Media are read into memory, so that the clock covers decoding and not the disk.
    Raises DatasetError, which names file and line (or entry) at fault.
    """
    requests: list[BenchRequest] = []
    loaded: dict[Path, bytes] = {}
    for where, entry in _entries(path):
        requests.append(_request(where, entry, path.parent, output_tokens, loaded))
        if count is not None and len(requests) == count:
            break
    if not requests:
        raise DatasetError(f"{path} holds no requests. Write one JSON object a line: {_example()}")
    return requests if count is None else [requests[i % len(requests)] for i in range(count)]


def stand_in(requests: Sequence[BenchRequest]) -> BenchRequest:
    """A request to warm up on, whose media no request has: the first one with images and no other media,
    with noise of the same sizes for them; a line of text where there is none."""
    for request in requests:
        data = request.prompt.multi_modal_data
        if data and set(data) == {"image"}:
            try:
                images = [_noise(index, image) for index, image in enumerate(data["image"])]
            except OSError:  # no image: the run itself says so
                break
            return BenchRequest(replace(request.prompt, multi_modal_data={"image": images}), request.output_tokens)
    return BenchRequest(TextPrompt(prompt=INSTRUCTION), requests[0].output_tokens)


def _noise(index: int, image: bytes) -> Image:
    """Noise of an encoded image's size."""
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(image)) as opened:
        width, height = opened.size
    return Image.fromarray(np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Each entry with where it stands."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"--dataset {path} cannot be read ({type(error).__name__}). Give a UTF-8 file.") from error
    if text.lstrip().startswith("["):
        try:
            entries = json.loads(text)
        except json.JSONDecodeError as error:
            raise DatasetError(f"{path}, line {error.lineno}: not JSON ({error.msg}).") from error
        yield from ((f"{path}, entry {number}", entry) for number, entry in enumerate(entries, 1))
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield f"{path}, line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise DatasetError(f"{path}, line {number}: not JSON ({error.msg}). One object a line.") from error


def _request(
    where: str, entry: Any, folder: Path, output_tokens: int | None, loaded: dict[Path, bytes]
) -> BenchRequest:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("prompt"), str):
        raise DatasetError(f"{where}: want an object with a text `prompt`: {_example()}")
    if unknown := sorted(set(entry) - _KEYS):
        raise DatasetError(f"{where}: {unknown[0]!r} is not known. Keys: {', '.join(sorted(_KEYS))}.")
    if "media" in entry and "media_paths" in entry:
        raise DatasetError(f"{where}: `media` and `media_paths` are two spellings of one thing. Give one.")
    paths = entry.get("media", entry.get("media_paths")) or []
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not all(isinstance(p, str) for p in paths):
        raise DatasetError(f"{where}: `media` is a list of paths; found {str(paths)[:80]!r}.")
    tokens = entry.get("output_tokens", DEFAULT_OUTPUT_TOKENS) if output_tokens is None else output_tokens
    if type(tokens) is not int or tokens < 1:
        raise DatasetError(f"{where}: `output_tokens` is a whole number from 1; found {str(tokens)[:80]!r}.")
    data: dict[str, list[bytes]] = {}
    for path in paths:
        data.setdefault(_modality(path), []).append(_read(where, folder / Path(path).expanduser(), loaded))
    return BenchRequest(TextPrompt(prompt=entry["prompt"], multi_modal_data=data or None), tokens)


def _modality(path: str) -> str:
    suffix = Path(path).suffix.lower()
    return "video" if suffix in _VIDEO else "audio" if suffix in _AUDIO else "image"


def _read(where: str, path: Path, loaded: dict[Path, bytes]) -> bytes:
    if path not in loaded:
        try:
            loaded[path] = path.read_bytes()
        except OSError as error:
            raise DatasetError(f"{where}: media file {path} cannot be read ({type(error).__name__}).") from error
    return loaded[path]


def _example() -> str:
    return '{"prompt": "What is this?", "media": ["cat.jpg"], "output_tokens": 128}'
