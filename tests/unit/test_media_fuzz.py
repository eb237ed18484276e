"""Mutated files of every kind through the decode workers: each is read or refused by name, none breaks a decoder."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from support.clips import film, picture, sound

from mm_core.errors import MediaError
from mm_core.hashing import get_hasher
from mm_core.inputs.fetch import Fetcher
from mm_core.media import MediaLimits
from mm_core.media.workers import DecodeWorkers, WorkerSettings
from mm_core.types import Modality

LIMITS = MediaLimits(max_image_pixels=2**21, max_video_frames=64, max_audio_seconds=60.0, max_source_frames=2000)
SEEDS: dict[Modality, list[bytes]] = {
    "image": [picture(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP")],
    "audio": [sound(0.2, kind=kind, channels=n) for kind, n in (("WAV", 2), ("FLAC", 1), ("OGG", 1), ("MP3", 2))],
    "video": [film(6, kind=kind) for kind in ("mp4", "matroska", "avi")],
}
CODES: dict[Modality, set[str]] = {
    "image": {"invalid_image", "unsupported_media", "image_too_large"},
    "audio": {"invalid_audio", "unsupported_media", "empty_audio", "nonfinite_audio", "audio_too_long",
              "no_audio_stream"},
    "video": {"invalid_video", "unsupported_media", "image_too_large", "media_too_large"},
}  # fmt: skip


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """A few bytes other, most of them at the start, where headers are; or a piece left out, doubled, or cut off."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 9))):
        end = len(out) if rng.random() < 0.5 else min(len(out), 200)
        at = int(rng.integers(0, max(end, 1)))
        match int(rng.integers(0, 6)):
            case 0 | 1:
                out[at : at + 1] = bytes([int(rng.integers(0, 256))])
            case 2:
                out[at : at + 4] = int(rng.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000])).to_bytes(4, "big")
            case 3:
                out[at : at + 4] = int(rng.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 65535])).to_bytes(4, "little")
            case 4:
                size = int(rng.integers(1, 64))
                out[at : at + size] = out[at : at + size] * int(rng.integers(0, 3))
            case 5 if len(out) > 40:
                del out[int(rng.integers(32, len(out))) :]
    return bytes(out)


def fuzz(modality: Modality, count: int, seed: int) -> Counter[str]:
    """How so many files end: "ok" or the error's code."""
    workers = DecodeWorkers(WorkerSettings(1, 2**29, 20.0), LIMITS)
    fetcher = Fetcher(get_hasher("xxh3_128"), LIMITS, workers)
    rng, ends, slowest = np.random.default_rng(seed), Counter[str](), 0.0
    faults: list[str] = []
    try:
        workers.image(picture())
        pid = workers._workers[0]._process.pid  # type: ignore[union-attr]
        for index in range(count):
            data = mutate(SEEDS[modality][index % len(SEEDS[modality])], rng)
            start = time.monotonic()
            try:
                item = fetcher.fetch(modality, data, sampling_rate=16000).item
                ends["ok"] += item.data is not None
            except MediaError as error:
                ends[error.code] += 1
                broken = "breaks the decoder" in str(error) or "takes too long" in str(error)
                if broken or error.code not in CODES[modality]:
                    faults.append(f"{index}: {error} {data[:300].hex()}")
            slowest = max(slowest, time.monotonic() - start)
        if (status := Path(f"/proc/{pid}/status")).exists():  # one that met its bound of memory was replaced
            assert int(status.read_text().split("VmHWM:")[1].split()[0]) < 600 * 1024
    finally:
        workers.close()
    assert not faults, "\n".join(faults)
    assert slowest < 10.0
    return ends


@pytest.mark.parametrize("modality", ["image", "audio", "video"])
def test_mutated_files(modality: Modality) -> None:
    ends = fuzz(modality, 150, 0)
    assert ends["ok"] > 5
    assert ends.total() - ends["ok"] > 20


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["image", "audio", "video"])
def test_many_mutated_files(modality: Modality) -> None:
    assert fuzz(modality, 4000, 1).total() > 3000
