"""mm-core: a multimodal inference engine whose model families are plugins.

Public names are imported on first use, so that `import mm_core.scheduler` does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mm_core.config import EngineConfig, KvCacheConfig, SamplingParams, StructuredOutput
    from mm_core.engine.async_engine import AsyncEngine
    from mm_core.engine.cache import CacheStats
    from mm_core.engine.engine import Engine
    from mm_core.engine.messages import LevelStats
    from mm_core.errors import BatchError, MMError
    from mm_core.hookspecs import hookimpl
    from mm_core.types import CacheEvent, CacheLookup, CompletionOutput, RequestOutput, TextPrompt

_HOMES = {
    "AsyncEngine": "engine.async_engine", "BatchError": "errors", "CacheEvent": "types", "CacheLookup": "types",
    "CacheStats": "engine.cache", "CompletionOutput": "types", "Engine": "engine.engine", "EngineConfig": "config",
    "KvCacheConfig": "config", "LevelStats": "engine.messages", "MMError": "errors", "RequestOutput": "types",
    "SamplingParams": "config", "StructuredOutput": "config", "TextPrompt": "types", "hookimpl": "hookspecs",
}  # fmt: skip
__all__ = [
    "AsyncEngine", "BatchError", "CacheEvent", "CacheLookup", "CacheStats", "CompletionOutput", "Engine",
    "EngineConfig", "KvCacheConfig", "LevelStats", "MMError", "RequestOutput", "SamplingParams", "StructuredOutput",
    "TextPrompt", "__version__", "hookimpl",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mm_core' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mm_core.{_HOMES[name]}"), name)
