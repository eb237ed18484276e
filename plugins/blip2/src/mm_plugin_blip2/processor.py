"""Text and pixels to features."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from mm_core.errors import CheckpointError, InvalidParamsError
from mm_core.hookspecs import Checkpoint, MediaRequest, SamplingDefaults
from mm_core.media import Normalisation, resize_image
from mm_core.types import MediaFeature, MediaItem, Modality
from mm_plugin_blip2.vision import EvaConfig

IMAGE = "<image>"
_VOCABULARIES = {"opt": 50272, "t5": 32128, "llama": 32000}  # transformers' defaults
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Settings:
    """How pictures are made ready. side: of the square they are resized to, whatever their shape."""

    side: int
    resample: int
    norm: Normalisation


def read_settings(checkpoint: Checkpoint, vision: EvaConfig) -> Settings:
    """From the checkpoint; what is missing takes the defaults of transformers' BlipImageProcessor."""
    part = checkpoint.processor_config.get("image_processor", {})
    for switch in ("do_resize", "do_rescale", "do_normalize"):
        if part.get(switch, True) is not True:
            raise CheckpointError(f"The image processor setting {switch}={part[switch]!r} is not supported: want true.")
    size = part.get("size") or {}
    sides = {size} if isinstance(size, int) else {size.get("height", 384), size.get("width", 384)}
    if sides != {vision.image_size}:
        raise CheckpointError(
            f"The image processor makes pictures of {sorted(map(str, sides))} pixels a side, the vision tower reads "
            f"{vision.image_size}. Fetch preprocessor_config.json again."
        )
    mean, std = (tuple(part.get(key) or default) for key, default in (("image_mean", _MEAN), ("image_std", _STD)))
    norm = Normalisation(mean, std, float(part.get("rescale_factor", 1 / 255)))
    return Settings(vision.image_size, int(part.get("resample", 3)), norm)


class Blip2Processor:
    """`hookspecs.Processor` of the family. One picture a request; there are no `mm_processor_kwargs`.

    A prompt without `<image>` is complete: the picture comes before all of it, as the models were trained.
    """

    modalities: tuple[Modality, ...] = ("image",)
    limits: Mapping[Modality, int] = {"image": 1}

    def __init__(self, checkpoint: Checkpoint) -> None:
        config, text = checkpoint.config, checkpoint.config.get("text_config") or {}
        self.tokenizer: Any = checkpoint.tokenizer
        self._vision = EvaConfig.from_config(config.get("vision_config") or {})
        self._settings = read_settings(checkpoint, self._vision)
        self._queries: int = config.get("num_query_tokens", 32)
        self._conditioned = config.get("model_type") == "instructblip"
        size: int = text.get("vocab_size") or _VOCABULARIES.get(text.get("model_type", "opt"), 0)
        self._id = _image_id(self.tokenizer, size)
        named = (config.get("image_token_index"), self._id, text.get("pad_token_id"))
        # Rows take its place, whatever it is, but it has to have an embedding.
        self._expanded = next((i for i in named if isinstance(i, int) and 0 <= i < size), 0)
        self._chat = _around(self.tokenizer, self._id)
        stop = text.get("eos_token_id")  # generation_config.json names another one
        self._stop = tuple(stop) if isinstance(stop, list) else (stop,) if isinstance(stop, int) else ()
        # Enters every media key, as the checkpoint's identity does not cover its processor settings.
        self.settings_key = json.dumps(asdict(self._settings), sort_keys=True).encode()

    def placeholder(self, modality: Modality) -> str | None:  # noqa: ARG002
        """`<image>`; None for old checkpoints whose vocabulary has no room for it."""
        return None if self._id is None else IMAGE

    def placeholder_id(self, modality: Modality) -> int | None:  # noqa: ARG002
        """The token id of `<image>`, or None."""
        return self._id

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The picture, then all texts as they are, one a line: the models know no roles."""
        texts: list[str] = []
        pictures = 0
        for message in messages:
            content = message["content"]
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part["type"] == "text":
                    texts.append(part["text"])
                else:
                    pictures += 1
        before, after = self._chat
        return IMAGE * pictures + before + "\n".join(texts) + after

    def accepts_verbatim(self, prompt: str, counts: Mapping[Modality, int]) -> bool:  # noqa: ARG002
        """True: text and a picture are all there is."""
        return True

    def check_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        """Raise InvalidParamsError for any entry."""
        for name in kwargs:
            raise InvalidParamsError(
                f"mm_processor_kwargs: {name!r} is not an option of this model, which has none. Leave it out.",
                param="mm_processor_kwargs",
            )

    def variant(self, item: MediaItem, request: MediaRequest) -> bytes:  # noqa: ARG002
        """Empty: nothing of a request changes a picture's features."""
        return b""

    def prepare(self, item: MediaItem, variant: bytes) -> MediaFeature:  # noqa: ARG002
        """`pixels` uint8 [1, side, side, 3], less what no patch covers."""
        side, covered = self._settings.side, self._vision.pixels
        resized = resize_image(item.data, side, side, self._settings.resample)
        pixels = np.array(resized[None, :covered, :covered])  # torch wants one that may be written to
        return MediaFeature(
            modality="image",
            num_tokens=self._vision.num_tokens if self._conditioned else self._queries,
            tensors={"pixels": torch.from_numpy(pixels)},
            num_fused=self._queries if self._conditioned else None,
        )

    def expand(self, feature: MediaFeature) -> tuple[Sequence[int], Sequence[bool]]:
        """An id for each of the Q-Former's queries."""
        return (self._expanded,) * feature.num_placed, (True,) * feature.num_placed

    def default_sampling(self) -> SamplingDefaults:
        """The language model's own stop ids."""
        return SamplingDefaults(stop_token_ids=self._stop)

    def finish(self, text: str, token_ids: Sequence[int]) -> str:  # noqa: ARG002
        """The text as it is."""
        return text


def _image_id(tokenizer: Any, vocab_size: int) -> int | None:
    """The id of `<image>`, which old checkpoints lack: added then, as transformers does, where there is a row."""
    found: int | None = tokenizer.get_vocab().get(IMAGE)
    if found is None and len(tokenizer) < vocab_size:
        from tokenizers import AddedToken

        tokenizer.add_tokens([AddedToken(IMAGE, normalized=False, special=True)], special_tokens=True)
        found = tokenizer.get_vocab()[IMAGE]
    return found


def _around(tokenizer: Any, image_id: int | None) -> tuple[str, str]:
    """What stands before and after a text so that, behind `<image>` and without anything added, it has the ids that
    the tokenizer gives it alone."""

    def encode(text: str, *, alone: bool) -> list[int]:
        ids: list[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=alone).ids
        return ids

    word = "a"
    wanted, plain = encode(word, alone=True), encode(word, alone=False)
    start = next((i for i in range(len(wanted)) if wanted[i : i + len(plain)] == plain), 0)
    before, after = (
        "".join(tokenizer.convert_ids_to_tokens(ids)) for ids in (wanted[:start], wanted[start + len(plain) :])
    )
    head = [] if image_id is None else [image_id]
    # Some tokenizers put a space before the first word of a text only.
    for space in ("", " "):
        text = (IMAGE if head else "") + before + space + word + after
        if encode(text, alone=False) == head + wanted:
            return before + space, after
    return before, after
