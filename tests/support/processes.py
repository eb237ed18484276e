"""Engines whose core is in another process: starting them, and proof that nothing is held afterwards."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mm_core import Engine, KvCacheConfig, RequestOutput, SamplingParams

BLOCKS = 512
LONG = SamplingParams(max_tokens=3000, temperature=0, ignore_eos=True)


def start(path: Path, **options: Any) -> Engine:
    kv = KvCacheConfig(num_blocks=BLOCKS)
    return Engine.from_pretrained(path, kv_cache_config=kv, show_progress=False, engine_process=True, **options)


def open_files() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
        if target.startswith(("socket:", "/memfd:mm-core")):
            found.add(target)
    return found


def pid_of(engine: Engine) -> int:
    return int(engine.stats()["engine_process"]["pid"])


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> float:
    """Seconds until it holds."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds
        time.sleep(0.01)
    return time.monotonic() - begun


def settle(engine: Engine) -> None:
    """Nothing runs, no block is held, and the arena is empty."""
    engine.wait_idle()
    blocks = engine.stats()["blocks"]
    assert (blocks["in_use"], blocks["pending"]) == (0, 0), blocks
    wait_for(lambda: not engine.stats()["engine_process"]["arena"]["used"], 5)
    assert engine._frontend._live == {}


def same(one: RequestOutput, other: RequestOutput) -> None:
    """Answers that differ in nothing but when they came and what was cached."""
    assert one.prompt_token_ids == other.prompt_token_ids
    assert len(one.outputs) == len(other.outputs)
    for a, b in zip(one.outputs, other.outputs, strict=True):
        assert (a.text, a.token_ids, a.finish_reason, a.stop_reason) == (
            b.text,
            b.token_ids,
            b.finish_reason,
            b.stop_reason,
        )
        if a.logprobs is not None or b.logprobs is not None:
            assert a.logprobs is not None
            assert b.logprobs is not None
            for x, y in zip(a.logprobs, b.logprobs, strict=True):
                assert list(x) == list(y)
                assert [v.logprob for v in x.values()] == pytest.approx([v.logprob for v in y.values()], abs=1e-5)
