"""What tests of `engine.cache` share: pictures of one size, engines with little room, what requests cost."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mm_core import Engine, KvCacheConfig, RequestOutput
from support.e2e import GREEDY, settle
from support.pictures import picture

BLOCK = 16
TEXT = "The quick brown fox jumps over the lazy dog while the cat sleeps in the warm sun."


def shot(seed: int) -> Image.Image:
    """A picture of 64 rows."""
    return picture(seed, 224, 224)


ROWS, FEATURE = 64, 224 * 224 * 3  # of a shot: encoder rows, and bytes when it is preprocessed


def turn(item: Any = None, uuid: str | None = None, text: str = "What is this?", modality: str = "image") -> list[Any]:
    part = {"type": modality, modality: item} | ({} if uuid is None else {"uuid": uuid})
    return [{"role": "user", "content": [part, {"type": "text", "text": text}]}]


def start(path: Path, num_blocks: int = 256, tiers: dict[str, Any] | None = None, **options: Any) -> Engine:
    kv = KvCacheConfig(num_blocks=num_blocks, **tiers or {})
    return Engine.from_pretrained(path, kv_cache_config=kv, show_progress=False, **options)


def answer(engine: Engine, prompt: Any) -> RequestOutput:
    return (engine.chat if isinstance(prompt, list) else engine.generate)(prompt, GREEDY)[0]


def check(engine: Engine) -> None:
    settle(engine)
    engine._frontend._core.keeper.check_integrity()


@dataclass
class Work:
    """What a stretch of requests made the engine do."""

    encoded: int = 0
    prepared: int = 0
    cached: int = 0
    steps: int = 0


@contextmanager
def work(engine: Engine) -> Iterator[Work]:
    before, done = engine.stats(), Work()
    yield done
    after = engine.stats()
    done.encoded = after["encoder_calls"] - before["encoder_calls"]
    done.prepared = after["processor_cache"]["misses"] - before["processor_cache"]["misses"]
    done.cached = after["cached_tokens"] - before["cached_tokens"]
    done.steps = after["steps"] - before["steps"]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(image: Image.Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"


def flood(engine: Engine, first: int, count: int = 12) -> None:
    for seed in range(first, first + count):
        answer(engine, turn(shot(seed), text=f"Number {seed}?"))


SMALL: dict[str, Any] = {"num_blocks": 40, "encoder_cache_tokens": 4 * ROWS, "processor_cache_size": int(4.5 * FEATURE)}
