"""A tiny checkpoint of every family, and prompts with media for it: what tests ask that concern them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from mm_core import TextPrompt
from mm_core.testing import frames, picture
from support.tiny_blip2 import make_tiny_blip2
from support.tiny_nougat import make_tiny_nougat
from support.tiny_whisper import make_tiny_whisper, sound

HEARD = "<|startoftranscript|><|{}|><|transcribe|><|notimestamps|>"


@dataclass(frozen=True)
class TinyFamily:
    """make: writes the checkpoint into a directory, and gives its path. prompts: of a seed, all of them different
    ones for another seed."""

    plugin: str
    make: Callable[[Path], Path]
    prompts: Callable[[int], list[TextPrompt]]

    def modules(self) -> list[Any]:
        """The plugin, imported, for `plugins=` of an engine."""
        return [import_module(f"mm_plugin_{self.plugin}")]


def ask(text: str, **media: Any) -> TextPrompt:
    """A prompt with media by modality."""
    return TextPrompt(prompt=text, multi_modal_data=media)


def _llava(**settings: Any) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        return import_module("support.tiny_llava").Tiny(**settings).write(path)

    return make


def _vila(config: str, **settings: Any) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        module = import_module("support.tiny_vila")
        return module.Tiny(getattr(module, config), **settings).write(path)

    return make


def _with_pictures(seed: int) -> list[TextPrompt]:
    return [
        ask("<image> what is it", image=picture(seed, 70, 90)),
        ask("<image> the <image> fox", image=[picture(seed + 1, 100, 40), picture(seed + 2, 38, 38)]),
        ask("Describe this image.<image>", image=picture(seed, 70, 90)),
    ]


def _with_video(seed: int) -> list[TextPrompt]:
    clip = {"frames": frames(seed + 3, 4), "fps": 2.0}
    return [*_with_pictures(seed)[:2], ask("<video> what is there to see", video=clip)]


def _questions(seed: int) -> list[TextPrompt]:
    return [
        ask("Question: what is in the picture? Answer:", image=picture(seed, 100, 80)),
        ask("How many cats are there?", image=picture(seed + 1, 56, 56)),
        ask("Describe this image.", image=picture(seed, 100, 80)),
    ]


def _pages(seed: int) -> list[TextPrompt]:
    return [ask("", image=picture(seed + i, 150, 100 + 10 * i)) for i in range(3)]


def _sounds(seed: int) -> list[TextPrompt]:
    return [
        ask(HEARD.format(language), audio=(sound(seconds, seed + i), 16000))
        for i, (language, seconds) in enumerate((("en", 2.3), ("de", 7.1), ("fr", 0.4)))
    ]


FAMILIES = {
    "llava": TinyFamily("llava", _llava(config={"vision_feature_layer": -1}, seed=1), _with_pictures),
    "llava-next": TinyFamily("llava", _llava(kind="llava_next", pictures="LlavaNext", seed=21), _with_pictures),
    "llava-onevision": TinyFamily(
        "llava",
        _llava(kind="llava_onevision", tower="siglip", text="qwen2", pictures="LlavaOnevision", seed=1),
        _with_video,
    ),
    "nvila": TinyFamily("nvila", _vila(config="S2"), _with_video),
    "vila": TinyFamily("nvila", _vila(config="STATIC", layout="paths", size=56), _with_pictures),
    "blip2-opt": TinyFamily("blip2", lambda path: make_tiny_blip2(path, "blip2", "opt"), _questions),
    "blip2-t5": TinyFamily("blip2", lambda path: make_tiny_blip2(path, "blip2", "t5"), _questions),
    "instructblip": TinyFamily("blip2", lambda path: make_tiny_blip2(path, "instructblip", "llama"), _questions),
    "instructblip-t5": TinyFamily("blip2", lambda path: make_tiny_blip2(path, "instructblip", "t5"), _questions),
    "whisper": TinyFamily("whisper", make_tiny_whisper, _sounds),
    "nougat": TinyFamily(
        "nougat", lambda path: make_tiny_nougat(path, width=64, depths=[2, 2, 2], num_heads=[2, 4, 8]), _pages
    ),
}
"""By name. Some have more layers and stages than take part while kernels are compiled ahead."""
