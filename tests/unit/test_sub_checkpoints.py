"""Checkpoints that are kept in parts: folders with a config.json and weights of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.tiny import make_tiny_tokenizer
from torch import nn

from mm_core.checkpoint import load_weights, open_checkpoint
from mm_core.checkpoint.files import find_tensors
from mm_core.checkpoint.staging import pieces
from mm_core.errors import CheckpointError
from mm_core.hookspecs import WeightMap

TEXT = {"model_type": "qwen2", "hidden_size": 8, "rope_theta": 500.0, "tie_word_embeddings": False, "dtype": "float16"}


def write(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture(params=["settings", "paths"])
def path(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Two parts with weights, the first in two files, and one that has none."""
    parts: dict[str, dict[str, Any]] = {"llm": TEXT, "tower": {"image_size": 28}, "neck": {"kind": "identity"}}
    given = {f"{n}_cfg": s if request.param == "settings" else f"/home/somebody/m/{n}" for n, s in parts.items()}
    write(
        tmp_path / "config.json", {"architectures": ["X"], "tie_word_embeddings": True, **given, "auto_map": {"a": "b"}}
    )
    for name, settings in parts.items():
        write(tmp_path / name / "config.json", {**settings, "auto_map": {"a": "b"}})
    files = {"model-1.safetensors": {"a": torch.ones(2)}, "model-2.safetensors": {"b": torch.full((3,), 2.0)}}
    for file, tensors in files.items():
        save_file(tensors, tmp_path / "llm" / file)
    index = {name: file for file, tensors in files.items() for name in tensors}
    write(tmp_path / "llm" / "model.safetensors.index.json", {"weight_map": index})
    save_file({"a": torch.full((4,), 3.0)}, tmp_path / "tower" / "model.safetensors")
    write(tmp_path / "llm" / "generation_config.json", {"eos_token_id": 7})
    write(tmp_path / "tower" / "preprocessor_config.json", {"image_mean": [0.5]})
    make_tiny_tokenizer().save_pretrained(tmp_path / "llm")
    return tmp_path


def test_settings_come_from_the_parts(path: Path) -> None:
    found = open_checkpoint(str(path))
    assert {part: folder.name for part, folder in found.parts.items()} == {n: n for n in ("llm", "tower", "neck")}
    assert found.config["tower_cfg"] == {"image_size": 28}
    assert (found.text_config["hidden_size"], found.text_config["rope_theta"]) == (8, 500.0)
    assert found.text_config["tie_word_embeddings"] is False, "the language model knows best"
    assert found.generation_config == {"eos_token_id": 7}
    assert found.processor_config == {"image_processor": {"image_mean": [0.5]}}
    assert len(found.tokenizer) > 100


def test_the_checkpoints_own_files_come_first(path: Path) -> None:
    write(path / "generation_config.json", {"eos_token_id": 9})
    write(path / "preprocessor_config.json", {"image_mean": [0.1]})
    found = open_checkpoint(str(path))
    assert found.generation_config == {"eos_token_id": 9}
    assert found.processor_config == {"image_processor": {"image_mean": [0.1]}}


def test_weights_of_all_parts(path: Path) -> None:
    found = open_checkpoint(str(path))
    tensors = find_tensors(found.name, found.path, found.parts)
    assert {name: info.stored_name for name, info in tensors.items()} == {"llm.a": "a", "llm.b": "b", "tower.a": "a"}
    assert {p.tensor.name for p in pieces(tensors.values(), 1024)} == set(tensors)
    module = nn.ParameterDict({"x": nn.Parameter(torch.zeros(2)), "y": nn.Parameter(torch.zeros(3))})
    tower = nn.ParameterDict({"a": nn.Parameter(torch.zeros(4))})
    maps = WeightMap(rename=((r"llm\.a", "x"), (r"llm\.b", "y"))), WeightMap(rename=((r"tower\.", ""),))
    load_weights(found, list(zip((module, tower), maps, strict=True)), show_progress=False)
    assert (module["x"].tolist(), module["y"].tolist(), tower["a"].tolist()) == ([1.0] * 2, [2.0] * 3, [3.0] * 4)


def test_identity_covers_the_parts(path: Path) -> None:
    before = open_checkpoint(str(path)).identity
    assert open_checkpoint(str(path)).identity == before
    save_file({"a": torch.full((4,), 4.0)}, path / "tower" / "model.safetensors")
    changed = open_checkpoint(str(path)).identity
    assert changed != before
    write(path / "neck" / "config.json", {"kind": "other"})
    assert open_checkpoint(str(path)).identity != changed


def test_absent_shards_are_named_with_their_part(path: Path) -> None:
    (path / "llm" / "model-2.safetensors").unlink()
    found = open_checkpoint(str(path))
    with pytest.raises(CheckpointError, match=r"/llm': .*model-2\.safetensors"):
        find_tensors(found.name, found.path, found.parts)


def test_weights_beside_config_json_count_alone(path: Path) -> None:
    save_file({"c": torch.ones(2)}, path / "model.safetensors")
    found = open_checkpoint(str(path))
    assert found.parts == {}
    assert set(find_tensors(found.name, found.path, found.parts)) == {"c"}


@pytest.mark.parametrize("value", ["..", "/etc", "../..", "", ".", "a\0b", "elsewhere/other"])
def test_paths_lead_nowhere_else(path: Path, value: str) -> None:
    write(path.parent / "config.json", {"secret": 1})
    write(path / "config.json", {"architectures": ["X"], "neck_cfg": "neck", "some_cfg": value})
    assert open_checkpoint(str(path)).parts == {"neck": path / "neck"}
