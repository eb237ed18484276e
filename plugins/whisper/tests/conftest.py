"""Tiny checkpoints, made once a session, their engines and what transformers makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.tiny_whisper import WhisperReference, make_tiny_whisper

from mm_core import Engine, KvCacheConfig


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    root = tmp_path_factory.mktemp("whisper")
    return lambda **settings: make_tiny_whisper(root, **{"max_target_positions": 64, **settings})


@pytest.fixture(scope="session")
def reference(checkpoint: Callable[..., Path]) -> Callable[..., WhisperReference]:
    @cache
    def make(path: Path) -> WhisperReference:
        return WhisperReference(path)

    return lambda **settings: make(checkpoint(**settings))


@pytest.fixture(scope="session")
def engine(checkpoint: Callable[..., Path]) -> Iterator[Callable[..., Engine]]:
    made: dict[Path, Engine] = {}

    def make(**settings: Any) -> Engine:
        path = checkpoint(**settings)
        if path not in made:
            made[path] = Engine.from_pretrained(path, kv_cache_config=KvCacheConfig(num_blocks=1024))
        return made[path]

    yield make
    for each in made.values():
        each.close()
