"""Text and pixels to features."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from PIL import Image

from mm_core.errors import InvalidParamsError, InvalidPromptError, PluginError
from mm_core.hookspecs import Checkpoint, MediaRequest, SamplingDefaults
from mm_core.media import VideoSampling
from mm_core.types import MediaFeature, MediaItem, Modality
from mm_plugin_llava.config import LlavaConfig
from mm_plugin_llava.layout import Layout, frames_layout, grid_layout
from mm_plugin_llava.pictures import PictureSettings, best_resolution, stack
from mm_plugin_llava.templates import chat_template

MAX_FRAMES = 768
MAX_FPS = 240.0
ONE_OF_SEVERAL = b"one of several"


class LlavaProcessor:
    """`hookspecs.Processor` of the family. Only OneVision reads video.

    `mm_processor_kwargs`, for video: `fps` or `num_frames`, the frames to keep; without them all are kept,
    unless the checkpoint says otherwise.
    """

    start_chat = True  # the published templates leave the start token to the tokenizer

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tokenizer: Any = checkpoint.tokenizer
        self.config = LlavaConfig.from_checkpoint(checkpoint)
        self._settings = read_settings(checkpoint, self.config)
        self.modalities: tuple[Modality, ...] = tuple(self._settings)
        self._template = chat_template(checkpoint, self.config.text_type)
        start = self.tokenizer.bos_token or ""
        self._start = start if "bos_token" in self._template or start in self._template else ""
        own = checkpoint.processor_config.get("processor", {})
        names = {m: f"{m}_token" for m in self.modalities}
        self._texts = {m: getattr(self.tokenizer, n, None) or own.get(n) or f"<{m}>" for m, n in names.items()}
        self._ids = {m: _token_id(self.tokenizer, text) for m, text in self._texts.items()}
        self._sampling = _sampling(checkpoint.processor_config.get("video_processor", {}))
        # Enters every media key, as the checkpoint's identity does not cover its processor settings.
        self.settings_key = json.dumps({m: asdict(s) for m, s in self._settings.items()}, sort_keys=True).encode()

    def placeholder(self, modality: Modality) -> str:
        """`<image>` or `<video>`."""
        return str(self._texts[modality])

    def placeholder_id(self, modality: Modality) -> int:
        """The token id of `placeholder(modality)`."""
        return self._ids[modality]

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Messages to a prompt, by the checkpoint's template; the family's templates read lists of parts.

        Without the start token, where the template writes one: the tokenizer puts it there."""
        import jinja2

        listed = [{**m, "content": _as_parts(m["content"])} for m in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                listed, chat_template=self._template, tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as error:
            raise InvalidPromptError(
                "The model's chat template refuses these messages. Check the order of roles and the content parts.",
                param="messages",
            ) from error
        return str(text).removeprefix(self._start)

    def accepts_verbatim(self, prompt: str, counts: Mapping[Modality, int]) -> bool:  # noqa: ARG002
        """False: media need their placeholders."""
        return False

    def check_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        """Raise InvalidParamsError for an unknown, ill-typed or out-of-range entry."""
        self._request_sampling(kwargs)

    def video_sampling(self, request: MediaRequest) -> VideoSampling:
        """Which frames of a video this request keeps."""
        return self._request_sampling(request.processor_kwargs)

    def variant(self, item: MediaItem, request: MediaRequest) -> bytes:
        """OneVision cuts a picture to tiles only where it is the request's only one."""
        several = request.counts.get("image", 0) > 1
        return ONE_OF_SEVERAL if self.config.most_tiles and item.modality == "image" and several else b""

    def prepare(self, item: MediaItem, variant: bytes) -> MediaFeature:
        """`pixels` uint8 [tiles, S, S, 3]; info: the `Layout`.

        Raises MediaDecodeError (code "image_aspect") for extremely elongated pictures.
        """
        settings, config = self._settings[item.modality], self.config
        if item.modality == "video":
            tiles = [settings.plain(Image.fromarray(frame)) for frame in item.data]
            layout = frames_layout(len(tiles), config.tower.side)
        elif config.tiled and not variant:
            size = (item.data.height, item.data.width)
            best = best_resolution(size, settings.pinpoints)
            tiles = settings.tiles(item.data, best)
            grid = (best[0] // config.tower.image_size, best[1] // config.tower.image_size)
            layout = grid_layout(size, grid, config.tower.side, config.most_tiles)
        else:
            tiles = [settings.plain(settings.squared(item.data))]
            layout = Layout("base" if config.tiled else "tile", 1)
        return MediaFeature(
            modality=item.modality,
            num_tokens=layout.num_rows(config.tile_rows),
            tensors={"pixels": torch.from_numpy(stack(tiles, config.tower.pixels))},
            info=layout.as_info(),
        )

    def expand(self, feature: MediaFeature) -> tuple[Sequence[int], Sequence[bool]]:
        """`num_tokens` placeholder ids, each of which takes a row."""
        return (self._ids[feature.modality],) * feature.num_tokens, (True,) * feature.num_tokens

    def default_sampling(self) -> SamplingDefaults:
        """Nothing: the checkpoint's stop ids are complete."""
        return SamplingDefaults()

    def finish(self, text: str, token_ids: Sequence[int]) -> str:  # noqa: ARG002
        """The text as it is."""
        return text

    def _request_sampling(self, kwargs: Mapping[str, Any]) -> VideoSampling:
        """The checkpoint's frame sampling with a request's overrides, checked."""
        known = ("fps", "num_frames") if "video" in self.modalities else ()
        for name in kwargs:
            if name not in known:
                raise _bad(f"{name!r} is not an option of this model. Options: {', '.join(known) or 'none'}.")
        fps, count = kwargs.get("fps"), kwargs.get("num_frames")
        if fps is not None and count is not None:
            raise _bad("fps and num_frames exclude each other. Pass one of them.")
        if fps is not None and not (type(fps) in (int, float) and 0 < fps <= MAX_FPS):  # so that NaN fails
            raise _bad(f"fps is not a number above 0 and up to {MAX_FPS:g}.")
        if count is not None and not (type(count) is int and 1 <= count <= MAX_FRAMES):
            raise _bad(f"num_frames is not a whole number from 1 to {MAX_FRAMES}.")
        if fps is None and count is None:
            return self._sampling
        return replace(self._sampling, fps=None if fps is None else float(fps), num_frames=count, given_frames=True)


def read_settings(checkpoint: Checkpoint, config: LlavaConfig) -> dict[Modality, PictureSettings]:
    """The settings of each modality that the model reads. Raises CheckpointError where they make no sense."""
    parts = checkpoint.processor_config
    image = parts.get("image_processor", {})
    found: dict[Modality, PictureSettings] = {"image": PictureSettings.from_config(image, config.kind)}
    if config.kind == "llava_onevision":
        # The images' where a checkpoint has none for videos, as in transformers.
        video = parts.get("video_processor") or image
        found["video"] = PictureSettings.from_config(video, config.kind, video=True)
    for modality, settings in found.items():
        settings.check(config.tower.image_size, tiled=config.tiled and modality == "image")
    return found


def _sampling(part: Mapping[str, Any]) -> VideoSampling:
    """All frames, unless the checkpoint's settings sample them."""
    sampled = part.get("do_sample_frames", False)
    count, fps = (part.get(name) if sampled else None for name in ("num_frames", "fps"))
    return VideoSampling(fps=None if count else fps, num_frames=count, min_frames=1, temporal_patch_size=1)


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _token_id(tokenizer: Any, text: str) -> int:
    found = tokenizer.convert_tokens_to_ids(text)
    if not isinstance(found, int) or found == getattr(tokenizer, "unk_token_id", None):
        raise PluginError(
            f"The tokenizer of this checkpoint has no {text!r}, which llava needs. Take the tokenizer files of a "
            "LLaVA checkpoint in the transformers format."
        )
    return found


def _bad(text: str) -> InvalidParamsError:
    return InvalidParamsError(f"mm_processor_kwargs: {text}", param="mm_processor_kwargs")
