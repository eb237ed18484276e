"""One media value, in any of the forms users have, to a normalised `MediaItem` with its digest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile

from mm_core.errors import MediaDecodeError, UnsupportedMediaError
from mm_core.hashing import Hasher, encode_fields, media_digest
from mm_core.inputs.caches import LruMap
from mm_core.media.audio import Audio, given_samples
from mm_core.media.decode import MediaLimits, array_to_image, packed_rgb, to_rgb
from mm_core.media.decoder import Decoder, LocalDecoder
from mm_core.media.encoded import read_encoded
from mm_core.media.video import INVALID, Video, VideoSampling, check_frames, frames_to_video
from mm_core.types import MediaItem, Modality

QUICK_PIXELS = 2**19
MAX_ALIASES = 16384


@dataclass(frozen=True)
class Fetched:
    """An item whose content may not have been decoded (`item.data` is None); `load` gets it whole."""

    item: MediaItem
    load: Callable[[], MediaItem]


class Fetcher:
    """Values to items. Thread-safe. decoder: of encoded bytes; None: the thread that asks decodes them.

    A digest of encoded bytes is remembered as an alias of the content's digest, so that a picture
    sent again is recognised without decoding it.
    """

    def __init__(self, hasher: Hasher, limits: MediaLimits, decoder: Decoder | None = None) -> None:
        self._hasher = hasher
        self._limits = limits
        self._decoder = decoder or LocalDecoder(limits)
        self._aliases: LruMap[bytes, MediaItem] = LruMap(MAX_ALIASES)
        # Loading a lazily opened PIL image is not thread-safe, and two requests may share one.
        self._pil_lock = threading.Lock()

    def fetch(
        self,
        modality: Modality,
        value: Any,
        sampling: VideoSampling | None = None,
        *,
        allow_paths: bool = True,
        sampling_rate: int | None = None,
        salt: str | None = None,
    ) -> Fetched:
        """Recognise one value; decode it, unless its bytes were seen before.

        image: PIL image, path, bytes, `data:` URL, array [height, width, 3] or [height, width].
        video: path, bytes, `data:` URL, frames (a list of images, or of encoded ones, or [n, height, width, 3]),
        `(frames, fps)`, `{"frames": …, "fps": …}`. audio: path, bytes, `data:` URL, `(samples, rate)`
        as `media.samples_to_audio` takes it.
        sampling: which frames of a video are kept. sampling_rate: what sound is resampled to (Hz; None: it
        stays as it is). allow_paths=False: a str must be a `data:` URL (values that come from a network). salt:
        whose bytes these are; nobody else's are recognised by them.
        Raises MediaError and its subclasses.
        """
        sampling = sampling or VideoSampling()
        if isinstance(value, memoryview | bytearray):
            value = bytes(value)
        if isinstance(value, str | Path):
            value = read_encoded(modality, value, self._limits, allow_paths=allow_paths)
        if isinstance(value, bytes):
            return self._fetch_encoded(modality, value, sampling, sampling_rate, salt)
        if modality == "image" and is_plain(value):
            return self._fetch_plain(value)
        if modality == "audio":
            item = self._audio(given_samples(value, sampling_rate, self._limits))
        else:
            item = self._from_object(modality, value, sampling)
        return Fetched(item, lambda: item)

    def _fetch_encoded(
        self, modality: Modality, data: bytes, sampling: VideoSampling, sampling_rate: int | None, salt: str | None
    ) -> Fetched:
        how = {"video": repr(sampling), "audio": repr(sampling_rate)}.get(modality, "")
        alias = self._hasher(encode_fields((salt, modality, how, self._hasher(data))))

        def load() -> MediaItem:
            if modality == "image":
                image, pixels = self._decoder.image(data)
                item = self._image_item(image.size, pixels, image)
            elif modality == "video":
                item = self._video(self._decoder.video(data, sampling))
            else:
                item = self._audio(self._decoder.audio(data, sampling_rate))
            self._aliases.put(alias, MediaItem(modality, item.digest, None, item.info))
            return item

        known = self._aliases.get(alias)
        if known is not None:
            return Fetched(known, load)
        item = load()
        return Fetched(item, lambda: item)

    def forget(self, digests: Collection[bytes]) -> None:
        """Recognise no encoded bytes of these contents any more."""
        self._aliases.drop(lambda _, item: item.digest in digests)

    def _fetch_plain(self, image: Image.Image) -> Fetched:
        """A loaded RGB image: its bytes are enough to recognise it; only for a new one is an image made of them."""
        size, pixels = image.size, packed_rgb(image, self._limits)
        known = self._image_item(size, pixels, None)
        return Fetched(known, lambda: replace(known, data=Image.frombytes("RGB", size, pixels)))

    def _from_object(self, modality: Modality, value: Any, sampling: VideoSampling) -> MediaItem:
        if modality == "video":
            frames, fps = _frames_of(value)
            if isinstance(frames, list | tuple) and frames and isinstance(frames[0], bytes):
                frames = self._decode_frames(frames)
            return self._video(frames_to_video(frames, fps, sampling, self._limits))
        if isinstance(value, ImageFile.ImageFile):
            with self._pil_lock:
                return self._image(to_rgb(value, self._limits))
        if isinstance(value, Image.Image):
            return self._image(to_rgb(value, self._limits))
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            return self._image(array_to_image(value, self._limits))
        raise UnsupportedMediaError(
            f"An image cannot be a {type(value).__name__}. Pass a PIL image, a path, bytes, a data: URL, or an array."
        )

    def _decode_frames(self, frames: Sequence[Any]) -> list[Image.Image]:
        """Frames that are encoded each by itself, all of the first one's size, by which the ceilings are checked."""
        decoded: list[Image.Image] = []
        for frame in frames:
            if not isinstance(frame, bytes):
                raise UnsupportedMediaError("Frames are all encoded, or none of them. Decode the encoded ones.")
            try:
                decoded.append(self._decoder.image(frame)[0])
            except MediaDecodeError as error:
                error.code = INVALID
                raise
            if len(decoded) == 1:
                check_frames(len(frames), decoded[0].width, decoded[0].height, self._limits)
            elif decoded[-1].size != decoded[0].size:
                raise MediaDecodeError("The frames are not of one size. Scale them to that of the first.", code=INVALID)
        return decoded

    def _image(self, image: Image.Image) -> MediaItem:
        return self._image_item(image.size, image.tobytes(), image)

    def _image_item(self, size: tuple[int, int], pixels: Any, image: Image.Image | None) -> MediaItem:
        width, height = size
        digest = media_digest(self._hasher, "image", ("RGB", height, width), pixels)
        return MediaItem("image", digest, image, {"width": width, "height": height})

    def _video(self, video: Video) -> MediaItem:
        count, height, width, _ = video.frames.shape
        header = ("uint8", count, height, width, 3, video.fps, video.sample_fps, *video.times)
        digest = media_digest(self._hasher, "video", header, video.frames.data)
        info = {
            "frames": count, "width": width, "height": height,
            "fps": video.fps, "sample_fps": video.sample_fps, "times": video.times,
        }  # fmt: skip
        return MediaItem("video", digest, video.frames, info)

    def _audio(self, audio: Audio) -> MediaItem:
        header = ("float32", len(audio.samples), audio.rate, audio.cut_off)  # all that `info` tells
        digest = media_digest(self._hasher, "audio", header, audio.samples.data)
        info = {"sample_rate": audio.rate, "samples": len(audio.samples)} | ({"cut_off": True} if audio.cut_off else {})
        return MediaItem("audio", digest, audio.samples, info)


def is_plain(value: Any) -> bool:
    """Whether a value is an RGB image in memory. One that was opened from a file may have to be loaded yet."""
    return isinstance(value, Image.Image) and not isinstance(value, ImageFile.ImageFile) and value.mode == "RGB"


def is_quick(value: Any) -> bool:
    """Whether `fetch` takes so little time that another thread would not begin sooner."""
    return is_plain(value) and value.width * value.height <= QUICK_PIXELS


def _frames_of(value: Any) -> tuple[Any, float | None]:
    """Frames and their fps, from any of the ways to pass frames."""
    fps: Any = None
    if isinstance(value, Mapping):
        if "frames" not in value or not set(value) <= {"frames", "fps"}:
            raise UnsupportedMediaError('A video dict has the keys "frames" and "fps", nothing else.')
        value, fps = value["frames"], value.get("fps")
    elif isinstance(value, tuple) and len(value) == 2 and (value[1] is None or isinstance(value[1], int | float)):
        value, fps = value
    if not isinstance(value, list | tuple) and not (hasattr(value, "shape") and hasattr(value, "dtype")):
        raise UnsupportedMediaError(
            f"Frames cannot be a {type(value).__name__}. Pass a list of images, or an array [frames, height, width, 3]."
        )
    return value, fps


def require_modality(modality: str, family: str, modalities: tuple[Modality, ...]) -> Modality:
    """`modality` where the family reads it; UnsupportedMediaError, naming what it reads, otherwise."""
    for known in modalities:
        if known == modality:
            return known
    raise UnsupportedMediaError(
        f"Family {family!r} reads {' and '.join(modalities) or 'no media'}, not {str(modality)[:40]!r}. "
        "Leave it out, or load a model of a family that reads it.",
        param="multi_modal_data",
    )
