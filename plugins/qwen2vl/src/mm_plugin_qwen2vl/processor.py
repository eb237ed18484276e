"""Qwen2-VL's and Qwen2.5-VL's processor: chat template, settings, and pictures resized.

What the encoder makes of the pixels equals the patches of transformers' `Qwen2VLImageProcessorPil`
bit for bit. Videos take the same path frame by frame (transformers' own needs torchvision, whose
resize differs by a few levels).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from mm_core.errors import CheckpointError, InvalidParamsError, InvalidPromptError, PluginError
from mm_core.hookspecs import Checkpoint, MediaRequest, SamplingDefaults
from mm_core.media import (
    Normalisation,
    PatchLayout,
    VideoSampling,
    resize_frames,
    resize_image,
    smart_resize,
)
from mm_core.types import MediaFeature, MediaItem, Modality

PLACEHOLDERS: Mapping[Modality, str] = {"image": "<|image_pad|>", "video": "<|video_pad|>"}

# Ceilings of what a request may ask for; a checkpoint's own settings may be above.
MAX_PIXELS = 16384 * 28 * 28
MAX_FRAMES = 768
MAX_FPS = 240.0

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
# Defaults of transformers' Qwen2VLImageProcessor and Qwen2VLVideoProcessor, as (min, max) pixels.
_PIXELS: Mapping[Modality, tuple[int, int]] = {
    "image": (56 * 56, 28 * 28 * 1280),
    "video": (128 * 28 * 28, 28 * 28 * 768),
}
_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Sizes:
    """What a request may change of an item's size: the range of height × width in pixels, and
    whether a video's frames share a budget (`video_tokens` tokens' worth of pixels)."""

    min_pixels: int
    max_pixels: int
    cap_frames: bool = False
    video_tokens: int = 128_000


@dataclass(frozen=True)
class Settings:
    """One modality's settings, from the checkpoint."""

    sizes: Sizes
    layout: PatchLayout
    norm: Normalisation
    resample: int


class Qwen2VLProcessor:
    """`hookspecs.Processor` of the family.

    `mm_processor_kwargs`: `min_pixels`, `max_pixels` (height × width after resizing, images and
    video frames), and for video files `fps` or `num_frames`, `min_frames`, `max_frames`. Frames
    passed directly are all kept, unless `fps` or `num_frames` is given.
    """

    modalities: tuple[Modality, ...] = ("image", "video")

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tokenizer: Any = checkpoint.tokenizer
        self._settings = read_all_settings(checkpoint)
        self._sampling = _read_sampling(_parts(checkpoint)["video"], self._settings["video"].layout)
        self._template = _chat_template(checkpoint)
        self._ids = {modality: _token_id(self.tokenizer, text) for modality, text in PLACEHOLDERS.items()}
        # Enters every media key, as the checkpoint's identity does not cover its processor settings.
        self.settings_key = json.dumps({m: asdict(s) for m, s in self._settings.items()}, sort_keys=True).encode()

    def placeholder(self, modality: Modality) -> str:
        """`<|image_pad|>` or `<|video_pad|>`; templates put it between vision start and end marks."""
        return PLACEHOLDERS[modality]

    def placeholder_id(self, modality: Modality) -> int:
        """The token id of `placeholder(modality)`."""
        return self._ids[modality]

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Messages to a prompt that ends with the assistant's header, by the checkpoint's template."""
        import jinja2

        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), chat_template=self._template, tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as error:
            raise InvalidPromptError(
                "The model's chat template refuses these messages. Check the order of roles and the content parts.",
                param="messages",
            ) from error
        return str(text)

    def accepts_verbatim(self, prompt: str, counts: Mapping[Modality, int]) -> bool:  # noqa: ARG002
        """False: media need their placeholders."""
        return False

    def check_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        """Raise InvalidParamsError for an unknown, ill-typed or out-of-range entry."""
        for modality in self.modalities:
            self._sizes(modality, kwargs)
        self._request_sampling(kwargs)

    def video_sampling(self, request: MediaRequest) -> VideoSampling:
        """Which frames of a video this request keeps."""
        return self._request_sampling(request.processor_kwargs)

    def variant(self, item: MediaItem, request: MediaRequest) -> bytes:
        """JSON of the size settings that differ from the checkpoint's; empty where none does."""
        sizes, default = self._sizes(item.modality, request.processor_kwargs), self._settings[item.modality].sizes
        if sizes == default:
            return b""
        return json.dumps({"min_pixels": sizes.min_pixels, "max_pixels": sizes.max_pixels}).encode()

    def prepare(self, item: MediaItem, variant: bytes) -> MediaFeature:
        """`pixels` uint8 [frames, height, width, 3], resized; info: `grid_thw` in patches, `second_per_grid`.

        Raises MediaDecodeError (code "image_aspect") for extremely elongated pictures.
        """
        settings = self._settings[item.modality]
        layout = settings.layout
        sizes = replace(settings.sizes, **json.loads(variant)) if variant else settings.sizes
        if item.modality == "image":
            width, height = item.data.size
            new_height, new_width = smart_resize(height, width, layout.factor, sizes.min_pixels, sizes.max_pixels)
            # A copy that may be written to: torch takes no other.
            frames = np.array(resize_image(item.data, new_height, new_width, settings.resample))[None]
        else:
            count, height, width = item.data.shape[:3]
            ceiling = _frame_ceiling(sizes, layout, count)
            new_height, new_width = smart_resize(height, width, layout.factor, sizes.min_pixels, ceiling)
            resized = resize_frames(item.data, new_height, new_width, settings.resample)
            frames = resized.copy() if resized is item.data else resized
        grid = (-(-len(frames) // layout.temporal), new_height // layout.patch, new_width // layout.patch)
        rate = item.info.get("sample_fps")
        return MediaFeature(
            modality=item.modality,
            num_tokens=math.prod(grid) // layout.merge**2,
            tensors={"pixels": torch.from_numpy(frames)},
            info={"grid_thw": grid, "second_per_grid": layout.temporal / rate if rate else None},
        )

    def expand(self, feature: MediaFeature) -> tuple[Sequence[int], Sequence[bool]]:
        """`num_tokens` placeholder ids, each of which takes a row."""
        count = feature.num_tokens
        return (self._ids[feature.modality],) * count, (True,) * count

    def default_sampling(self) -> SamplingDefaults:
        """Nothing: the checkpoint's stop ids are complete."""
        return SamplingDefaults()

    def finish(self, text: str, token_ids: Sequence[int]) -> str:  # noqa: ARG002
        """The text as it is."""
        return text

    def _sizes(self, modality: Modality, kwargs: Mapping[str, Any]) -> Sizes:
        """The modality's sizes with a request's overrides, checked."""
        default = self._settings[modality].sizes
        ceiling = max(MAX_PIXELS, default.max_pixels)
        low = _integer(kwargs, "min_pixels", 1, ceiling)
        high = _integer(kwargs, "max_pixels", 1, ceiling)
        if low is not None and high is not None and low > high:
            raise _bad(f"min_pixels={low} is above max_pixels={high}.")
        # One bound alone moves the other one along, so that the range never turns round.
        new_low = low if low is not None else min(default.min_pixels, high or default.min_pixels)
        new_high = high if high is not None else max(default.max_pixels, new_low)
        return replace(default, min_pixels=new_low, max_pixels=new_high)

    def _request_sampling(self, kwargs: Mapping[str, Any]) -> VideoSampling:
        """The checkpoint's frame sampling with a request's overrides, checked."""
        known = ("min_pixels", "max_pixels", "fps", "num_frames", "min_frames", "max_frames")
        for name in kwargs:
            if name not in known:
                raise _bad(f"{name!r} is not an option of this processor. Options: {', '.join(known)}.")
        fps = _number(kwargs, "fps", MAX_FPS)
        ceiling = max(MAX_FRAMES, self._sampling.max_frames)
        count = _integer(kwargs, "num_frames", 1, ceiling)
        low, high = (_integer(kwargs, name, 1, ceiling) for name in ("min_frames", "max_frames"))
        if fps is not None and count is not None:
            raise _bad("fps and num_frames exclude each other. Pass one of them.")
        changes: dict[str, Any] = {"min_frames": low, "max_frames": high}
        sampling = replace(self._sampling, **{k: v for k, v in changes.items() if v is not None})
        if low is not None and low > sampling.max_frames:
            raise _bad(f"min_frames={low} is above max_frames={sampling.max_frames}.")
        if fps is None and count is None:
            return sampling
        return replace(sampling, fps=fps, num_frames=count, given_frames=True)


def _parts(checkpoint: Checkpoint) -> Mapping[Modality, Mapping[str, Any]]:
    """The processor configuration of each modality: the images' where a checkpoint has none for videos, as
    in transformers."""
    image = checkpoint.processor_config.get("image_processor", {})
    return {"image": image, "video": checkpoint.processor_config.get("video_processor") or image}


def read_all_settings(checkpoint: Checkpoint) -> Mapping[Modality, Settings]:
    """Every modality's settings. Raises CheckpointError where they make no sense."""
    return {modality: read_settings(part, modality) for modality, part in _parts(checkpoint).items()}


def read_settings(part: Mapping[str, Any], modality: Modality) -> Settings:
    """One modality's settings from its part of the processor configuration, in either layout."""
    for switch in ("do_resize", "do_rescale", "do_normalize"):
        if part.get(switch, True) is not True:
            raise CheckpointError(
                f"The {modality} processor setting {switch}={part[switch]!r} is not supported: want true."
            )
    size = part.get("size") or {}
    low, high = _PIXELS[modality]
    low = _first(part.get("min_pixels"), size.get("shortest_edge"), size.get("min_pixels"), low)
    high = _first(part.get("max_pixels"), size.get("longest_edge"), size.get("max_pixels"), high)
    layout = PatchLayout(part.get("patch_size", 14), part.get("temporal_patch_size", 2), part.get("merge_size", 2))
    capped = part.get("cap_pixels_per_frame") is True
    mean, std = (tuple(part.get(k) or d) for k, d in (("image_mean", _MEAN), ("image_std", _STD)))
    numbers = (low, high, layout.patch, layout.temporal, layout.merge)
    if not all(type(n) is int and n > 0 for n in numbers) or low > high or len(mean) != 3 or len(std) != 3:
        raise CheckpointError(
            f"The {modality} processor settings make no sense: min_pixels={low!r}, max_pixels={high!r}, {layout}, "
            f"image_mean={mean!r}, image_std={std!r}. Fetch preprocessor_config.json again."
        )
    return Settings(
        sizes=Sizes(low, high, capped, int(part.get("max_video_tokens", 128_000))),
        layout=layout,
        norm=Normalisation(mean, std, float(part.get("rescale_factor", 1 / 255))),
        resample=int(part.get("resample", 3)),
    )


def _first(*values: Any) -> Any:
    return next(v for v in values if v is not None)


def _read_sampling(part: Mapping[str, Any], layout: PatchLayout) -> VideoSampling:
    count, fps = part.get("num_frames"), part.get("fps")
    return VideoSampling(
        fps=None if count else float(fps or 2.0),
        num_frames=count,
        min_frames=int(part.get("min_frames") or 4),
        max_frames=int(part.get("max_frames") or MAX_FRAMES),
        temporal_patch_size=layout.temporal,
    )


def _frame_ceiling(sizes: Sizes, layout: PatchLayout, count: int) -> int:
    """Pixels a frame may have; with `cap_frames` an even share of the video's budget, as in transformers."""
    if not sizes.cap_frames:
        return sizes.max_pixels
    budget = int(sizes.video_tokens * layout.factor**2 * 0.9) * layout.temporal // count
    return max(min(sizes.max_pixels, budget), int(sizes.min_pixels * 1.05))


def _chat_template(checkpoint: Checkpoint) -> str:
    """The tokenizer's template, else chat_template.jinja or .json, else the family's own."""
    own = getattr(checkpoint.tokenizer, "chat_template", None)
    if isinstance(own, Mapping):
        own = own.get("default")
    if isinstance(own, str) and own:
        return own
    file = checkpoint.path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = (checkpoint.read_json("chat_template.json") or {}).get("chat_template")
    return found if isinstance(found, str) else _TEMPLATE


def _token_id(tokenizer: Any, text: str) -> int:
    found = tokenizer.convert_tokens_to_ids(text)
    if not isinstance(found, int) or found == getattr(tokenizer, "unk_token_id", None):
        raise PluginError(
            f"The tokenizer of this checkpoint has no {text!r}, which qwen2vl needs. Take the tokenizer files "
            "of a Qwen2-VL or Qwen2.5-VL checkpoint."
        )
    return found


def _shown(value: Any) -> str:
    """A value for an error text; ints of thousands of digits have no str."""
    return "the value" if isinstance(value, int) and value.bit_length() > 128 else repr(value)[:40]


def _bad(text: str) -> InvalidParamsError:
    return InvalidParamsError(f"mm_processor_kwargs: {text}", param="mm_processor_kwargs")


def _integer(kwargs: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    value = kwargs.get(name)
    if value is None:
        return None
    if type(value) is not int or not low <= value <= high:
        raise _bad(f"{name}={_shown(value)} is not a whole number from {low} to {high}.")
    return value


def _number(kwargs: Mapping[str, Any], name: str, high: float) -> float | None:
    value = kwargs.get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or not 0.0 < value <= high:  # written so that NaN fails
        raise _bad(f"{name}={_shown(value)} is not a number above 0 and up to {high:g}.")
    return float(value)
