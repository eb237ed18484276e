"""Nougat's processor: margins cut, the page fitted into the model's size; bit for bit as transformers' PIL path."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from mm_core.errors import CheckpointError, InvalidParamsError, InvalidPromptError, MediaTooLargeError
from mm_core.hookspecs import Checkpoint, MediaRequest, SamplingDefaults
from mm_core.media import Normalisation
from mm_core.types import MediaFeature, MediaItem, Modality
from mm_plugin_nougat.encoder import SwinConfig
from mm_plugin_nougat.repetition import RepetitionGuard, cut_repetition

MAX_ASPECT = 100  # between a page's sides: resized, a longer strip would take gigabytes before it is cut down
_GREY = 200  # lighter is margin, of 255
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Settings:
    """size: (height, width). The rest: which steps are taken."""

    size: tuple[int, int]
    norm: Normalisation
    resample: int = 2
    crop_margin: bool = True
    align_long_axis: bool = False
    resize: bool = True
    thumbnail: bool = True

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Settings:
        """From the image processor's settings; missing ones take transformers' defaults."""
        part = checkpoint.processor_config.get("image_processor", {})
        for switch in ("do_pad", "do_rescale", "do_normalize"):
            if part.get(switch, True) is not True:
                raise CheckpointError(
                    f"The image processor setting {switch}={part[switch]!r} is not supported: want true."
                )
        size = part.get("size") or {"height": 896, "width": 672}
        if isinstance(size, Mapping):
            size = (size["height"], size["width"])
        mean, std = (tuple(part.get(k) or d) for k, d in (("image_mean", _MEAN), ("image_std", _STD)))
        return cls(
            size=tuple(size),
            norm=Normalisation(mean, std, float(part.get("rescale_factor", 1 / 255))),
            resample=part.get("resample", 2),
            crop_margin=part.get("do_crop_margin", True),
            align_long_axis=part.get("do_align_long_axis", False),
            resize=part.get("do_resize", True),
            thumbnail=part.get("do_thumbnail", True),
        )


class NougatProcessor:
    """`hookspecs.Processor` of the family. It takes one page and no question; `mm_processor_kwargs` has no options."""

    modalities: tuple[Modality, ...] = ("image",)
    limits: Mapping[Modality, int] = {"image": 1}
    add_special_tokens = False

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tokenizer: Any = checkpoint.tokenizer
        self.settings = Settings.from_checkpoint(checkpoint)
        config = SwinConfig.from_config(checkpoint.config)
        if config.image != self.settings.size:
            raise CheckpointError(
                f"The encoder reads pages of {config.image} pixels, the image processor makes {self.settings.size}. "
                "Take both from one checkpoint."
            )
        self._num_rows = config.num_rows
        self._start = str(self.tokenizer.convert_ids_to_tokens(start_id(checkpoint)))
        eos = self.tokenizer.eos_token_id
        self._guard = () if eos is None else (RepetitionGuard(eos),)
        self.settings_key = json.dumps(asdict(self.settings), sort_keys=True).encode()

    def placeholder(self, modality: Modality) -> None:
        """None: the decoder attends to the page."""

    def placeholder_id(self, modality: Modality) -> None:
        """None."""

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """What every answer begins with. Raises InvalidPromptError for text: Nougat follows no instructions."""
        for message in messages:
            content = message["content"]
            parts = [content] if isinstance(content, str) else [p["text"] for p in content if p["type"] == "text"]
            if any(part.strip() for part in parts):
                raise InvalidPromptError(
                    "Nougat turns a page into Markdown and reads no instructions. Send the page with an empty prompt."
                )
        return self._start

    def accepts_verbatim(self, prompt: str, counts: Mapping[Modality, int]) -> bool:  # noqa: ARG002
        """A prompt that begins as answers do: the text after that is continued."""
        return prompt.startswith(self._start)

    def check_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        """Raise InvalidParamsError for any option."""
        if kwargs:
            raise InvalidParamsError(
                f"mm_processor_kwargs: {next(iter(kwargs))!r} is not an option; Nougat's processor has none.",
                param="mm_processor_kwargs",
            )

    def variant(self, item: MediaItem, request: MediaRequest) -> bytes:  # noqa: ARG002
        """Nothing beside the content changes the features."""
        return b""

    def prepare(self, item: MediaItem, variant: bytes) -> MediaFeature:  # noqa: ARG002
        """One page: `pixels` uint8 [1, height, width, 3]. Raises MediaTooLargeError for a strip."""
        page = np.ascontiguousarray(self._page(item.data))
        return MediaFeature("image", self._num_rows, {"pixels": torch.from_numpy(page)[None]})

    def expand(self, feature: MediaFeature) -> tuple[Sequence[int], Sequence[bool]]:  # noqa: ARG002
        """Nothing: a page has no tokens in the prompt."""
        return (), ()

    def default_sampling(self) -> SamplingDefaults:
        """The repetition guard."""
        return SamplingDefaults(logits_processors=self._guard)

    def finish(self, text: str, token_ids: Sequence[int]) -> str:
        """An answer that ran into a repetition keeps one copy of what was repeated."""
        repeats = any(guard.repeats(token_ids) for guard in self._guard)
        return cut_repetition(text) if repeats else text

    def _page(self, image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """uint8 [height, width, 3] of the model's size."""
        settings = self.settings
        height, width = settings.size
        if settings.crop_margin:
            image = _crop_margin(image)
        if settings.align_long_axis and (width - height) * (image.width - image.height) < 0:
            image = image.transpose(Image.Transpose.ROTATE_270)
        if settings.resize:
            image = _resize_shorter(image, min(height, width), settings.resample)
        if settings.thumbnail:
            image = _thumbnail(image, height, width)
        if image.height > height or image.width > width:
            raise MediaTooLargeError(
                f"The page is {image.width}×{image.height} pixels, the model reads {width}×{height}."
            )
        page = np.zeros((height, width, 3), np.uint8)
        top, left = (height - image.height) // 2, (width - image.width) // 2
        page[top : top + image.height, left : left + image.width] = np.asarray(image)
        return page


def start_id(checkpoint: Checkpoint) -> int:
    """The token that answers begin with."""
    places = (checkpoint.generation_config, checkpoint.config, checkpoint.config.get("decoder", {}))
    for name in ("decoder_start_token_id", "bos_token_id"):
        for place in places:
            if type(place.get(name)) is int:
                return int(place[name])
    raise CheckpointError("The checkpoint names no decoder_start_token_id. Fetch its generation_config.json again.")


def _crop_margin(image: Image.Image) -> Image.Image:
    """The part that holds something darker than the margin's grey; a page of one colour stays whole."""
    data = np.asarray(image.convert("L"))
    low, high = data.min(), data.max()
    if low == high:
        return image
    # float64 of an 8-bit difference, as the reference has it
    dark = (data - low) / (high - low) * 255 < _GREY
    rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
    return image.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))


def _resize_shorter(image: Image.Image, side: int, resample: int) -> Image.Image:
    """The shorter side to `side`, the longer one in proportion, rounded down."""
    short, long = sorted(image.size)
    if long > MAX_ASPECT * short:
        raise MediaTooLargeError(
            f"The page is {image.width}×{image.height} pixels after its margins are cut: a strip, not a page. Crop it."
        )
    other = int(side * long / short)
    size = (side, other) if image.width <= image.height else (other, side)
    return image.resize(size, Image.Resampling(resample))


def _thumbnail(image: Image.Image, height: int, width: int) -> Image.Image:
    """No side larger than the size's; in proportion to the longer one."""
    new_height, new_width = min(image.height, height), min(image.width, width)
    if (new_height, new_width) == (image.height, image.width):
        return image
    if image.height > image.width:
        new_width = int(image.width * new_height / image.height)
    elif image.width > image.height:
        new_height = int(image.height * new_width / image.width)
    return image.resize((max(new_width, 1), max(new_height, 1)), Image.Resampling.BICUBIC, reducing_gap=2.0)
