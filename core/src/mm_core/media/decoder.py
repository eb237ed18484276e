"""Who decodes: the thread that asks, or a worker (`media.workers`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from mm_core.media.audio import Audio, decode_audio
from mm_core.media.decode import MediaLimits, decode_image
from mm_core.media.video import Video, VideoSampling, decode_video


class Decoder(Protocol):
    """Encoded bytes to content. Thread-safe. Raises MediaError and its kinds."""

    def image(self, data: bytes) -> tuple[Image.Image, Any]:
        """An RGB picture, and the bytes of its pixels."""
        ...

    def video(self, data: bytes, sampling: VideoSampling) -> Video:
        """The frames of a video that `sampling` keeps."""
        ...

    def audio(self, data: bytes, sampling_rate: int | None) -> Audio:
        """A sound, mono, at `sampling_rate` Hz where that is given."""
        ...

    def close(self) -> None:
        """Let go of what it holds; no more calls come."""
        ...


@dataclass(frozen=True)
class LocalDecoder:
    """Decodes in the calling thread."""

    limits: MediaLimits

    def image(self, data: bytes) -> tuple[Image.Image, Any]:
        """See Decoder."""
        image = decode_image(data, self.limits)
        return image, image.tobytes()

    def video(self, data: bytes, sampling: VideoSampling) -> Video:
        """See Decoder."""
        return decode_video(data, sampling, self.limits)

    def audio(self, data: bytes, sampling_rate: int | None) -> Audio:
        """See Decoder."""
        return decode_audio(data, sampling_rate, self.limits)

    def close(self) -> None:
        """Nothing is held."""
