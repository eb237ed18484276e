"""How long decoding takes, item by item, whoever does it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image

from mm_core.media.audio import Audio
from mm_core.media.decoder import Decoder
from mm_core.media.video import Video, VideoSampling
from mm_core.types import Modality


class TimedDecoder:
    """A Decoder that another one works for, with its items and seconds by modality; failed items count."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._lock = threading.Lock()
        self._taken: dict[Modality, tuple[int, float]] = {}

    def taken(self) -> dict[str, dict[str, float]]:
        """By modality: `items` and the `seconds` that they took together, waits for a worker included."""
        with self._lock:
            return {kind: {"items": items, "seconds": seconds} for kind, (items, seconds) in self._taken.items()}

    def image(self, data: bytes) -> tuple[Image.Image, Any]:
        """See Decoder."""
        with self._timed("image"):
            return self._decoder.image(data)

    def video(self, data: bytes, sampling: VideoSampling) -> Video:
        """See Decoder."""
        with self._timed("video"):
            return self._decoder.video(data, sampling)

    def audio(self, data: bytes, sampling_rate: int | None) -> Audio:
        """See Decoder."""
        with self._timed("audio"):
            return self._decoder.audio(data, sampling_rate)

    def close(self) -> None:
        """See Decoder."""
        self._decoder.close()

    @contextmanager
    def _timed(self, kind: Modality) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - begin
            with self._lock:
                items, seconds = self._taken.get(kind, (0, 0.0))
                self._taken[kind] = (items + 1, seconds + took)
