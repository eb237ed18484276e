"""The family climbs the conformance ladder: every kind, tower, text model and layout against transformers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import ClassVar

from support.tiny_llava import Reference, Tiny

from mm_core.testing import Answer, Case, Conformance, clip, picture

TURN = "USER: <image>\ndescribe the picture ASSISTANT:"
PAIR = "USER: <image>\n<image>\nthe quick brown fox ASSISTANT:"
ONE = Case("one", TURN, {"image": picture(1, 150, 100)})
TWO = Case("two", PAIR, {"image": [picture(2, 90, 160), picture(3, 61, 47)]})
SIZES = tuple(
    Case(f"{width}x{height}", TURN, {"image": picture(width, width, height)})
    for width, height in ((1, 1), (8192, 1), (20, 300), (201, 77), (38, 38), (400, 390))
)
CLIP = Case("clip", "<video>\nwhat is in it", {"video": clip(5, 3)})
MIXED = Case(
    "mixed",
    "<video>the fox<image>jumps<video>",
    {"image": picture(6, 120, 80), "video": [clip(7, 2), clip(8, 2, 50, 90)]},
)
TEXT = Case("text", "the quick brown fox")


class Kit(Conformance):
    """Only what differs between checkpoints runs on each; one of a kind climbs the whole ladder."""

    tiny: ClassVar[Tiny] = Tiny()
    cases = (ONE, TWO)
    rungs = ("parity",)
    num_blocks = 512

    def checkpoint(self, directory: Path) -> Path:
        return self.tiny.write(directory)

    def reference(self, path: Path, case: Case) -> Answer:
        clips = [video["frames"] for video in case.items.get("video", [])]
        return _reference(path).answer(str(case.prompt), case.items.get("image", []), clips, self.max_tokens)


@cache
def _reference(path: Path) -> Reference:
    return Reference(path)


class TestLlava(Kit):
    tiny = Tiny(seed=1)
    rungs = Conformance.rungs
    cases = (ONE, TWO, TEXT)


class TestNext(Kit):
    tiny = Tiny("llava_next", pictures="LlavaNext", seed=21)
    rungs = Conformance.rungs
    cases = (ONE, TWO, *SIZES)


class TestOnevision(Kit):
    tiny = Tiny(
        "llava_onevision", "siglip", "qwen2", "LlavaOnevision", config={"vision_aspect_ratio": "anyres_max_2"}, seed=1
    )
    rungs = Conformance.rungs
    cases = (ONE, TWO, CLIP, MIXED, *SIZES)


class TestMistralAndOtherNames(Kit):
    tiny = Tiny(text="mistral", layout="tf4", config={"vision_feature_layer": [1, -1]})


class TestMistralNext(Kit):
    tiny = Tiny(
        "llava_next",
        text="mistral",
        pictures="LlavaNext",
        layout="tf5",
        config={"vision_feature_layer": [0, -2]},
        seed=1,
    )


class TestSiglipQwen(Kit):
    tiny = Tiny(
        tower="siglip",
        text="qwen2",
        pictures="Siglip",
        layout="tf5",
        config={"vision_feature_select_strategy": "full", "vision_feature_layer": -1, "projector_hidden_act": "relu"},
        seed=2,
    )


class TestSiglipWithoutItsFirstRow(Kit):
    """The default strategy drops the first row, whatever it is."""

    tiny = Tiny(tower="siglip", pictures="Siglip", config={"multimodal_projector_bias": False})


class TestClassTokenKept(Kit):
    tiny = Tiny(layout="tf5", pictures="Llava", config={"vision_feature_select_strategy": "full"}, seed=2)
    cases = (ONE, TWO, Case("tall", TURN, {"image": picture(4, 20, 300)}))


class TestNextWithSiglip(Kit):
    tiny = Tiny("llava_next", "siglip", "qwen2", "LlavaNext", "tf4", {"vision_feature_select_strategy": "full"}, seed=1)


class TestTiedOnevision(Kit):
    """Tied in the text model's settings only, as small checkpoints are; maps are not shrunk."""

    tiny = Tiny(
        "llava_onevision", "siglip", "qwen2", "LlavaOnevision", config={"tie_word_embeddings": False}, tied=True, seed=1
    )
    cases = (ONE, TWO, MIXED)


class TestOnevisionWithClip(Kit):
    tiny = Tiny(
        "llava_onevision",
        text="llama",
        pictures="LlavaOnevision",
        layout="tf4",
        config={
            "vision_aspect_ratio": "anyres_max_1",
            "vision_feature_select_strategy": "default",
            "vision_feature_layer": -2,
        },
    )
    cases = (ONE, TWO, CLIP)
