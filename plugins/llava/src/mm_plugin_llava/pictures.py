"""Pictures to uint8 tiles, bit for bit as transformers' PIL image processors resize, pad and crop them.

Rescaling and normalising follow on the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from PIL import Image

from mm_core.errors import CheckpointError, MediaDecodeError
from mm_core.media import Normalisation

Size = tuple[int, int]
"""(height, width), as all sizes here."""
Array = np.ndarray[Any, np.dtype[np.uint8]]

MAX_PIXELS = 2**26
"""Of a picture while it is enlarged: one side of a very elongated one can grow to gigabytes before it is cropped."""

_CLIP_NORM = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
_CLIP = {**_CLIP_NORM, "size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": 224}
_ONEVISION_SIDES = range(384, 2305, 384)
# What each of transformers' processors does where the checkpoint's settings say nothing.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "CLIPImageProcessor": _CLIP,
    "LlavaImageProcessor": _CLIP,
    "SiglipImageProcessor": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 224, "width": 224}},
    "LlavaNextImageProcessor": {
        **_CLIP,
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    },
    "LlavaOnevisionImageProcessor": {
        **_CLIP_NORM,
        "size": {"height": 384, "width": 384},
        "image_grid_pinpoints": [[h, w] for h in _ONEVISION_SIDES for w in _ONEVISION_SIDES],
    },
    "LlavaOnevisionVideoProcessor": {**_CLIP_NORM, "size": {"height": 384, "width": 384}},
}
_BY_KIND = {
    "llava": "LlavaImageProcessor",
    "llava_next": "LlavaNextImageProcessor",
    "llava_onevision": "LlavaOnevisionImageProcessor",
}


@dataclass(frozen=True)
class PictureSettings:
    """What happens to a picture before it is normalised. size: resize to (height, width), or the shorter side to
    a length, or not at all. crop: cut, or fill with black, around the centre. square: colour that fills a
    picture to a square first, or None. pinpoints: sizes that tiles may make up together."""

    size: Size | int | None
    crop: Size | None
    resample: int
    norm: Normalisation
    square: tuple[int, int, int] | None = None
    pinpoints: tuple[Size, ...] = ()

    @classmethod
    def from_config(cls, part: Mapping[str, Any], kind: str, *, video: bool = False) -> Self:
        """From a part of the processor configuration. kind: the model's type. Raises CheckpointError."""
        name = "LlavaOnevisionVideoProcessor" if video else str(part.get("image_processor_type") or _BY_KIND[kind])
        name = name.removesuffix("Fast").removesuffix("Pil")
        if name not in _DEFAULTS:
            raise CheckpointError(
                f"The checkpoint's pictures are prepared by {name!r}; this plugin knows {', '.join(_DEFAULTS)}. "
                "Check image_processor_type in preprocessor_config.json."
            )
        values = {**_DEFAULTS[name], **{key: value for key, value in part.items() if value is not None}}
        normalise = values.get("do_normalize", True)
        mean = tuple(values["image_mean"]) if normalise else (0.0,) * 3
        std = tuple(values["image_std"]) if normalise else (1.0,) * 3
        rescale = float(values.get("rescale_factor", 1 / 255)) if values.get("do_rescale", True) else 1.0
        fill = tuple(int(x * 255) for x in values["image_mean"])
        pads = kind == "llava_onevision" or (name == "LlavaImageProcessor" and values.get("do_pad", False))
        return cls(
            size=_size(values["size"]) if values.get("do_resize", True) else None,
            crop=_both(values["crop_size"]) if values.get("do_center_crop", False) else None,
            resample=int(values.get("resample", Image.Resampling.BICUBIC)),
            norm=Normalisation(mean, std, rescale),
            square=(fill[0], fill[1], fill[2]) if pads else None,
            pinpoints=tuple((int(h), int(w)) for h, w in values.get("image_grid_pinpoints", ())),
        )

    @property
    def tile(self) -> int | None:
        """Pixels a side of what comes out, or None where that depends on the picture."""
        found = self.crop or self.size
        if isinstance(found, int):
            return found if self.pinpoints else None
        return found[0] if found and found[0] == found[1] else None

    def check(self, image_size: int, *, tiled: bool) -> None:
        """Raise CheckpointError unless every tile has the size that the tower reads. tiled: whether pinpoints
        are needed."""
        side = self.tile
        ragged = [p for p in self.pinpoints if p[0] % image_size or p[1] % image_size]
        if side != image_size or ragged or (tiled and not self.pinpoints):
            raise CheckpointError(
                f"The picture settings do not give tiles of {image_size} pixels a side, which the vision tower reads: "
                f"size {self.size}, crop_size {self.crop}, image_grid_pinpoints {list(self.pinpoints)[:9]}. "
                "Fetch preprocessor_config.json and config.json again."
            )

    def plain(self, image: Image.Image) -> Image.Image:
        """A picture, or a tile of one, resized and cropped."""
        if self.size is not None:
            image = image.resize(_as_width_height(_resized(image, self.size)), Image.Resampling(self.resample))
        if self.crop is not None:
            height, width = self.crop
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))  # black where it reaches beyond
        return image

    def squared(self, image: Image.Image) -> Image.Image:
        """The picture in the middle of a square."""
        side = max(image.size)
        if self.square is None or image.width == image.height:
            return image
        check_pixels(image, (side, side))
        canvas = Image.new("RGB", (side, side), self.square)
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return canvas

    def tiles(self, image: Image.Image, best: Size) -> list[Image.Image]:
        """The whole picture as one tile, then the tiles of what fits `best`, row by row."""
        assert self.tile is not None, "checked at load"
        side, resample = self.tile, Image.Resampling(self.resample)
        fitted = _fit((image.height, image.width), best)
        canvas = Image.new("RGB", _as_width_height(best))
        canvas.paste(
            image.resize(_as_width_height(fitted), resample), ((best[1] - fitted[1]) // 2, (best[0] - fitted[0]) // 2)
        )
        whole = (self.size, self.size) if isinstance(self.size, int) else self.size or (side, side)
        corners = [(top, left) for top in range(0, best[0], side) for left in range(0, best[1], side)]
        cut = (canvas.crop((left, top, left + side, top + side)) for top, left in corners)
        return [self.plain(tile) for tile in (image.resize(_as_width_height(whole), resample), *cut)]


def stack(tiles: Sequence[Image.Image], side: int) -> Array:
    """Tiles as uint8 [tiles, side, side, 3], without the pixels that no patch covers."""
    out = np.empty((len(tiles), side, side, 3), np.uint8)
    for index, tile in enumerate(tiles):
        out[index] = np.asarray(tile)[:side, :side]
    return out


def best_resolution(size: Size, pinpoints: Sequence[Size]) -> Size:
    """The pinpoint in which most of a picture's pixels stay and fewest are wasted (transformers'
    `select_best_resolution`)."""
    height, width = size

    def merit(pinpoint: Size) -> tuple[int, int]:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        return used, used - pinpoint[0] * pinpoint[1]

    return max(pinpoints, key=merit)  # the first among equals


def check_pixels(image: Image.Image, enlarged: Size) -> None:
    """Raise MediaDecodeError (code "image_aspect") where `enlarged` is beyond MAX_PIXELS."""
    if math.prod(enlarged) > max(MAX_PIXELS, image.width * image.height):
        raise MediaDecodeError(
            f"The picture is {image.width}×{image.height}, so elongated that this model's preprocessing would make "
            f"{enlarged[1]}×{enlarged[0]} pixels of it. Crop or pad it.",
            code="image_aspect",
        )


def _resized(image: Image.Image, size: Size | int) -> Size:
    if not isinstance(size, int):
        return size
    short, long = sorted(image.size)
    other = int(size * long / short)
    found = (size, other) if image.height <= image.width else (other, size)
    check_pixels(image, found)
    return found


def _fit(size: Size, best: Size) -> Size:
    """The largest size of the picture's shape within `best` (transformers' `get_patch_output_size`)."""
    across, down = best[1] / size[1], best[0] / size[0]
    if across < down:
        return min(math.ceil(size[0] * across), best[0]), best[1]
    return best[0], min(math.ceil(size[1] * down), best[1])


def _as_width_height(size: Size) -> Size:
    return size[1], size[0]


def _size(value: Any) -> Size | int:
    """`size` in any of its spellings: a number is the shorter side."""
    if isinstance(value, Mapping) and set(value) == {"shortest_edge"}:
        value = value["shortest_edge"]
    return value if type(value) is int and value > 0 else _both(value)


def _both(value: Any) -> Size:
    """(height, width) of a setting; a number is both."""
    height, width = (value.get("height"), value.get("width")) if isinstance(value, Mapping) else (value, value)
    if type(height) is not int or type(width) is not int or min(height, width) < 1:
        raise CheckpointError(
            f"The picture settings have a size of {value!r}; want height and width, or shortest_edge. "
            "Fetch preprocessor_config.json again."
        )
    return height, width
