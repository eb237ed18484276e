"""Sizes and resizing, bit for bit as transformers' PIL path."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image

from mm_core.errors import MediaDecodeError

MAX_ASPECT = 200


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) divisible by `factor`, within the pixel range, close to the aspect ratio.

    Source: `smart_resize` of the Qwen2-VL reference (qwen-vl-utils; transformers has the same).
    The range is over height × width; very elongated pictures may leave it, as they do there.
    Raises MediaDecodeError (code "image_aspect") where one side is more than 200 times the other.
    """
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise MediaDecodeError(
            f"The picture is {width}×{height}: one side is more than {MAX_ASPECT} times the other. Crop or pad it.",
            code="image_aspect",
        )
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if new_height * new_width > max_pixels:
        beta = math.sqrt((height * width) / max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif new_height * new_width < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    return new_height, new_width


def resize_image(
    image: Image.Image, height: int, width: int, resample: int = Image.Resampling.BICUBIC
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An RGB image to uint8 [height, width, 3], resized by Pillow on 8-bit values."""
    if image.size != (width, height):
        image = image.resize((width, height), resample=Image.Resampling(resample))
    return np.asarray(image)


def resize_frames(
    frames: np.ndarray[Any, np.dtype[np.uint8]], height: int, width: int, resample: int = Image.Resampling.BICUBIC
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 [frames, h, w, 3] to uint8 [frames, height, width, 3], each frame as `resize_image`."""
    if frames.shape[1:3] == (height, width):
        return frames
    resized = np.empty((len(frames), height, width, 3), np.uint8)
    for index, frame in enumerate(frames):
        resized[index] = resize_image(Image.fromarray(np.ascontiguousarray(frame)), height, width, resample)
    return resized
