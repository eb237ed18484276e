"""What end-to-end tests share: the canary request, and proof that nothing is held after a request."""

from __future__ import annotations

import os
import re
from typing import Any

from mm_core import AsyncEngine, Engine, MMError, RequestOutput, SamplingParams, TextPrompt
from support.pictures import picture

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
GREEDY = SamplingParams(max_tokens=8, temperature=0)
# What an error text must never hold: addresses, traces, where our code or site-packages lie.
LEAKS = re.compile(r"0x[0-9a-fA-F]{6,}|Traceback|site-packages|/mm_core/|/core/src|\.py\b")


def turn(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def ask(image: Any = None, text: str = "Describe this image.", uuid: str | None = None, **more: Any) -> TextPrompt:
    """A prompt about one picture; `image=None` with a uuid stands for a picture given before."""
    named = {} if uuid is None else {"multi_modal_uuids": {"image": [uuid]}}
    return TextPrompt(prompt=turn(IMAGE + text), multi_modal_data={"image": [image]}, **named, **more)


def settle(engine: Engine | AsyncEngine) -> dict[str, int]:
    """Wait until nothing runs; fail if a block, an encoder row or a request is still held. Returns block counts."""
    frontend = engine._frontend
    Engine(frontend).wait_idle()
    blocks: dict[str, int] = frontend.stats()["blocks"]
    assert (blocks["in_use"], blocks["pending"]) == (0, 0), blocks
    assert sum(blocks.values()) == frontend._core.scheduler.pool.num_blocks
    assert frontend._live == {}
    frontend._core.scheduler.check_integrity()
    frontend._core.scheduler.encoder_cache.check_integrity(set())
    return blocks


def check_message(error: MMError) -> None:
    """The text tells something, and nothing about our insides."""
    text = str(error)
    assert len(text) > 20
    assert not LEAKS.search(text), text
    assert len(text) < 1000, "an error must not echo its input at length"


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


class Canary:
    """A request with a picture whose tokens must never change, whatever happened in between."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.prompt = ask(picture(99, 84, 56), "What is in the picture?")
        self.wanted = self._ask().token_ids
        assert len(set(self.wanted)) > 3
        settle(engine)
        self.files = open_files()

    def _ask(self) -> RequestOutput:
        return self.engine.generate(self.prompt, GREEDY)[0]

    def check(self) -> None:
        assert self._ask().token_ids == self.wanted
        settle(self.engine)
        assert open_files() <= self.files, "a file handle leaked"
