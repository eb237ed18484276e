"""One tiny checkpoint a session; one engine a module, unless the module makes its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny import make_tiny_qwen2vl

from mm_core import Engine, KvCacheConfig


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen2vl(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(tiny_path: Path) -> Iterator[Engine]:
    kv = KvCacheConfig(num_blocks=512)
    with Engine.from_pretrained(tiny_path, kv_cache_config=kv, show_progress=False) as made:
        yield made
