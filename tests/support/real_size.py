"""Checkpoint directories of real sizes without weights, for `load_format="dummy"`."""

from __future__ import annotations

import json
from pathlib import Path

from support.tiny import make_tiny_qwen2vl

_TEXT = {
    "2b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
           "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
}  # fmt: skip


def make_dummy_qwen2vl(tmp_path: Path, size: str = "7b") -> Path:
    """config.json of Qwen2-VL-2B or -7B with the tiny tokenizer; its ids lie inside the real vocabulary."""
    path = make_tiny_qwen2vl(tmp_path, "2", "hub")
    config = json.loads((path / "config.json").read_text())
    text = _TEXT[size]
    config |= text | {
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "torch_dtype": "bfloat16",
    }
    config["vision_config"] |= {
        "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "hidden_size": text["hidden_size"],
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    processor = json.loads((path / "preprocessor_config.json").read_text())
    processor |= {"min_pixels": 56 * 56, "max_pixels": 16384 * 28 * 28}
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    for weights in path.glob("*.safetensors*"):
        weights.unlink()
    return path
