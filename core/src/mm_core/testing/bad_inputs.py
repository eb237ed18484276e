"""The rung about wrong media: each ends in a named error of its request, and the next request notices nothing."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from mm_core.engine.engine import Engine
from mm_core.errors import MissingExtraError, MMError, RequestError
from mm_core.testing.case import Case
from mm_core.testing.media import RATE, clip, picture, sound
from mm_core.testing.workbench import Workbench, need
from mm_core.types import MODALITIES, Modality

_LIMIT = 3  # items of a modality that the rung's engine allows, where the family allows as many
_LEAKS = re.compile(r"0x[0-9a-fA-F]{6,}|Traceback|site-packages|\.py\b")
_GOOD: Mapping[Modality, Any] = {"image": picture(1, 60, 40), "video": clip(1, 2), "audio": sound(1, 0.5)}


def check_bad_inputs(bench: Workbench, case: Case) -> Mapping[str, str | None]:
    """Every row that the family's modalities have; all that fail are told together."""
    allowed: Mapping[Modality, int] = getattr(bench.model.processor, "limits", {})
    limits = {m: min(_LIMIT, allowed.get(m, _LIMIT)) for m in bench.model.processor.modalities}
    engine = bench.engine("bad inputs", limit_mm_per_prompt=limits)
    canary = _ask(bench, engine, case, {})
    need(isinstance(canary, tuple), f"the canary failed: {canary}")
    faults: list[str] = []
    for row, media, may_answer in _rows(limits):
        result = _ask(bench, engine, case, media)
        faults += [f"{row}: {fault}" for fault in _faults(result, may_answer)]
        if _ask(bench, engine, case, {}) != canary:
            faults.append(f"{row}: the next request gets another answer")
    engine.wait_idle()
    blocks = engine.stats()["blocks"]
    if blocks["in_use"] or blocks["pending"]:
        faults.append(f"KV blocks are still held: {blocks}")
    need(not faults, "\n".join(faults))
    return {}


def _rows(limits: Mapping[Modality, int]) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    """Name, media, and whether an answer is right, too."""
    for modality in MODALITIES:
        if modality not in limits:
            yield f"{modality}, which the family does not read", {modality: [_GOOD[modality]]}, False
            continue
        count = limits[modality] + 1
        yield f"{count} × {modality}, one too many", {modality: [_GOOD[modality]] * count}, False
        for name, value, may_answer in _VALUES[modality]():
            yield name, {modality: [value]}, may_answer
    yield "a modality that does not exist", {"smell": [picture(1)]}, False


def _images() -> Iterator[tuple[str, Any, bool]]:
    png = _png(picture(1))
    yield "an image of 1 × 1", picture(1, 1, 1), True
    yield "an image of 1 × 8192", picture(1, 1, 8192), True
    yield "an image of 8192 × 1", picture(1, 8192, 1), True
    yield "an image of 0 × 5", Image.new("RGB", (0, 5)), False
    yield "an image without bytes", b"", False
    yield "half a PNG", png[: len(png) // 2], False
    yield "a PDF for an image", b"%PDF-1.7\n" + bytes(200), False
    yield "an array of NaN for an image", np.full((30, 30, 3), np.nan, np.float32), False
    yield "a number for an image", 3, False


def _videos() -> Iterator[tuple[str, Any, bool]]:
    yield "a video of one frame of 1 × 1", clip(1, 1, 1, 1), True
    yield "a video of 1 × 8192", clip(1, 2, 1, 8192), True
    yield "a video without frames", {"frames": np.zeros((0, 30, 30, 3), np.uint8), "fps": 2.0}, False
    yield "a video at NaN frames a second", {"frames": clip(1, 2)["frames"], "fps": float("nan")}, False
    yield "a video without bytes", b"", False
    yield "a PNG for a video", _png(picture(1)), False


def _sounds() -> Iterator[tuple[str, Any, bool]]:
    samples = sound(1, 0.5)[0].copy()
    yield "a sound of one sample", (samples[:1], RATE), True
    yield "a sound of 0.01 s", (samples[:160], RATE), True
    yield "a sound without samples", (samples[:0], RATE), False
    samples[100] = np.nan
    yield "a sound with a NaN", (samples, RATE), False
    yield "a sound with an infinity", (np.where(np.isnan(samples), np.inf, samples), RATE), False
    yield "a sound at 0 Hz", (sound(1, 0.5)[0], 0), False
    yield "a sound without bytes", b"", False
    yield "a WAV file without samples", _wav(b""), False
    yield "a WAV file of noise", b"RIFF" + np.random.default_rng(0).bytes(500), False
    yield "a PNG for a sound", _png(picture(1)), False


_VALUES = {"image": _images, "video": _videos, "audio": _sounds}


def _wav(data: bytes) -> bytes:
    """16-bit mono samples in a file."""
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16)
    return (
        struct.pack("<4sI4s", b"RIFF", 36 + len(data), b"WAVE") + form + struct.pack("<4sI", b"data", len(data)) + data
    )


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _ask(bench: Workbench, engine: Engine, case: Case, media: Mapping[str, Any]) -> tuple[int, ...] | BaseException:
    """Tokens of the case, with these media in the place of its own, or what was raised."""
    if media:
        (modality, values), *_ = media.items()
        prompt = _prompt_for(bench, case, modality, len(values))
        asked = replace(case, media=dict(media), prompt=prompt)  # type: ignore[arg-type]
    else:
        asked = case
    try:
        return bench.ask(engine, asked, max_tokens=4).token_ids
    except Exception as error:
        return error


def _prompt_for(bench: Workbench, case: Case, modality: str, count: int) -> Any:
    """The case's prompt where its media are replaced one for one, else plain text with placeholders in front."""
    if {m: len(v) for m, v in case.items.items()} == {modality: count} or modality not in MODALITIES:
        return case.prompt
    processor = bench.model.processor
    placeholder = processor.placeholder(modality) if modality in processor.modalities else None
    if placeholder is None:
        return case.prompt
    return placeholder * count + " What is it?"


def _faults(result: tuple[int, ...] | BaseException, may_answer: bool) -> list[str]:
    """What is wrong with how a row ended."""
    if isinstance(result, tuple):
        return [] if may_answer else ["was answered"]
    if not isinstance(result, MMError):
        return [f"ended in {type(result).__name__}, no MMError: {result}"]
    if not isinstance(result, RequestError | MissingExtraError):  # without an extra no file is read at all
        return [f"ended in {type(result).__name__}, which blames no request: {result}"]
    text = str(result)
    if len(text) < 20 or len(text) > 1000 or _LEAKS.search(text):
        return [f"the error says too little, or of our insides: {text}"]
    return []
