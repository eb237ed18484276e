"""Tiny checkpoints, their transformers references and their engines, made once a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from support.reference import Reference
from support.tiny import make_tiny_qwen2vl

from mm_core import Engine, KvCacheConfig

Key = tuple[str, str, bool]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    root = tmp_path_factory.mktemp("tiny")

    @cache
    def make(version: str = "2", layout: str = "hub", tied: bool = True) -> Path:
        return make_tiny_qwen2vl(root, version=version, layout=layout, tied=tied)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def reference(checkpoint: Callable[..., Path]) -> Callable[..., Reference]:
    @cache
    def make(version: str = "2", layout: str = "hub", tied: bool = True) -> Reference:
        return Reference(checkpoint(version, layout, tied))

    return make


@pytest.fixture(scope="session")
def engine(checkpoint: Callable[..., Path]) -> Iterator[Callable[..., Engine]]:
    made: dict[Key, Engine] = {}

    def make(version: str = "2", layout: str = "hub", tied: bool = True) -> Engine:
        key = (version, layout, tied)
        if key not in made:
            path = checkpoint(*key)
            made[key] = Engine.from_pretrained(path, kv_cache_config=KvCacheConfig(num_blocks=512))
        return made[key]

    yield make
    for e in made.values():
        e.close()
