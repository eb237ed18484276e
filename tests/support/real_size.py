"""Checkpoint directories of real sizes without weights, for `load_format="dummy"`: those of `mm bench`."""

from __future__ import annotations

from pathlib import Path

from mm_core.bench.models import built_in_models, write_model
from mm_core.plugins import PluginRegistry


def make_dummy_qwen2vl(tmp_path: Path, size: str = "7b") -> Path:
    """Qwen2-VL-2B or -7B: config, preprocessing settings, and a byte-level tokenizer with the real special ids."""
    name = f"qwen2-vl-{size}"
    return write_model(built_in_models(PluginRegistry())[name], tmp_path / name)
