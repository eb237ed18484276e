"""The conformance kit on the three kinds of checkpoints, against the written reference."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from support.tiny_vila import LITE, S2, STATIC, Tiny
from support.vila_reference import VilaReference

from mm_core.testing import Answer, Case, Conformance, clip, picture


def turn(text: str) -> str:
    return (
        "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
        f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    )


@cache
def reference(path: Path) -> VilaReference:
    return VilaReference(path)


class Vila(Conformance):
    tiny: Tiny
    cases = (
        Case("one image", turn("<image>Describe this image."), {"image": picture(1, 150, 90)}),
        Case("two images", turn("<image>What is<image> in it?"), {"image": [picture(2, 40, 90), picture(3)]}),
        Case("video", turn("<vila/video>What is in it?"), {"video": clip(4, 6)}),
    )

    def checkpoint(self, directory: Path) -> Path:
        return self.tiny.write(directory)

    def reference(self, path: Path, case: Case) -> Answer:
        items = case.items
        videos = [v["frames"] for v in items.get("video", ())]
        assert isinstance(case.prompt, str)
        return reference(path).answer(case.prompt, items.get("image", ()), videos, max_tokens=self.max_tokens)


class TestNvila(Vila):
    tiny = Tiny(S2)


@pytest.mark.slow
class TestNvilaLite(Vila):
    tiny = Tiny(LITE, "mlp_downsample_3x3_fix", "hf", "NVILALiteForConditionalGeneration")


class TestVila15(Vila):
    tiny = Tiny({**STATIC, "num_video_frames": 4}, "mlp2x_gelu", "flat", "VILAForConditionalGeneration", size=56)
