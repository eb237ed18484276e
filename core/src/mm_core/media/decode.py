"""Bounded decoding of images into RGB.

One normaliser for everything encoded: first frame, EXIF orientation applied, alpha and `tRNS`
composited on white, 16-bit scaled to 8, CMYK and palettes to RGB. An already loaded PIL image is
taken as it is and only converted to RGB. Error texts are fixed: what a decoder says may hold
addresses and goes to the exception's cause only.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from mm_core.errors import MediaDecodeError, MediaError, MediaTooLargeError, UnsupportedMediaError
from mm_core.media.sniff import IMAGE_FORMATS, image_format, image_size

T = TypeVar("T")

# EXIF orientation 2…8 → what undoes it (EXIF 2.32, tag 0x0112).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class MediaLimits:
    """Ceilings checked before memory is taken.

    max_image_pixels: width × height of one picture, or of one video frame. max_encoded_bytes: an
    encoded image or video. max_video_frames: frames kept of one video. max_video_pixels: all
    kept frames of one video together (3 bytes a pixel). max_source_frames: frames in a video
    file, as only some of them are kept but all up to the last kept one are decoded. max_audio_samples:
    of one sound, mono, at the rate it is used at. max_source_samples: of one sound as given, all channels.
    max_audio_seconds: of one sound. decoder_threads: of FFmpeg, for one file; 0: as it likes.
    """

    max_image_pixels: int = 64 * 2**20
    max_encoded_bytes: int = 512 * 2**20
    max_video_frames: int = 768
    max_video_pixels: int = 512 * 2**20
    max_source_frames: int = 200_000
    max_audio_samples: int = 2**28
    max_source_samples: int = 2**31
    max_audio_seconds: float = 14400.0
    decoder_threads: int = 0


DEFAULT_LIMITS = MediaLimits()


def read_regular_file(path: str | os.PathLike[str], limit: int) -> bytes:
    """Content of a regular file of at most `limit` bytes.

    Devices, pipes, sockets and directories are refused without blocking. Raises MediaError, or
    MediaTooLargeError.
    """
    shown = repr(os.fspath(path)[:200])
    try:
        # O_NONBLOCK: opening a pipe without a writer would otherwise wait for ever.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        raise MediaError(f"There is no file {shown}. Check the path, or pass the file's bytes.") from None
    except (OSError, ValueError) as error:
        raise MediaError(f"The file {shown} cannot be opened. Check its permissions, or pass its bytes.") from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise MediaError(f"{shown} is not a regular file. Pass the path of an image, video or audio file.")
        _check_bytes(status.st_size, limit)
        with os.fdopen(handle, "rb", closefd=False) as file:
            data = file.read(limit + 1)  # the file may have grown meanwhile
    finally:
        os.close(handle)
    _check_bytes(len(data), limit)
    return data


def _check_bytes(count: int, limit: int) -> None:
    if count > limit:
        raise MediaTooLargeError(
            f"The encoded file has {count} bytes; the limit is {limit}. Send a smaller or more compressed file."
        )


def decode_image(source: bytes | str | Path, limits: MediaLimits = DEFAULT_LIMITS) -> Image.Image:
    """Encoded bytes, or a regular file, to an upright RGB image of 8 bits a channel.

    Formats (told by content): PNG, JPEG, WebP, GIF, BMP; the first frame of animations. Raises
    MediaDecodeError (code "invalid_image"), MediaTooLargeError, UnsupportedMediaError.
    """
    data = source if isinstance(source, bytes) else read_regular_file(source, limits.max_encoded_bytes)
    _check_bytes(len(data), limits.max_encoded_bytes)
    kind = image_format(data)
    if not data:
        raise MediaDecodeError("The image is empty (0 bytes). Send the bytes of a PNG, JPEG, WebP, GIF or BMP file.")
    if kind is None:
        raise UnsupportedMediaError(
            f"The bytes are no image that mm-core reads ({', '.join(IMAGE_FORMATS)}). Convert the file to PNG or JPEG."
        )
    size = image_size(data, kind)
    if size is not None:
        check_pixels(size[0], size[1], limits.max_image_pixels)
    return _load(data, kind, limits)


def check_pixels(width: int, height: int, limit: int) -> None:
    """Raise MediaTooLargeError where width × height is above `limit`."""
    if width * height > limit:
        raise MediaTooLargeError(
            f"The picture has {width}×{height} = {width * height} pixels; the limit is {limit}. "
            "Scale it down, or raise max_image_pixels.",
            code="image_too_large",
        )


def _load(data: bytes, kind: str, limits: MediaLimits) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data), formats=[kind]) as image:
            check_pixels(image.width, image.height, limits.max_image_pixels)
            image.load()
            # A GIF's frame may be larger than its screen.
            check_pixels(image.width, image.height, limits.max_image_pixels)
            return _upright(flatten(image), _orientation(image))
    except MediaError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise MediaTooLargeError(
            "The picture has more pixels than the image library opens. Scale it down.", code="image_too_large"
        ) from None
    except MemoryError as error:
        raise out_of_memory("image_too_large") from error
    except Exception as error:  # decoders raise whatever a damaged file makes them raise
        raise MediaDecodeError(
            f"The {kind} image is damaged or cut off and cannot be decoded. Save it again and resend it."
        ) from error


def out_of_memory(code: str) -> MediaTooLargeError:
    """The error for a file that takes more memory than its decoder may have."""
    return MediaTooLargeError("Decoding the file takes more memory than is allowed. Send a smaller one.", code=code)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata is ignored, the pixels are fine
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    method = _UPRIGHT.get(orientation)
    return image if method is None else image.transpose(method)


def flatten(image: Image.Image) -> Image.Image:
    """Any loaded PIL image to RGB, alpha and `tRNS` composited on white, 16-bit scaled to 8."""
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """The high byte, as the image library itself reads 16-bit RGB; plain conversion would clip."""
    wide = np.asarray(image).astype(np.int64).clip(0, 65535)
    grey = (wide >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[wide == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def to_rgb(image: Image.Image, limits: MediaLimits = DEFAULT_LIMITS) -> Image.Image:
    """A PIL image the caller loaded, taken as it is: `convert("RGB")`, no transpose, no compositing."""
    return _read_pil(image, limits, lambda: image.convert("RGB"))


def packed_rgb(image: Image.Image, limits: MediaLimits = DEFAULT_LIMITS) -> bytes:
    """The pixels, height × width × 3 bytes, of a PIL image of mode RGB that the caller loaded.

    A snapshot of an image that may change, for a fifth of the time that a copied image takes.
    """
    return _read_pil(image, limits, lambda: bytes(image.tobytes()))


def _read_pil(image: Image.Image, limits: MediaLimits, read: Callable[[], T]) -> T:
    width, height = image.size
    if width == 0 or height == 0:
        raise MediaDecodeError(f"The image has no pixels ({width}×{height}). Pass an image with content.")
    check_pixels(width, height, limits.max_image_pixels)
    try:
        return read()
    except Exception as error:
        raise MediaDecodeError(
            "The PIL image cannot be read (its file is closed, damaged or cut off). Call `image.load()` "
            "while the file is open, or pass the file's bytes."
        ) from error


def array_to_image(array: Any, limits: MediaLimits = DEFAULT_LIMITS) -> Image.Image:
    """[height, width, 3] or [height, width] (grey), numpy or torch, uint8 or float in 0…1 → RGB image."""
    pixels = array_to_uint8(array)
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3):
        raise UnsupportedMediaError(f"An image array has shape {_want(pixels.shape, '')}")
    if pixels.size == 0:
        raise MediaDecodeError(f"The image array has no pixels (shape {list(pixels.shape)}).")
    check_pixels(pixels.shape[1], pixels.shape[0], limits.max_image_pixels)
    return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")


def _want(shape: tuple[int, ...], leading: str) -> str:
    remedy = ""
    if len(shape) >= 3 and shape[-3] == 3:
        remedy = " Move the channels last: `.permute(1, 2, 0)` (torch), `np.moveaxis(x, 0, -1)` (numpy)."
    return f"[{leading}height, width, 3] or [{leading}height, width]; this one has {list(shape)}.{remedy}"


def array_to_uint8(array: Any) -> np.ndarray[Any, Any]:
    """uint8 as it is; float in 0…1 scaled by 255 and rounded; anything else UnsupportedMediaError."""
    try:
        values: np.ndarray[Any, Any] = np.asarray(array.detach().cpu() if hasattr(array, "detach") else array)
    except Exception as error:
        raise UnsupportedMediaError(
            "The array cannot be read. Pass a dense numpy array or torch tensor, uint8 or float32."
        ) from error
    if values.dtype == np.uint8:
        return values
    if not np.issubdtype(values.dtype, np.floating):
        raise UnsupportedMediaError(
            f"An array of dtype {values.dtype} is no picture. Pass uint8 in 0…255 or float in 0…1."
        )
    if values.size and not (float(values.min()) >= 0.0 and float(values.max()) <= 1.0):  # NaN fails, too
        raise UnsupportedMediaError(
            "A float picture has values in 0…1; this one has others. Divide by 255, or pass uint8."
        )
    scaled: np.ndarray[Any, Any] = np.rint(values.astype(np.float32) * 255.0).astype(np.uint8)
    return scaled
