"""Text and pixels to features, for all three families of checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image

from mm_core.errors import InvalidParamsError
from mm_core.hookspecs import Checkpoint, MediaRequest, SamplingDefaults
from mm_core.media import VideoSampling
from mm_core.towers import tower_config
from mm_core.types import MediaFeature, MediaItem, Modality
from mm_plugin_nvila import tiling
from mm_plugin_nvila.layout import Layout
from mm_plugin_nvila.prompts import choose
from mm_plugin_nvila.settings import MAX_TILES, Marks, read_settings

PLACEHOLDERS: Mapping[Modality, str] = {"image": "<image>", "video": "<vila/video>"}
MAX_FRAMES, MAX_FPS = 768, 240.0


class VilaProcessor:
    """`hookspecs.Processor` of the family.

    `mm_processor_kwargs`: `max_tiles` (of a picture that is cut), and for videos `num_frames` or `fps`. Frames
    are sampled however a video is given.
    """

    modalities: tuple[Modality, ...] = ("image", "video")
    start_chat = True  # a start token is what the tokenizer makes it, not part of a template

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tokenizer: Any = with_media_tokens(checkpoint.tokenizer)
        self.settings = read_settings(checkpoint)
        self._tower = tower_config(self.settings.vision)
        self._layout = Layout(self.settings, self._tower.side)
        self._template = choose(checkpoint.name, checkpoint.config, checkpoint.text_config, self.tokenizer.get_vocab())
        self._ids = {m: int(self.tokenizer.convert_tokens_to_ids(text)) for m, text in PLACEHOLDERS.items()}
        self._line = self._line_ids()
        marks: dict[Modality, Marks] = {"image": self.settings.image_marks, "video": self.settings.video_marks}
        self._marks = {m: [self._tokens(text) for text in (k.start, k.end, k.sep)] for m, k in marks.items()}
        self.settings_key = json.dumps(asdict(self.settings), sort_keys=True, default=dict).encode()

    def placeholder(self, modality: Modality) -> str:
        """`<image>` or `<vila/video>`."""
        return PLACEHOLDERS[modality]

    def placeholder_id(self, modality: Modality) -> int:
        """The token id of `placeholder(modality)`."""
        return self._ids[modality]

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Messages to a prompt that ends with the assistant's header, by the language model's template."""
        return self._template.render(messages, PLACEHOLDERS)

    def accepts_verbatim(self, prompt: str, counts: Mapping[Modality, int]) -> bool:  # noqa: ARG002
        """False: media need their placeholders."""
        return False

    def check_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        """Raise InvalidParamsError for an unknown, ill-typed or out-of-range entry."""
        for name in kwargs:
            if name not in ("max_tiles", "num_frames", "fps"):
                raise _bad(f"{name!r} is not an option of this processor. Options: max_tiles, num_frames, fps.")
        least = self.settings.tiles[-1] ** 2 if self.settings.aspect == "dynamic_s2" else self.settings.min_tiles
        _integer(kwargs, "max_tiles", least, MAX_TILES)
        _integer(kwargs, "num_frames", 1, MAX_FRAMES)
        fps = kwargs.get("fps")
        if fps is not None and (type(fps) not in (int, float) or not 0 < fps <= MAX_FPS):
            raise _bad(f"fps is a number above 0 and up to {MAX_FPS:g}.")
        if fps is not None and kwargs.get("num_frames") is not None:
            raise _bad("fps and num_frames exclude each other. Pass one of them.")

    def video_sampling(self, request: MediaRequest) -> VideoSampling:
        """Which frames of a video this request keeps."""
        kwargs = request.processor_kwargs
        fps, count = kwargs.get("fps"), kwargs.get("num_frames")
        if fps is None and count is None:
            fps, count = self.settings.fps, self.settings.num_video_frames
        if fps is not None:
            count = None
        elif count is None:
            raise _bad("the model's config.json has no num_video_frames. Pass num_frames or fps.")
        return VideoSampling(fps=fps, num_frames=count, max_frames=MAX_FRAMES, given_frames=True, spread=True)

    def variant(self, item: MediaItem, request: MediaRequest) -> bytes:
        """How many tiles an image may be cut into at most; empty where it is not cut: a video's frames, or one of
        several images."""
        cut = self.settings.aspect in ("dynamic", "dynamic_s2")
        if item.modality != "image" or request.counts.get("image") != 1 or not cut:
            return b""
        return b"%d" % (request.processor_kwargs.get("max_tiles") or self.settings.max_tiles)

    def prepare(self, item: MediaItem, variant: bytes) -> MediaFeature:
        """`pixels` uint8 [tiles, side, side, 3]. info: `tiles`; `block`, (rows, columns) of tiles of the last scale
        of a picture that was cut for S2; `lines`, whether each tile has a line of the prompt."""
        settings = self.settings
        block: tiling.Block | None = None
        if item.modality == "video":
            self._layout.check_frames(len(item.data))
            pixels = np.stack([self._whole(Image.fromarray(frame)) for frame in item.data])
        elif not variant:
            pixels = self._whole(item.data)[None]
        elif settings.aspect == "dynamic_s2":
            pixels, block = tiling.dynamic_s2(item.data, settings.tiles, int(variant), settings.tile)
        else:
            pixels = tiling.dynamic(item.data, settings.min_tiles, int(variant), settings.tile)
        if not settings.static:  # what no patch covers
            pixels = pixels[:, : self._tower.pixels, : self._tower.pixels]
        info = {"tiles": len(pixels), "block": block, "lines": bool(variant) and settings.aspect == "dynamic"}
        return MediaFeature(
            modality=item.modality,
            num_tokens=sum(chain.from_iterable(self._layout.runs(info, item.modality))),
            tensors={"pixels": torch.from_numpy(np.require(pixels, requirements=("C", "W")))},
            info=info,
        )

    def expand(self, feature: MediaFeature) -> tuple[Sequence[int], Sequence[bool]]:
        """Placeholders of every tile, picture or frame, with the tokens that stand around them."""
        token = self._ids[feature.modality]
        start, end, sep = self._marks[feature.modality]
        after = end + self._line if feature.info["lines"] else end
        ids: list[int] = []
        mask: list[bool] = []
        for level in self._layout.runs(feature.info, feature.modality):
            for rows in level:
                ids += start + [token] * rows + after
                mask += [False] * len(start) + [True] * rows + [False] * len(after)
            ids += sep
            mask += [False] * len(sep)
        return tuple(ids), tuple(mask)

    def default_sampling(self) -> SamplingDefaults:
        """The token that ends an answer in the template."""
        stop = self.tokenizer.convert_tokens_to_ids(self._template.stop)
        known = isinstance(stop, int) and stop != self.tokenizer.unk_token_id
        return SamplingDefaults(stop_token_ids=(stop,) if known else ())

    def finish(self, text: str, token_ids: Sequence[int]) -> str:  # noqa: ARG002
        """The text as it is."""
        return text

    def _whole(self, image: Image.Image) -> tiling.Pixels:
        """A picture as one tile; with static S2 as large as that begins with."""
        settings = self.settings
        if settings.aspect == "pad":
            image = tiling.padded(image, settings.mean)
        bicubic = settings.aspect == "resize"  # all others leave it to the image processor
        resample = Image.Resampling.BICUBIC if bicubic else settings.resample
        return tiling.resized(image, settings.picture, settings.picture, resample)

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _line_ids(self) -> list[int]:
        """The tokens of the newline between two images in a prompt."""
        image = self._ids["image"]
        ids = self._tokens(f"{PLACEHOLDERS['image']}\n{PLACEHOLDERS['image']}")
        return ids[ids.index(image) + 1 : len(ids) - 1 - ids[::-1].index(image)]


def with_media_tokens(tokenizer: Any) -> Any:
    """The tokenizer, with the media tokens that it lacks: they have no embedding, and need none."""
    vocabulary = tokenizer.get_vocab()
    absent = [text for text in PLACEHOLDERS.values() if text not in vocabulary]
    if absent:
        tokenizer.add_tokens(absent, special_tokens=True)
    return tokenizer


def _bad(text: str) -> InvalidParamsError:
    return InvalidParamsError(f"mm_processor_kwargs: {text}", param="mm_processor_kwargs")


def _integer(kwargs: Mapping[str, Any], name: str, low: int, high: int) -> None:
    value = kwargs.get(name)
    if value is not None and (type(value) is not int or not low <= value <= high):
        raise _bad(f"{name} is a whole number from {low} to {high}.")
