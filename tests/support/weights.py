"""A small model and checkpoints for it, for tests of the loader."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from mm_core.checkpoint import LoadedCheckpoint, load_weights, open_checkpoint
from mm_core.hookspecs import WeightMap

MAP = WeightMap(
    rename=((r"model\.", ""), (r"lm_head\.", "head.")),
    fused=(("q_proj", "qkv", 0), ("k_proj", "qkv", 1), ("v_proj", "qkv", 2)),
    ignore=(r".*\.inv_freq$",),
)
TIED = WeightMap(rename=MAP.rename, fused=MAP.fused, ignore=MAP.ignore, tied={"head.weight": "embed_tokens.weight"})


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 8)
        for param in (self.qkv.weight, self.qkv.bias):
            param.shard_sizes = (4, 2, 2)
        self.patch = nn.Linear(12, 3, bias=False)
        self.patch.weight.checkpoint_shape = (3, 3, 2, 2)


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(5, 4)
        self.attn = Attention()
        self.head = nn.Linear(4, 5, bias=False)
        self.to(dtype)
        for param in self.parameters():
            param.data.fill_(float("nan"))


def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"embed_tokens.weight": (5, 4), "attn.patch.weight": (3, 3, 2, 2)}
    for name, rows in (("q", 4), ("k", 2), ("v", 2)):
        shapes |= {f"attn.{name}_proj.weight": (rows, 4), f"attn.{name}_proj.bias": (rows,)}
    made = {f"model.{name}": torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return {**made, "lm_head.weight": torch.randn(5, 4, generator=g)}


def checkpoint(path: Path, *shards: dict[str, torch.Tensor], index: dict[str, str] | None = None) -> LoadedCheckpoint:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    if len(shards) == 1:
        save_file(shards[0], path / "model.safetensors")
    else:
        where: dict[str, str] = {}
        for i, shard in enumerate(shards, 1):
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            save_file(shard, path / file)
            where |= dict.fromkeys(shard, file)
        text = json.dumps({"metadata": {}, "weight_map": where if index is None else index})
        (path / "model.safetensors.index.json").write_text(text)
    return open_checkpoint(str(path))


def load(found: LoadedCheckpoint, weight_map: WeightMap = MAP, model: nn.Module | None = None) -> Model:
    model = model or Model()
    load_weights(found, [(model, weight_map)], show_progress=False)
    return model


def halves() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    items = list(tensors().items())
    return dict(items[:4]), dict(items[4:])
