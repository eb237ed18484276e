"""The conformance kit on tiny random checkpoints of both versions, beside transformers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from support.reference import Reference
from support.tiny import make_tiny_qwen2vl
from support.video import reference_video

from mm_core.testing import Answer, Case, Conformance, clip, picture

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


def turn(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


reference_of = cache(Reference)


class TestQwen2VL(Conformance):
    version: ClassVar[Any] = "2"
    other_kwargs: ClassVar[Any] = {"max_pixels": 56 * 56}
    cases = (
        Case("image", turn(f"{IMAGE}Describe this image."), {"image": picture(1, 150, 100)}),
        Case("two images", turn(f"{IMAGE}And{IMAGE}this?"), {"image": [picture(2, 120, 90), picture(3, 84, 140)]}),
        Case("video", turn(f"{VIDEO}What happens?"), {"video": clip(4, 5)}),
        Case("image and video", f"{VIDEO}Describe{IMAGE} this.", {"image": picture(5), "video": clip(6, 4)}),
        Case("text", "The quick brown fox jumps over the lazy"),
    )

    def checkpoint(self, directory: Path) -> Path:
        return make_tiny_qwen2vl(directory, version=self.version)

    def reference(self, path: Path, case: Case) -> Answer:
        videos = [reference_video(v["frames"], fps=v["fps"]) for v in case.items.get("video", [])]
        found = reference_of(path).generate(str(case.prompt), case.items.get("image", []), videos, self.max_tokens)
        return Answer(found.token_ids, found.logits, found.prompt_ids)


class TestQwen25VL(TestQwen2VL):
    version: ClassVar[Any] = "2.5"
