"""A tiny random Whisper behind a server, calls of the audio routes, and whether anything is left of them.

It hears tones: what it says is nonsense, but always the same.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import soundfile

from support.serving import Server, running_server
from support.tiny_whisper import RATE, make_tiny_whisper, sound

KEYS = ("key-of-one", "key-of-two")
MODEL = "tiny-whisper"
SEEDED: dict[str, Any] = {"temperature": 0.5, "extra_body": {"seed": 5}}  # one try a window
SAME: dict[str, Any] = {"temperature": 0.5, "seed": 5}
MAX_SECONDS = 90
GOOD = {"model": MODEL}
VERBOSE = {**GOOD, "response_format": "verbose_json", "temperature": "0.5", "seed": "5"}


def whisper_path(folder: Path) -> Path:
    """The model, whose answers are short."""
    return make_tiny_whisper(folder, max_target_positions=64, stamp_scale=0.45)


@contextmanager
def whisper_server(path: Path) -> Iterator[Server]:
    """A server of it."""
    options = {"served_model_name": MODEL, "max_audio_seconds": MAX_SECONDS, "max_part_bytes": 2**23}
    with running_server(path, keys=KEYS, **options) as running:
        yield running


def wav(samples: Any, rate: int = RATE, kind: str = "WAV", subtype: str | None = "FLOAT") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


SAMPLES = sound(42.0, 3)  # two windows
LONG, SHORT = wav(SAMPLES), wav(sound(1.0, 4))


def post(
    server: Server, data: Any = None, files: Any = None, route: str = "transcriptions", **more: Any
) -> httpx.Response:
    with server.http() as http:
        return http.post(f"/v1/audio/{route}", data=data, files=files, **more)


def error_of(reply: httpx.Response) -> dict[str, Any]:
    body = reply.json()
    assert set(body) == {"error"}
    assert {"message", "type", "param", "code"} <= set(body["error"])
    text = reply.text
    assert not re.search(r"0x[0-9a-f]{6,}|Traceback|site-packages|\.py\b|/tmp/|/root", text), text
    error: dict[str, Any] = body["error"]
    return error


def idle(server: Server, within_s: float = 5.0) -> bool:
    """Whether nothing of any call is left soon."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        stats = server.stats()
        engine, blocks = stats["engine"], stats["engine"]["blocks"]
        if not (stats["gate"]["running"] or stats["gate"]["waiting"] or engine["running"] or engine["waiting"]
                or blocks["in_use"] or blocks["pending"]):  # fmt: skip
            return True
        time.sleep(0.02)
    return False


def canary(client: Any) -> str:
    text: str = client.audio.transcriptions.create(file=SHORT, model=MODEL, **SEEDED).text
    return text
