"""A processor and a fusion without a model, for the input pipeline."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from mm_core.config import SamplingParams
from mm_core.errors import InvalidParamsError
from mm_core.hookspecs import MediaRequest, SamplingDefaults
from mm_core.inputs import InputPipeline
from mm_core.types import MediaFeature, MediaItem, PreparedRequest, TextPrompt
from support.tiny import make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()
PAD = TOKENIZER.convert_tokens_to_ids("<|image_pad|>")
VOCAB = len(TOKENIZER)


class StubProcessor:
    """Images become one row a 10 pixels of width; `prepare` is counted and may be held up or fail."""

    modalities = ("image",)
    settings_key = b""
    tokenizer = TOKENIZER

    def __init__(self) -> None:
        self.prepared: list[bytes] = []
        self.fault: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()

    def placeholder(self, modality: str) -> str:
        return "<|image_pad|>"

    def placeholder_id(self, modality: str) -> int:
        return int(PAD)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> str:
        parts = [p for m in messages for p in ([m["content"]] if isinstance(m["content"], str) else m["content"])]
        return "".join(p if isinstance(p, str) else p.get("text", "<|image_pad|>") for p in parts)

    def accepts_verbatim(self, prompt: str, counts: Mapping[str, int]) -> bool:
        return False

    def check_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        if set(kwargs) - {"size"}:
            raise InvalidParamsError("unknown option", param="mm_processor_kwargs")

    def variant(self, item: MediaItem, request: MediaRequest) -> bytes:
        return str(request.processor_kwargs.get("size", "")).encode()

    def prepare(self, item: MediaItem, variant: bytes) -> MediaFeature:
        self.prepared.append(item.digest)
        assert self.gate.wait(10)
        if self.fault is not None:
            raise self.fault
        pixels = torch.from_numpy(np.array(item.data))
        return MediaFeature("image", max(1, item.data.width // 10), {"pixels": pixels}, {"variant": variant})

    def expand(self, feature: MediaFeature) -> tuple[list[int], list[bool]]:
        return [PAD] * feature.num_tokens, [True] * feature.num_tokens

    def default_sampling(self) -> SamplingDefaults:
        return SamplingDefaults((7,))


class StubFusion:
    kind = "embed"
    given: Any = None

    def positions(self, token_ids: Sequence[int], ranges: Sequence[Any]) -> Any:
        return self.given


def picture(seed: int = 0, width: int = 20) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, width, 3), dtype=np.uint8))


def ask(value: Any, uuid: Any = None, **more: Any) -> TextPrompt:
    names = None if uuid is None else {"image": uuid}
    return TextPrompt(prompt="hello", multi_modal_data={"image": value}, multi_modal_uuids=names, **more)


def run(pipeline: InputPipeline, prompt: Any, **options: Any) -> PreparedRequest:
    return pipeline.submit("r", prompt, SamplingParams(), **options).result(10)
