"""What the engine's settings say about media: ceilings, who decodes, and what a request may ask of a processor."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from mm_core.config import EngineConfig
from mm_core.errors import InvalidParamsError, MediaTooLargeError
from mm_core.media.decode import MediaLimits
from mm_core.media.decoder import Decoder, LocalDecoder
from mm_core.media.workers import DecodeWorkers, WorkerSettings
from mm_core.types import MediaItem

MAX_FPS = 240.0


class DecodedBudget:
    """Bytes that one request's media may take once they are decoded, whatever they were before. Thread-safe."""

    def __init__(self, total: int) -> None:
        self._total = self._left = total
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raise MediaTooLargeError where others of the request took all."""
        if self._left < 0:
            raise MediaTooLargeError(
                f"The request's media take more than {self._total} bytes once they are decoded. Send fewer, or smaller "
                "ones."
            )

    def take(self, item: MediaItem) -> None:
        """Count an item. Raises MediaTooLargeError."""
        if item.data is not None:
            with self._lock:
                self._left -= _decoded_bytes(item)
            self.check()


def _decoded_bytes(item: MediaItem) -> int:
    if item.modality == "image":
        return 4 * int(item.info["width"]) * int(item.info["height"])  # so the image library holds RGB
    return int(item.data.nbytes)


def media_limits(config: EngineConfig) -> MediaLimits:
    """The ceilings of media."""
    return MediaLimits(
        max_image_pixels=config.max_image_pixels,
        max_encoded_bytes=config.max_encoded_bytes,
        max_video_frames=config.max_video_frames,
        max_audio_seconds=config.max_audio_seconds,
    )


def make_decoder(config: EngineConfig) -> Decoder:
    """Workers where the settings want them. Raises ConfigError where there can be none."""
    limits = media_limits(config)
    if not config.decode_workers:
        return LocalDecoder(limits)
    settings = WorkerSettings(config.decode_workers, config.decode_memory_bytes, config.decode_timeout_s)
    return DecodeWorkers(settings, limits)


def check_knobs(kwargs: Mapping[str, Any], config: EngineConfig) -> None:
    """Raise InvalidParamsError where a request asks its processor for more than the ceilings allow, in an option that
    families name alike; what else there is to an option is for the family to check."""
    ceilings = {
        "fps": MAX_FPS,
        "num_frames": config.max_video_frames, "max_frames": config.max_video_frames,
        "min_frames": config.max_video_frames,
        "min_pixels": config.max_image_pixels, "max_pixels": config.max_image_pixels,
    }  # fmt: skip
    for name, value in kwargs.items():
        ceiling = ceilings.get(name)
        if ceiling is not None and isinstance(value, int | float) and not value <= ceiling:
            raise InvalidParamsError(
                f"mm_processor_kwargs: {name} is above the ceiling of {int(ceiling)}. Lower it.",
                param="mm_processor_kwargs",
            )
