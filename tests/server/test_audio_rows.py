"""Recordings good and bad over HTTP: the rows A of what a server must bear, each with its status and code."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import Any

import av
import httpx
import numpy as np
import pytest
from support.hearing import (
    GOOD,
    RATE,
    SAME,
    SAMPLES,
    VERBOSE,
    canary,
    error_of,
    idle,
    post,
    sound,
    wav,
)
from support.serving import Server

from mm_core import Engine


@pytest.fixture(scope="module")
def client(whisper: Server) -> Iterator[Any]:
    with whisper.client() as made:
        yield made


# -- bad recordings: rows A --------------------------------------------------------------


def patched(data: bytes, place: int, form: str, value: int) -> bytes:
    packed = struct.pack(form, value)
    return data[:place] + packed + data[place + len(packed) :]


def movie(with_sound: bool) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        picture = out.add_stream("mpeg4", rate=10)
        picture.width, picture.height, picture.pix_fmt = 32, 32, "yuv420p"
        heard = out.add_stream("aac", rate=RATE) if with_sound else None
        for _ in range(10):
            out.mux(picture.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")))
        out.mux(picture.encode())
        if heard is not None:
            frame = av.AudioFrame.from_ndarray(sound(1.0, 4)[None], "fltp", "mono")
            frame.sample_rate = RATE
            out.mux(heard.encode(frame))
            out.mux(heard.encode())
    return buffer.getvalue()


PCM = wav(sound(1.0, 4), subtype="PCM_16")
DATA = PCM.index(b"data")
RNG = np.random.default_rng(0)
NAN = np.where(np.arange(RATE) == 100, np.nan, 0.1).astype(np.float32)
MP3 = wav(sound(3.0, 4), kind="MP3", subtype=None)
BAD_SOUNDS: dict[str, tuple[bytes, int, str]] = {
    "A1 no bytes": (b"", 400, "empty_audio"),
    "A1 no samples": (wav(SAMPLES[:0]), 400, "empty_audio"),
    "A2 NaN": (wav(NAN), 400, "nonfinite_audio"),
    "A2 infinity": (wav(np.where(np.isnan(NAN), np.inf, NAN)), 400, "nonfinite_audio"),
    "A10 rate 0": (patched(PCM, 24, "<I", 0), 400, "invalid_audio"),
    "A10 rate 4e9": (patched(PCM, 24, "<I", 4_000_000_000), 400, "invalid_audio"),
    "A10 no channels": (patched(PCM, 22, "<H", 0), 400, "invalid_audio"),
    "A10 65535 channels": (patched(PCM, 22, "<H", 65535), 400, "invalid_audio"),
    "A11 FLAC of silence": (wav(np.zeros(RATE * 1200, np.int16), kind="FLAC", subtype="PCM_16"), 413, "audio_too_long"),
    "A11 Opus of silence": (wav(np.zeros(RATE * 120, np.int16), kind="OGG", subtype="OPUS"), 413, "audio_too_long"),
    "A12 no sound in it": (movie(False), 400, "no_audio_stream"),
    "noise": (b"RIFF\0\1\0\0WAVE" + RNG.bytes(500), 400, "invalid_audio"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + RNG.bytes(500), 400, "unsupported_media"),
    "text": (b"hello, this is no sound at all", 400, "unsupported_media"),
    "a playlist": (b"#EXTM3U\n#EXT-X-VERSION:3\nfile:///etc/passwd\n", 400, "unsupported_media"),
}


@pytest.mark.parametrize("row", BAD_SOUNDS)
def test_bad_recordings(whisper: Server, client: Any, song: str, row: str) -> None:
    """Refused with their code, in a stream before its status; the next call gets what it always got."""
    data, status, code = BAD_SOUNDS[row]
    for stream in ("", "true"):
        reply = post(whisper, {**GOOD, "stream": stream}, {"file": ("talk.wav", data)})
        error = error_of(reply)
        assert (reply.status_code, error["code"], error["param"]) == (status, code, "file"), (error, stream)
    assert canary(client) == song
    assert idle(whisper)


def duration_of(reply: httpx.Response) -> float:
    assert reply.status_code == 200, reply.text
    seconds: float = reply.json()["duration"]
    return seconds


GOOD_SOUNDS: dict[str, tuple[bytes, float]] = {
    **{f"A3 {kind}": (wav(sound(1.0, 4), subtype=kind), 1.0)
       for kind in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW")},
    "A4 stereo": (wav(np.stack([sound(1.0, 4)] * 2, 1)), 1.0),
    "A4 5.1": (wav(np.stack([sound(1.0, 4)] * 6, 1)), 1.0),
    **{f"A5 {rate} Hz": (wav(sound(1.0, 4, rate), rate), 1.0) for rate in (8000, 44100, 192000)},
    "A6 one sample": (wav(SAMPLES[:1]), 1 / RATE),
    "A7 30 s and a sample": (wav(SAMPLES[: 30 * RATE + 1]), 30 + 1 / RATE),
    "A7 35 s": (wav(SAMPLES[: 35 * RATE]), 35.0),
    "A12 the sound of a film": (movie(True), 1.0),
    "A13 FLAC called WAV": (wav(sound(1.0, 4), kind="FLAC", subtype="PCM_16"), 1.0),
    "A13 MP3 called WAV": (MP3, 3.0),
}  # fmt: skip


@pytest.mark.parametrize("row", GOOD_SOUNDS)
def test_recordings_of_all_kinds(whisper: Server, row: str) -> None:
    data, seconds = GOOD_SOUNDS[row]
    reply = post(whisper, VERBOSE, {"file": ("talk.wav", data)})
    assert duration_of(reply) == pytest.approx(seconds, abs=0.15 if "film" in row or "MP3" in row else 1e-3)
    assert "warnings" not in reply.json()
    assert all(segment["end"] <= duration_of(reply) for segment in reply.json()["segments"])


def test_a3_to_a5_are_heard_alike(whisper: Server, offline: Engine) -> None:
    """Formats without loss give the same samples, and so the same text."""
    said = offline.transcribe((sound(1.0, 4), RATE), **SAME).text
    for row in ("A3 FLOAT", "A3 DOUBLE", "A4 stereo"):
        assert post(whisper, VERBOSE, {"file": GOOD_SOUNDS[row][0]}).json()["text"] == said, row


CUT_OFF = {
    "A8 24 h announced": (patched(PCM, DATA + 4, "<I", 24 * 3600 * RATE * 2 % 2**31), 1.0),
    "A9 half a WAV": (PCM[: len(PCM) // 2], 0.5),
    "A9 half an MP3": (MP3[: len(MP3) // 2], 1.5),
}


@pytest.mark.parametrize("row", CUT_OFF)
def test_what_is_there_of_a_cut_off_file_is_heard_and_said(whisper: Server, row: str) -> None:
    data, seconds = CUT_OFF[row]
    reply = post(whisper, VERBOSE, {"file": ("talk.wav", data)})
    assert duration_of(reply) == pytest.approx(seconds, rel=0.2)
    (warning,) = reply.json()["warnings"]
    assert "cut off" in warning
    text = post(whisper, {**VERBOSE, "response_format": "srt"}, {"file": ("talk.wav", data)})
    assert "cut off" in text.headers["x-mm-warnings"]
    stream = post(whisper, {**VERBOSE, "response_format": "json", "stream": "true"}, {"file": ("talk.wav", data)})
    assert "cut off" in stream.text
