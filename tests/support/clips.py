"""Small encoded media of every kind."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
from PIL import Image


def picture(kind: str = "PNG", size: tuple[int, int] = (40, 30), seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def sound(seconds: float = 0.5, rate: int = 16000, kind: str = "WAV", channels: int = 1) -> bytes:
    times = np.arange(int(seconds * rate)) / rate
    tone = 0.5 * np.sin(2 * np.pi * 440 * times)
    buffer = io.BytesIO()
    soundfile.write(buffer, np.stack([tone * (0.5 + c / 8) for c in range(channels)], axis=1), rate, format=kind)
    return buffer.getvalue()


def film(count: int = 20, size: tuple[int, int] = (64, 48), rate: int = 10, kind: str = "mp4") -> bytes:
    """Frame i is grey of level 10·i, its left half darker."""
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *size, "yuv420p", 4_000_000
        for index in range(count):
            pixels = np.full((size[1], size[0], 3), 10 * index % 256, np.uint8)
            pixels[:, : size[0] // 2] //= 2
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
